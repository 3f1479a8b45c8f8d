"""LFM2's mixer: a short convolution between two gates."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.packing import mask_padding
from subquad.kernels.short_conv import short_conv
from subquad.kernels.state import Recurrent
from subquad.layers.base import Card, Facts, Layer, conv_weight, placement


class GatedShortConvState(NamedTuple):
    conv: Recurrent  # [N, W-1, D]


class GatedShortConv(Layer):
    """Gated short convolution (Liquid AI 2025, LFM2, arXiv:2511.23404).

    B, C, x = in_proj(x);  y_t = out_proj(C_t * conv(B * x)_t), with no other nonlinearity.

    Cost: train O(T D W), decode O(D W) a token, state (W - 1) D values. It sees W tokens: mix it with layers that see
        more.

    Arguments: d_conv: W, width of the convolution. bias: on the projections and the convolution.
    """

    card = Card("Liquid AI 2025, arXiv:2511.23404", "short_conv", "O(T D W)", "O(D W)", "(W - 1) D")
    facts = Facts(no_decay=("conv_weight",), residual=("out_proj",))

    def __init__(self, d_model: int, *, d_conv: int = 3, bias: bool = False):
        super().__init__()
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=bias)
        self.conv_weight, self.conv_bias = conv_weight(d_model, d_conv, bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: GatedShortConvState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], GatedShortConvState | None]:
        B, C, x = self.in_proj(x).chunk(3, -1)
        before = None if state is None else state.conv
        o, conv = short_conv(B * x, self.conv_weight, self.conv_bias, state=before, cu_seqlens=cu_seqlens)
        y = mask_padding(self.out_proj(C * o), cu_seqlens)
        return y, None if conv is None else GatedShortConvState(conv)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> GatedShortConvState:
        """The state before any token; its size does not depend on max_len."""
        (dtype, device), (D, W) = placement(self, dtype), self.conv_weight.shape
        return GatedShortConvState(torch.zeros(batch_size, W - 1, D, dtype=dtype, device=device))
