"""Mamba-2: state-space duality, a scalar decay a head."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.packing import mask_padding
from subquad.kernels.short_conv import short_conv
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import (
    Card,
    Facts,
    Layer,
    check_divides,
    conv_weight,
    default_head_dim,
    dt_bias,
    placement,
    silu_gated,
    width_of,
)
from subquad.layers.norms import RMSNorm


class Mamba2State(NamedTuple):
    conv: Recurrent  # [N, W-1, inner width + 2 G d_state]
    S: Recurrent  # [N, H, d_state, head_dim]


class Mamba2(Layer):
    """Mamba-2 (Dao and Gu 2024, arXiv:2405.21060).

    z, xBC, dt = in_proj(x);  x, B, C = silu(conv(xBC));  dt = clamp(softplus(dt + dt_bias), *dt_limit)
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t (dt_t x_t)^T,  o_t = S_t^T C_t + skip * x_t
    y_t = out_proj(norm(o_t * silu(z_t)))

    Cost: train O(T D' N), decode O(D' N) a token, state D' N + (W - 1) (D' + 2 G N); D' = expand * D, N = d_state.

    Arguments
        d_state: N. expand: D' / D. head_dim: width of a head, 64 where it divides D'. n_groups: G, groups of heads that
        share B and C. d_conv: W, width of the convolution. A_range, dt_min, dt_max: ranges of the initial decay rates
        and step sizes. dt_limit: bounds of the step size, None (or infinity) for no upper one. bias: on in_proj and
        out_proj; conv_bias: on the convolution.
        norm: False leaves it out (most of Falcon-H1).
    """

    card = Card(
        "Dao and Gu 2024, arXiv:2405.21060", "linear_attention", "O(T D' N)", "O(D' N)", "D' N + (W - 1) (D' + 2 G N)"
    )
    facts = Facts(
        no_decay=("conv_weight", "A_log", "dt_bias", "skip"), float32=("A_log", "dt_bias"), residual=("out_proj",)
    )

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        expand: float = 2.0,
        head_dim: int | None = None,
        n_groups: int = 1,
        d_conv: int = 4,
        A_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_limit: tuple[float, float | None] = (0.0, None),
        norm: bool = True,
        norm_eps: float = 1e-5,
        bias: bool = False,
        conv_bias: bool = True,
    ):
        super().__init__()
        inner = width_of(self, "expand", expand, d_model)
        self.head_dim = head_dim or default_head_dim(inner)
        check_divides(self, "head_dim", self.head_dim, "expand * d_model", inner)
        self.n_heads = inner // self.head_dim
        check_divides(self, "n_groups", n_groups, "the number of heads", self.n_heads)
        self.inner, self.d_state, self.n_groups, self.dt_limit = inner, d_state, n_groups, dt_limit
        shared = n_groups * d_state
        self.in_proj = nn.Linear(d_model, 2 * inner + 2 * shared + self.n_heads, bias=bias)
        self.conv_weight, self.conv_bias = conv_weight(inner + 2 * shared, d_conv, conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(*A_range).log())
        self.dt_bias = nn.Parameter(dt_bias(self.n_heads, dt_min, dt_max))
        self.skip = nn.Parameter(torch.ones(self.n_heads))
        self.norm = RMSNorm(inner, n_groups, eps=norm_eps) if norm else None
        self.out_proj = nn.Linear(inner, d_model, bias=bias)

    def forward(
        self, x: Float[Tensor, "B T D"], state: Mamba2State | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Mamba2State | None]:
        shared = self.n_groups * self.d_state
        z, xBC, dt = self.in_proj(x).split([self.inner, self.inner + 2 * shared, self.n_heads], -1)
        conv, S = state if state is not None else (None, None)
        xBC, conv = short_conv(
            xBC, self.conv_weight, self.conv_bias, activation="silu", state=conv, cu_seqlens=cu_seqlens
        )
        x, B, C = xBC.split([self.inner, shared, shared], -1)
        x = x.unflatten(-1, (self.n_heads, self.head_dim))
        B, C = (t.unflatten(-1, (self.n_groups, self.d_state)) for t in (B, C))
        wide = accumulator_dtype(dt.dtype)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*self.dt_limit)
        g = -self.A_log.to(wide).exp() * dt
        o, S = linear_attention(C, B, (x * dt[..., None]).to(x.dtype), g, state=S, cu_seqlens=cu_seqlens)
        o = (o + self.skip.to(wide)[:, None] * x).flatten(-2).to(z.dtype)
        y = self.out_proj(silu_gated(o, z) if self.norm is None else self.norm(o, z, gate_first=True))
        return mask_padding(y, cu_seqlens), None if state is None else Mamba2State(conv, S)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> Mamba2State:
        """The state before any token; its size does not depend on max_len."""
        (dtype, device), (width, taps) = placement(self, dtype), self.conv_weight.shape
        conv = torch.zeros(batch_size, taps - 1, width, dtype=dtype, device=device)
        shape = (batch_size, self.n_heads, self.d_state, self.head_dim)
        return Mamba2State(conv, torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device))
