"""S4: a state space for each channel, HiPPO's normal matrix plus one of rank one."""

import torch
from torch import Tensor, nn

from subquad.layers.base import Card, Facts
from subquad.layers.state_space import StateSpace, as_complex, hippo_legs, hippo_normal, log_step, real_pair


class S4(StateSpace):
    """S4 (Gu et al. 2022, arXiv:2111.00396), for each channel of x:

    h' = (diag(w) - P P^H) h + B x,  o = C h,  discretised by the bilinear rule with a step of the channel's own
    y_t = out_proj(gelu(o_t + skip * x_t)), out_proj gated (GLU)

    w, P and B start as HiPPO-LegS. By the Woodbury identity the discrete transition is diagonal plus rank one, too.

    Cost: train O(T D (N + D)), decode O(D (N + D)) a token, state D N values; N = d_state.

    Arguments: d_state: N, even: half as many complex modes, their conjugates implied. dt_min, dt_max: range of the
    initial step sizes.
    """

    card = Card("Gu et al. 2022, arXiv:2111.00396", "lti", "O(T D (N + D))", "O(D (N + D))", "D N")
    facts = Facts(
        no_decay=("decay_log", "frequency", "P", "B", "log_dt"), float32=("decay_log", "frequency", "P", "log_dt")
    )

    def __init__(self, d_model: int, *, d_state: int = 64, dt_min: float = 1e-3, dt_max: float = 0.1):
        super().__init__(d_model, d_state)
        w, V, P = hippo_normal(d_state)
        into = V.mH.to(torch.complex128)
        self.decay_log = nn.Parameter((-w.real).log().float().repeat(d_model, 1))
        self.frequency = nn.Parameter(w.imag.float().repeat(d_model, 1))
        self.P = real_pair((into @ P.to(into.dtype)).repeat(d_model, 1))
        self.B = real_pair((into @ hippo_legs(d_state)[1].to(into.dtype)).repeat(d_model, 1))
        self.log_dt = log_step(d_model, dt_min, dt_max)

    def system(self) -> dict[str, Tensor]:
        w = torch.complex(-self.decay_log.double().exp(), self.frequency.double())
        P, B, C = (as_complex(p) for p in (self.P, self.B, self.C))
        dt = self.log_dt.double().exp()[:, None]
        # (1 - dt/2 A)^-1 b = D b - G Re(P^H D b) over the modes kept, D = 1 / (1 - dt/2 w); a conjugate pair of modes
        # gives twice the real part. The transition is twice that inverse minus one.
        D = 1 / (1 - 0.5 * dt * w)
        G = dt * D * P / (1 + dt * (P.conj() * D * P).sum(-1, keepdim=True).real)
        b = D * B
        b = dt * (b - G * (P.conj() * b).sum(-1, keepdim=True).real)
        return {"A": 2 * D - 1, "B": b, "C": 2 * C, "P": -2 * G, "Q": D.conj() * P}
