"""S5: one diagonal state space with as many inputs and outputs as there are channels."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.packing import mask_padding
from subquad.kernels.scan import scan
from subquad.kernels.state import accumulator_dtype
from subquad.layers.base import Card, Facts, Layer, autocast_dtype, check_divides, placement
from subquad.layers.state_space import (
    Discretization,
    StateSpaceState,
    as_complex,
    discretize,
    even,
    hippo_normal,
    log_step,
    real_pair,
)


class S5(Layer):
    """S5 (Smith et al. 2023, arXiv:2208.04933).

    h' = w * h + B x,  o = C h, discretised with a step a mode;  u_t = gelu(o_t + skip * x_t)
    y_t = u_t * sigmoid(gate_proj(u_t))

    w starts as the modes of HiPPO-LegS's normal part, block-diagonal; B and C as random matrices in that basis.

    Cost: train and decode O(D (N + D)) a token, state N values; N = d_state.

    Arguments
        d_state: N, even: half as many complex modes, their conjugates implied. n_blocks: HiPPO matrices along the
        diagonal. discretization: "zoh" (zero-order hold) or "bilinear". dt_min, dt_max: range of the initial step
        sizes.
    """

    card = Card("Smith et al. 2023, arXiv:2208.04933", "scan", "O(T D (N + D))", "O(D (N + D))", "N")
    facts = Facts(
        no_decay=("decay_log", "frequency", "B", "C", "skip", "log_dt"), float32=("decay_log", "frequency", "log_dt")
    )

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        n_blocks: int = 1,
        discretization: Discretization = "zoh",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
    ):
        super().__init__()
        check_divides(self, "n_blocks", n_blocks, "d_state", d_state)
        size = even(self, d_state // n_blocks)
        w, V, _ = hippo_normal(size)
        V = torch.block_diag(*[V] * n_blocks)  # [N, N / 2]
        B, C = (torch.randn(d_state, d_model, dtype=torch.float64) * fan_in**-0.5 for fan_in in (d_model, d_state))
        self.discretization: Discretization = discretization
        self.decay_log = nn.Parameter((-w.real).log().float().repeat(n_blocks))
        self.frequency = nn.Parameter(w.imag.float().repeat(n_blocks))
        self.B = real_pair(V.mH @ B.to(V.dtype))  # [N / 2, D, 2]
        self.C = real_pair(V.mT @ C.to(V.dtype))
        self.skip = nn.Parameter(torch.randn(d_model))
        self.log_dt = log_step(d_state // 2, dt_min, dt_max)
        self.gate_proj = nn.Linear(d_model, d_model)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: StateSpaceState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], StateSpaceState | None]:
        x = x.to(autocast_dtype(x.device) or x.dtype)  # in which the products below are, as any projection's
        wide = accumulator_dtype(x.dtype)
        w = torch.complex(-self.decay_log.double().exp(), self.frequency.double())
        a, b = discretize(w, self.log_dt.double().exp(), self.discretization)
        # Products with real matrices, real and imaginary parts side by side; the conjugate modes double the output.
        into = torch.view_as_real(b[:, None] * as_complex(self.B)).to(wide)
        write = torch.view_as_complex(torch.einsum("btd,ndr->btnr", x.to(wide), into).to(wide))
        h, last = scan(
            a.to(write.dtype).expand_as(write), write, state=None if state is None else state.h, cu_seqlens=cu_seqlens
        )
        out_of = 2 * torch.view_as_real(as_complex(self.C).conj().resolve_conj()).to(wide)
        o = torch.einsum("btnr,ndr->btd", torch.view_as_real(h), out_of)
        u = F.gelu(o.to(x.dtype) + self.skip.to(x.dtype) * x)
        y = u * self.gate_proj(u).sigmoid()
        return mask_padding(y, cu_seqlens), None if state is None else StateSpaceState(last)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> StateSpaceState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        wide = accumulator_dtype(dtype).to_complex()
        return StateSpaceState(torch.zeros(batch_size, len(self.frequency), dtype=wide, device=device))
