"""Dense feed-forward layers."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.packing import mask_padding
from subquad.layers.base import Card, Facts, Layer, width_of


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2 (So et al. 2021, arXiv:2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "relu2": squared_relu}
ActivationName = Literal["gelu", "relu", "silu", "relu2"]


def hidden_width(owner: object, d_model: int, expand: float, d_ff: int | None) -> int:
    """F: as given, or expand * d_model, a whole number, rounded up to a multiple of 8."""
    return d_ff or -(-width_of(owner, "expand", expand, d_model) // 8) * 8


class FeedForward(Layer):
    """A layer that looks at one token at a time and so carries nothing."""

    kind = "ffn"

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> tuple[()]:
        """Nothing is carried."""
        return ()


class MLP(FeedForward):
    """y = down_proj(act(up_proj(x))), the transformer's feed-forward layer (Vaswani et al. 2017, arXiv:1706.03762).

    Cost: train and decode O(D F) a token, no state.

    Arguments: expand or d_ff (F = expand * d_model, rounded up to a multiple of 8); activation: "gelu", "relu", "silu"
    or "relu2" (its square, So et al. 2021); bias.
    """

    card = Card("Vaswani et al. 2017, arXiv:1706.03762", "-", "O(T D F)", "O(D F)", "0")
    facts = Facts(residual=("down_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 4.0,
        d_ff: int | None = None,
        activation: ActivationName = "gelu",
        bias: bool = False,
    ):
        super().__init__()
        d_ff = hidden_width(self, d_model, expand, d_ff)
        self.activation = ACTIVATIONS[activation]
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(
        self, x: Float[Tensor, "B T D"], state: Any = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        return mask_padding(self.down_proj(self.activation(self.up_proj(x))), cu_seqlens), state


class SwiGLU(FeedForward):
    """y = down_proj(silu(gate_proj(x)) * up_proj(x)) (Shazeer 2020, arXiv:2002.05202).

    Cost: train and decode O(D F) a token, no state.

    Arguments: expand or d_ff (F = expand * d_model, rounded up to a multiple of 8); bias.
    """

    card = Card("Shazeer 2020, arXiv:2002.05202", "-", "O(T D F)", "O(D F)", "0")
    facts = Facts(residual=("down_proj",))

    def __init__(self, d_model: int, *, expand: float = 8 / 3, d_ff: int | None = None, bias: bool = False):
        super().__init__()
        d_ff = hidden_width(self, d_model, expand, d_ff)
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(
        self, x: Float[Tensor, "B T D"], state: Any = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], Any]:
        y = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return mask_padding(y, cu_seqlens), state
