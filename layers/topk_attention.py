"""Softmax attention to blocks chosen by content."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.topk_attention import TopKCache, topk_attention
from subquad.layers.base import Card
from subquad.layers.softmax_heads import SoftmaxLayer


class TopKAttention(SoftmaxLayer):
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
        self.build_heads(
            d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            bias=bias,
            out_bias=out_bias,
        )
        if block < 1 or top_k < 1:
            raise UserError(f"TopKAttention: block and top_k must be at least 1; got {block} and {top_k}")
        self.block, self.top_k = block, top_k

    def forward(
        self, x: Float[Tensor, "B T D"], state: TopKCache | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], TopKCache | None]:
        q, k, v = self.heads(x, state, cu_seqlens)
        o, state = topk_attention(q, k, v, block=self.block, top_k=self.top_k, state=state, cu_seqlens=cu_seqlens)
        return self.merge(o, cu_seqlens), state

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> TopKCache:
        """An empty cache of max_len tokens and their blocks' means."""
        return TopKCache(*self.empty_slots(batch_size, dtype, max_len, max_len, -(-max_len // self.block)))
