"""Retention (RetNet): rotated queries and keys, one constant decay a head."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.packing import advance, mask_padding
from subquad.kernels.state import Count, Recurrent, accumulator_dtype
from subquad.layers.base import (
    Card,
    Facts,
    Layer,
    check_divides,
    default_head_dim,
    placement,
    width_of,
)
from subquad.layers.norms import GroupNorm
from subquad.layers.rotary import check_theta, rotary_angles, rotate


class RetentionState(NamedTuple):
    S: Recurrent  # [N, H, K, V]
    count: Count  # [N]


class Retention(Layer):
    """Retention (Sun et al. 2023, arXiv:2307.08621).

    q, k = rotate(q_proj(x)), rotate(k_proj(x)) / sqrt(K);  v, z = v_proj(x), z_proj(x)
    S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t  for head h = 0, 1, ...
    y_t = o_proj(group_norm(o_t) * silu(z_t))

    Cost: train O(T D V), decode O(D V) a token, state D V; V = expand_v D / H.

    Arguments
        n_heads: H; by default heads of width 64, K = d_model / H. expand_v: width of the values over d_model.
        rope_theta: base of the rotary embedding. norm_eps: of the group norm, which has no weights.
    """

    card = Card("Sun et al. 2023, arXiv:2307.08621", "linear_attention", "O(T D V)", "O(D V)", "D V")
    min_width = 2
    facts = Facts(residual=("o_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        expand_v: float = 2.0,
        rope_theta: float = 10000.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        n_heads = n_heads or d_model // default_head_dim(d_model)
        check_divides(self, "n_heads", n_heads, "d_model", d_model)
        inner = width_of(self, "expand_v", expand_v, d_model)
        check_divides(self, "n_heads", n_heads, "expand_v * d_model", inner)
        self.n_heads, self.K, self.V = n_heads, d_model // n_heads, inner // n_heads
        if self.K % 2:
            raise UserError(f"Retention: rotary embedding turns pairs, but heads of width {self.K} are odd")
        check_theta(self, rope_theta)
        self.rope_theta = rope_theta
        self.q_proj = nn.Linear(d_model, d_model, bias=False)
        self.k_proj = nn.Linear(d_model, d_model, bias=False)
        self.v_proj = nn.Linear(d_model, inner, bias=False)
        self.z_proj = nn.Linear(d_model, inner, bias=False)
        self.norm = GroupNorm(inner, n_heads, eps=norm_eps, affine="none")
        self.o_proj = nn.Linear(inner, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: RetentionState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], RetentionState | None]:
        S, count = state if state is not None else (None, None)
        q, k, v = (p(x).unflatten(-1, (self.n_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        cos, sin = rotary_angles(q, count, cu_seqlens, self.K, self.rope_theta)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin) * self.K**-0.5
        o, S = linear_attention(q, k, v, self.log_decay(q), state=S, cu_seqlens=cu_seqlens)
        y = mask_padding(self.o_proj(self.norm(o.flatten(-2), self.z_proj(x))), cu_seqlens)
        return y, None if state is None else RetentionState(S, advance(count, x.shape[1], cu_seqlens))

    def log_decay(self, like: Tensor) -> Tensor:
        """g [H]. Formed anew in each call: as a buffer it would be rounded wherever the layer is cast to bf16."""
        head = torch.arange(self.n_heads, device=like.device, dtype=accumulator_dtype(like.dtype))
        return torch.log1p(-torch.exp2(-5 - head))

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> RetentionState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        S = torch.zeros(batch_size, self.n_heads, self.K, self.V, dtype=accumulator_dtype(dtype), device=device)
        return RetentionState(S, torch.zeros(batch_size, dtype=torch.int64, device=device))
