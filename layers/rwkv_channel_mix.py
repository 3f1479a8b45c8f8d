"""RWKV's feed-forward layer, which looks at the token before as well."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.packing import mask_padding
from subquad.kernels.state import Recurrent
from subquad.layers.base import Card, Facts, Layer, placement
from subquad.layers.mlp import hidden_width
from subquad.layers.rwkv_parts import TokenShift


class RWKVChannelMixState(NamedTuple):
    last: Recurrent  # [N, 1, D]


class RWKVChannelMix(Layer):
    """RWKV's channel mix (Peng et al. 2023, arXiv:2305.13048).

    k = relu(up_proj(shift_k(x)))^2;  y = sigmoid(r_proj(shift_r(x))) * down_proj(k), where shift_s(x)_t = x_t +
    (x_{t-1} - x_t) mu_s

    Cost: train and decode O(D F) a token, state D values.

    Arguments: expand or d_ff: F = expand * D, rounded up to a multiple of 8. gated: with the receptance r (RWKV-4 to
    6); False is RWKV-7's, which leaves it out.
    """

    card = Card("Peng et al. 2023, arXiv:2305.13048", "shift", "O(T D F)", "O(D F)", "D")
    kind = "ffn"
    facts = Facts(residual=("down_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 3.5,
        d_ff: int | None = None,
        gated: bool = True,
        layer_idx: int = 0,
        n_layers: int = 1,
    ):
        super().__init__()
        self.d_model, d_ff = d_model, hidden_width(self, d_model, expand, d_ff)
        self.mix = TokenShift(d_model, [1.0] * (2 if gated else 1), layer_idx=layer_idx, n_layers=n_layers)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        self.r_proj = nn.Linear(d_model, d_model, bias=False) if gated else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: RWKVChannelMixState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], RWKVChannelMixState | None]:
        streams, last = self.mix(x, None if state is None else state.last, cu_seqlens)
        y = self.down_proj(F.relu(self.up_proj(streams[0])).square())
        if self.r_proj is not None:
            y = self.r_proj(streams[1]).sigmoid() * y
        return mask_padding(y, cu_seqlens), None if last is None else RWKVChannelMixState(last)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> RWKVChannelMixState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        return RWKVChannelMixState(torch.zeros(batch_size, 1, self.d_model, dtype=dtype, device=device))
