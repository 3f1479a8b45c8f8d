"""HGRN: a gated linear recurrence whose forget gates are bounded from below, more so the deeper the layer."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.packing import mask_padding
from subquad.kernels.scan import scan
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import Card, Facts, Layer, placement, width_of
from subquad.layers.norms import RMSNorm


class HGRNState(NamedTuple):
    h: Recurrent  # [N, inner width]


class HGRN(Layer):
    """Hierarchically gated recurrence, real-valued (Qin et al. 2023, arXiv:2311.04823).

    f_t = l + (1 - l) sigmoid(f_proj(x_t)),  h_t = f_t * h_{t-1} + (1 - f_t) * silu(i_proj(x_t))
    y_t = o_proj(norm(h_t) * silu(z_proj(x_t)))

    Cost: train and decode O(D D') a token, state D' values; D' = expand * D.

    Arguments
        expand: D' / D. lower_bound: l, in [0, 1); by default layer_idx / n_layers, where the bounds that the paper
        learns for all layers together start, so deeper layers remember longer. bias: on every projection.
        layer_idx, n_layers: the layer's place, given by the model.
    """

    card = Card("Qin et al. 2023, arXiv:2311.04823", "scan", "O(T D')", "O(D')", "D'")
    facts = Facts(residual=("o_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        expand: float = 1.0,
        lower_bound: float | None = None,
        bias: bool = False,
        norm_eps: float = 1e-5,
        layer_idx: int = 0,
        n_layers: int = 1,
    ):
        super().__init__()
        inner = width_of(self, "expand", expand, d_model)
        self.inner = inner
        self.lower_bound = layer_idx / n_layers if lower_bound is None else lower_bound
        if not 0 <= self.lower_bound < 1:
            raise UserError(f"HGRN: lower_bound is at least 0 and below 1; got {self.lower_bound}")
        self.i_proj = nn.Linear(d_model, inner, bias=bias)
        self.f_proj = nn.Linear(d_model, inner, bias=bias)
        self.z_proj = nn.Linear(d_model, inner, bias=bias)
        self.norm = RMSNorm(inner, eps=norm_eps)
        self.o_proj = nn.Linear(inner, d_model, bias=bias)

    def forward(
        self, x: Float[Tensor, "B T D"], state: HGRNState | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], HGRNState | None]:
        i = F.silu(self.i_proj(x))
        f = self.f_proj(x).to(accumulator_dtype(x.dtype))
        # 1 - f = (1 - l) sigmoid(-x), which a subtraction would round away where f is near one.
        write = (1 - self.lower_bound) * (-f).sigmoid()
        keep = self.lower_bound + (1 - self.lower_bound) * f.sigmoid()
        o, h = scan(keep, write * i, state=None if state is None else state.h, cu_seqlens=cu_seqlens)
        y = self.o_proj(self.norm(o.to(i.dtype), self.z_proj(x)))
        return mask_padding(y, cu_seqlens), None if state is None else HGRNState(h)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> HGRNState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        return HGRNState(torch.zeros(batch_size, self.inner, dtype=accumulator_dtype(dtype), device=device))
