"""RGLRU: Griffin's recurrent block, a gated diagonal recurrence beside a GELU branch."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.packing import advance, mask_padding, positions
from subquad.kernels.scan import scan
from subquad.kernels.short_conv import short_conv
from subquad.kernels.state import Count, Recurrent, accumulator_dtype
from subquad.layers.base import (
    Card,
    Facts,
    Layer,
    check_divides,
    conv_weight,
    default_head_dim,
    placement,
    width_of,
)

DECAY_SCALE = 8.0  # the paper's c


class RGLRUState(NamedTuple):
    conv: Recurrent  # [N, W-1, inner width]
    h: Recurrent  # [N, inner width]
    count: Count  # [N]


class RGLRU(Layer):
    """The recurrent block of Griffin and RecurrentGemma (De et al. 2024, arXiv:2402.19427).

    u = conv(x_proj(x));  r, i = sigmoid(block-diagonal gates of u);  log a_t = -8 softplus(decay) r_t
    h_t = a_t * h_{t-1} + sqrt(1 - a_t^2) * i_t * u_t (without the square root at position 0)
    y_t = o_proj(h_t * gelu(z_proj(x_t)))

    Cost: train and decode O(D D' + D'^2 / H) a token, state D' W values; D' = expand * D.

    Arguments
        expand: D' / D. n_heads: H blocks of the gates, by default of width up to 256. d_conv: W, width of the
        convolution. decay_range: range of a^(1/r) at the start. bias: on x_proj, z_proj and o_proj. conv_bias: on the
        convolution.
    """

    card = Card("De et al. 2024, arXiv:2402.19427", "scan", "O(T D'^2 / H)", "O(D'^2 / H)", "D' W")
    facts = Facts(no_decay=("conv_weight", "gate_bias", "decay"), float32=("decay",), residual=("o_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 1.0,
        n_heads: int | None = None,
        d_conv: int = 4,
        decay_range: tuple[float, float] = (0.9, 0.999),
        bias: bool = True,
        conv_bias: bool = True,
    ):
        super().__init__()
        inner = width_of(self, "expand", expand, d_model)
        self.inner, self.n_heads = inner, n_heads or inner // default_head_dim(inner, 256)
        check_divides(self, "n_heads", self.n_heads, "expand * d_model", inner)
        self.x_proj = nn.Linear(d_model, inner, bias=bias)
        self.z_proj = nn.Linear(d_model, inner, bias=bias)
        self.conv_weight, self.conv_bias = conv_weight(inner, d_conv, conv_bias)
        block = inner // self.n_heads
        self.gate_weight = nn.Parameter(torch.randn(2, self.n_heads, block, block) * block**-0.5)
        self.gate_bias = nn.Parameter(torch.zeros(2, inner))
        # softplus(decay) = -log(a^(1/r)) / 8, inverted.
        rate = -torch.empty(inner).uniform_(*decay_range).log() / DECAY_SCALE
        self.decay = nn.Parameter(rate.expm1().log())
        self.o_proj = nn.Linear(inner, d_model, bias=bias)

    def forward(
        self, x: Float[Tensor, "B T D"], state: RGLRUState | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], RGLRUState | None]:
        z = F.gelu(self.z_proj(x), approximate="tanh")
        conv, h, count = state if state is not None else (None, None, None)
        u, conv = short_conv(self.x_proj(x), self.conv_weight, self.conv_bias, state=conv, cu_seqlens=cu_seqlens)
        blocks = u.flatten(0, 1).unflatten(-1, (self.n_heads, -1)).transpose(0, 1)  # [H, B T, P]
        gates = (blocks @ self.gate_weight.to(u.dtype)).transpose(1, 2).reshape(2, *u.shape)
        wide = accumulator_dtype(u.dtype)
        r, i = (gates.to(wide) + self.gate_bias.to(wide)[:, None, None]).sigmoid()
        log_a = -DECAY_SCALE * F.softplus(self.decay.to(wide)) * r
        first = positions(x.shape[1], count, cu_seqlens, x.device)[..., None] == 0
        # The square root's slope is infinite at a = 1, which r reaches by rounding only.
        scale = torch.where(first, 1.0, (-torch.expm1(2 * log_a)).clamp(min=1e-12).sqrt())
        o, h = scan(log_a.exp(), scale * i * u, state=h, cu_seqlens=cu_seqlens)
        y = mask_padding(self.o_proj(o.to(z.dtype) * z), cu_seqlens)
        if state is None:
            return y, None
        return y, RGLRUState(conv, h, advance(count, x.shape[1], cu_seqlens))

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> RGLRUState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        conv = torch.zeros(batch_size, self.conv_weight.shape[1] - 1, self.inner, dtype=dtype, device=device)
        h = torch.zeros(batch_size, self.inner, dtype=accumulator_dtype(dtype), device=device)
        return RGLRUState(conv, h, torch.zeros(batch_size, dtype=torch.int64, device=device))
