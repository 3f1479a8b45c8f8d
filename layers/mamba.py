"""Mamba: a selective diagonal state-space layer."""

from math import ceil
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.packing import mask_padding
from subquad.kernels.selective_scan import selective_scan
from subquad.kernels.short_conv import short_conv
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import (
    Card,
    Facts,
    Layer,
    WideLinear,
    conv_weight,
    dt_bias,
    placement,
    silu_gated,
    width_of,
)
from subquad.layers.norms import RMSNorm


class MambaState(NamedTuple):
    conv: Recurrent  # [N, W-1, inner width]
    h: Recurrent  # [N, inner width, d_state]


class Mamba(Layer):
    """Mamba (Gu and Dao 2023, arXiv:2312.00752).

    x, z = in_proj(x);  x = silu(conv(x));  dt, B, C = x_proj(x);  dt = softplus(dt_proj(dt))
    h_t = exp(dt_t A) * h_{t-1} + dt_t x_t B_t^T,  o_t = h_t C_t + skip * x_t,  y_t = out_proj(o_t * silu(z_t))

    Cost: train O(T D' N), decode O(D' N) a token, state D' (N + W - 1) values; D' = expand * D, N = d_state.

    Arguments
        d_state: N. expand: D' / D. d_conv: W, width of the convolution. dt_rank: rank of the step size's projection,
        by default D / 16 rounded up. dt_min, dt_max: range of the initial step sizes. bias: on in_proj and out_proj.
        conv_bias: on the convolution. dt_bc_norm: an RMSNorm on each of dt (before dt_proj), B and C, without weights
        (falcon-mamba) or with them (Jamba).
    """

    card = Card("Gu and Dao 2023, arXiv:2312.00752", "selective_scan", "O(T D' N)", "O(D' N)", "D' (N + W - 1)")
    facts = Facts(
        no_decay=("conv_weight", "A_log", "skip"), float32=("A_log",), residual=("out_proj",), keeps_init=("dt_proj",)
    )

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 16,
        expand: float = 2.0,
        d_conv: int = 4,
        dt_rank: int | None = None,
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        bias: bool = False,
        conv_bias: bool = True,
        dt_bc_norm: Literal["none", "rms", "weighted"] = "none",
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        inner = width_of(self, "expand", expand, d_model)
        rank = dt_rank or ceil(d_model / 16)
        self.inner, self.sizes = inner, (rank, d_state, d_state)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias)
        self.conv_weight, self.conv_bias = conv_weight(inner, d_conv, conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * d_state, bias=False)
        self.dt_proj = WideLinear(rank, inner)
        self.dt_norm, self.B_norm, self.C_norm = (
            nn.Identity() if dt_bc_norm == "none" else RMSNorm(n, eps=norm_eps, affine=dt_bc_norm == "weighted")
            for n in self.sizes
        )
        self.out_proj = nn.Linear(inner, d_model, bias=bias)
        A = torch.arange(1, d_state + 1, dtype=torch.float32).expand(inner, -1)
        self.A_log = nn.Parameter(A.log())
        self.skip = nn.Parameter(torch.ones(inner))
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(dt_bias(inner, dt_min, dt_max))

    def forward(
        self, x: Float[Tensor, "B T D"], state: MambaState | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], MambaState | None]:
        x, z = self.in_proj(x).chunk(2, -1)
        conv, h = state if state is not None else (None, None)
        x, conv = short_conv(x, self.conv_weight, self.conv_bias, activation="silu", state=conv, cu_seqlens=cu_seqlens)
        dt, B, C = self.x_proj(x).split(self.sizes, -1)
        dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        dt = F.softplus(self.dt_proj(dt).to(accumulator_dtype(x.dtype)))
        o, h = selective_scan(x, dt, -self.A_log.to(dt.dtype).exp(), B, C, state=h, cu_seqlens=cu_seqlens)
        y = self.out_proj(silu_gated(o + self.skip.to(o.dtype) * x, z))
        return mask_padding(y, cu_seqlens), None if state is None else MambaState(conv, h)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> MambaState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        conv = torch.zeros(batch_size, self.conv_weight.shape[1] - 1, self.inner, dtype=dtype, device=device)
        h = torch.zeros(batch_size, *self.A_log.shape, dtype=accumulator_dtype(dtype), device=device)
        return MambaState(conv, h)
