"""Softmax attention to blocks chosen by content."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.packing import mask_padding, positions
from subquad.kernels.topk_attention import TopKCache, topk_attention
from subquad.layers.base import Card, Layer, check_divides, default_head_dim, residual_linear, state_dtype
from subquad.layers.rotary import rotary_angles, rotate


class TopKAttention(Layer):
    """Mixture of block attention (Lu et al. 2025, arXiv:2502.13189).

    Each head at t reads its own block up to t, and of the earlier blocks the top_k - 1 of the largest q_t . mean(k).
    The choice has no gradient; what is read has.

    Cost: train O(T (T / block + top_k block) D); decode O((S / block + top_k block) D) a token; state 2 S G K values
    and S / block mean keys.

    Arguments
        block: tokens in a block. top_k: blocks read, the own one included.
        n_heads: H; by default heads of width 64. head_dim: K; d_model / n_heads by default. n_kv_heads: G, dividing H.
        rope_theta: base of the rotary embedding, None for none. bias: on q, k, v. out_bias: on the output.
    """

    card = Card(
        "Lu et al. 2025, arXiv:2502.13189",
        "topk_attention",
        "O(T (T / block + top_k block) D)",
        "O((S / block + top_k block) D)",
        "2 S G K + S G K / block",
    )
    constant_state = False
    discrete = True
    min_width = 2

    def __init__(
        self,
        d_model: int,
        *,
        block: int = 64,
        top_k: int = 3,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        out_bias: bool = False,
    ):
        super().__init__()
        n_heads = n_heads or d_model // (head_dim or default_head_dim(d_model))
        if head_dim is None:
            check_divides(self, "n_heads", n_heads, "d_model", d_model)
        self.head_dim = head_dim or d_model // n_heads
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads or n_heads
        check_divides(self, "n_kv_heads", self.n_kv_heads, "n_heads", n_heads)
        if rope_theta is not None and self.head_dim % 2:
            raise UserError(f"TopKAttention: rotary embedding turns pairs, but a head has {self.head_dim} features")
        if block < 1 or top_k < 1:
            raise UserError(f"TopKAttention: block and top_k must be at least 1; got {block} and {top_k}")
        self.block, self.top_k, self.rope_theta = block, top_k, rope_theta
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, self.n_kv_heads * self.head_dim, bias=bias)
        self.o_proj = residual_linear(n_heads * self.head_dim, d_model, bias=out_bias)

    def forward(
        self, x: Float[Tensor, "B T D"], state: TopKCache | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], TopKCache | None]:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.rope_theta is not None:
            at = positions(x.shape[1], None if state is None else state.count, cu_seqlens, x.device)
            cos, sin = rotary_angles(at, self.head_dim, self.rope_theta, q.dtype)
            q, k = rotate(torch.cat([q, k], 2), cos, sin).split([self.n_heads, self.n_kv_heads], 2)
        q = q * self.head_dim**-0.5
        o, state = topk_attention(q, k, v, block=self.block, top_k=self.top_k, state=state, cu_seqlens=cu_seqlens)
        return mask_padding(self.o_proj(o.flatten(-2)), cu_seqlens), state

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> TopKCache:
        """An empty cache of max_len tokens and their blocks' means."""
        dtype, device = state_dtype(self, dtype), self.k_proj.weight.device
        k = torch.zeros(batch_size, max_len, self.n_kv_heads, self.head_dim, dtype=dtype, device=device)
        mean = k.new_zeros(batch_size, -(-max_len // self.block), self.n_kv_heads, self.head_dim)
        count = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return TopKCache(k, torch.zeros_like(k), mean, count)
