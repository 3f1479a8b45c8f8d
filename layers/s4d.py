"""S4D: S4 without the low rank, a diagonal state space for each channel."""

from math import pi
from typing import Literal

import torch
from torch import Tensor, nn

from subquad.layers.base import Card, Facts
from subquad.layers.state_space import Discretization, StateSpace, as_complex, discretize, hippo_normal, log_step


class S4D(StateSpace):
    """S4D (Gu et al. 2022, arXiv:2206.11893), for each channel of x:

    h' = w * h + x,  o = C h, discretised with a step of the channel's own
    y_t = out_proj(gelu(o_t + skip * x_t)), out_proj gated (GLU)

    Only the product of input and output weights matters, so the input weights are 1.

    Cost: train O(T D (N + D)), decode O(D (N + D)) a token, state D N values; N = d_state.

    Arguments
        d_state: N, even: half as many complex modes, their conjugates implied.
        init: frequencies of the modes: "legs", those of HiPPO-LegS's normal part; "inv", its asymptotic law
            N / pi (N / (2n + 1) - 1); "lin", pi n, a Fourier series. Their decay starts at 1/2.
        discretization: "zoh" (zero-order hold) or "bilinear". dt_min, dt_max: range of the initial step sizes.
    """

    card = Card("Gu et al. 2022, arXiv:2206.11893", "lti", "O(T D (N + D))", "O(D (N + D))", "D N")
    facts = Facts(no_decay=("decay_log", "frequency", "log_dt"), float32=("decay_log", "frequency", "log_dt"))

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        init: Literal["legs", "inv", "lin"] = "legs",
        discretization: Discretization = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ):
        super().__init__(d_model, d_state)
        n = torch.arange(self.n_modes)
        frequency = {
            "legs": lambda: hippo_normal(d_state)[0].imag.float(),
            "inv": lambda: d_state / pi * (d_state / (2 * n + 1) - 1),
            "lin": lambda: pi * n,
        }[init]()
        self.discretization: Discretization = discretization
        self.decay_log = nn.Parameter(torch.full((d_model, self.n_modes), 0.5).log())
        self.frequency = nn.Parameter(frequency.repeat(d_model, 1))
        self.log_dt = log_step(d_model, dt_min, dt_max)

    def system(self) -> dict[str, Tensor]:
        w = torch.complex(-self.decay_log.double().exp(), self.frequency.double())
        a, b = discretize(w, self.log_dt.double().exp()[:, None], self.discretization)
        return {"A": a, "B": b, "C": 2 * as_complex(self.C)}
