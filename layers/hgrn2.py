"""HGRN-2: gated linear recurrence whose keys are what its forget gates leave."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.packing import mask_padding
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import Card, Facts, Layer, check_divides, default_head_dim, placement
from subquad.layers.norms import RMSNorm


class HGRN2State(NamedTuple):
    S: Recurrent  # [N, H, K, K]


class HGRN2(Layer):
    """HGRN-2 (Qin et al. 2024, arXiv:2404.07904).

    q = silu(q_proj(x));  f_t = l + (1 - l) sigmoid(f_proj(x));  v = v_proj(x)
    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_t^T,  y_t = o_proj(norm(S_t^T q_t))

    Cost: train O(T D K), decode O(D K) a token, state D K; K = head_dim.

    Arguments
        head_dim: K, width of keys and values of a head, 64 where it divides d_model. lower_bound: l, in [0, 1); by
        default layer_idx / n_layers, where the bounds that the paper learns across layers start. norm_eps: of the
        RMSNorm over all heads together.
    """

    card = Card("Qin et al. 2024, arXiv:2404.07904", "linear_attention", "O(T D K)", "O(D K)", "D K")
    facts = Facts(residual=("o_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int | None = None,
        lower_bound: float | None = None,
        layer_idx: int = 0,
        n_layers: int = 1,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        self.head_dim = head_dim or default_head_dim(d_model)
        check_divides(self, "head_dim", self.head_dim, "d_model", d_model)
        self.n_heads = d_model // self.head_dim
        self.lower_bound = layer_idx / n_layers if lower_bound is None else lower_bound
        if not 0 <= self.lower_bound < 1:
            raise UserError(f"HGRN2: lower_bound is at least 0 and below 1; got {self.lower_bound}")
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.f_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, d_model, bias=False)
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: HGRN2State | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], HGRN2State | None]:
        q, f, v = (p(x).unflatten(-1, (self.n_heads, -1)) for p in (self.q_proj, self.f_proj, self.v_proj))
        f = f.to(accumulator_dtype(f.dtype))
        k = (1 - self.lower_bound) * (-f).sigmoid()  # not 1 - (1 - k), which cancels where the gate is almost open
        g = torch.log1p(-k) if self.lower_bound else F.logsigmoid(f)
        S = None if state is None else state.S
        o, S = linear_attention(F.silu(q), k, v, g, state=S, cu_seqlens=cu_seqlens)
        y = self.o_proj(self.norm(o.flatten(-2)))
        return mask_padding(y, cu_seqlens), None if state is None else HGRN2State(S)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> HGRN2State:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim)
        return HGRN2State(torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device))
