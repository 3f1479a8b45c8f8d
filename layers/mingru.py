"""MinGRU: a GRU whose gates look at the input only, so that it is one scan."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.packing import mask_padding
from subquad.kernels.scan import scan
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import Card, Facts, Layer, placement, width_of


class MinGRUState(NamedTuple):
    h: Recurrent  # [N, inner width]


class MinGRU(Layer):
    """The minimal gated recurrent unit (Feng et al. 2024, arXiv:2410.01201).

    z_t = sigmoid(z_proj(x_t)),  h_t = (1 - z_t) * h_{t-1} + z_t * g(h_proj(x_t)),  y_t = o_proj(h_t)

    The scan needs no logarithms: 1 - z_t is the sigmoid of the negated gate, exact however small it is.

    Cost: train and decode O(D D') a token, state D' values; D' = expand * D.

    Arguments
        expand: D' / D. positive: g(x) = x + 1/2 for x >= 0 and sigmoid(x) below, as in the paper's log-space form;
        otherwise g is the identity. bias: on every projection.
    """

    card = Card("Feng et al. 2024, arXiv:2410.01201", "scan", "O(T D')", "O(D')", "D'")
    facts = Facts(residual=("o_proj",))

    def __init__(self, d_model: int, *, expand: float = 2.0, positive: bool = False, bias: bool = False):
        super().__init__()
        inner = width_of(self, "expand", expand, d_model)
        self.inner, self.positive = inner, positive
        self.z_proj = nn.Linear(d_model, inner, bias=bias)
        self.h_proj = nn.Linear(d_model, inner, bias=bias)
        self.o_proj = nn.Linear(inner, d_model, bias=bias)

    def forward(
        self, x: Float[Tensor, "B T D"], state: MinGRUState | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], MinGRUState | None]:
        candidate = self.h_proj(x)
        z = self.z_proj(x).to(accumulator_dtype(x.dtype))
        if self.positive:
            candidate = F.relu(candidate) + candidate.clamp(max=0).sigmoid()
        o, h = scan(
            (-z).sigmoid(), z.sigmoid() * candidate, state=None if state is None else state.h, cu_seqlens=cu_seqlens
        )
        y = self.o_proj(o.to(candidate.dtype))
        return mask_padding(y, cu_seqlens), None if state is None else MinGRUState(h)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> MinGRUState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        return MinGRUState(torch.zeros(batch_size, self.inner, dtype=accumulator_dtype(dtype), device=device))
