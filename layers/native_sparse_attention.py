"""Native sparse attention: compressed, selected and window branches."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.native_sparse_attention import FORCED, NSACache, native_sparse_attention
from subquad.layers.base import Card, default_head_dim
from subquad.layers.softmax_heads import SoftmaxLayer


class NativeSparseAttention(SoftmaxLayer):
    """Native sparse attention (Yuan et al. 2025, arXiv:2502.11089), with blocks compressed to their means.

    y_t = o_proj(g1 compressed_t + g2 selected_t + g3 window_t), g = sigmoid(g_proj x_t) a head: attention to the means
    of complete blocks; to top_k blocks, chosen by the compressed attention for all heads that share a key; and to the
    last `window` tokens. The branches share keys and values, so one cache serves all of them.

    Cost: train O(T (T / block + top_k block + window) D); decode O((S / block + top_k block + window) D) a token; state
    2 S G K (1 + 1 / block) values.

    Arguments
        block: tokens in a block. top_k: blocks selected, at least 3: the first, the previous and the own one always
            are. window: W.
        n_heads: H; by default heads of width 64. head_dim: K; d_model / n_heads by default.
        n_kv_heads: G, dividing H; by default H / 4 where that is whole, else 1.
        rope_theta: base of the rotary embedding, None for none. bias: on q, k, v. out_bias: on the output.
    """

    card = Card(
        "Yuan et al. 2025, arXiv:2502.11089",
        "native_sparse_attention",
        "O(T (T / block + top_k block + W) D)",
        "O((S / block + top_k block + W) D)",
        "2 S G K (1 + 1 / block)",
    )
    constant_state = False
    discrete = True

    def __init__(
        self,
        d_model: int,
        *,
        block: int = 32,
        top_k: int = 8,
        window: int = 128,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        out_bias: bool = False,
    ):
        super().__init__()
        n_heads = n_heads or d_model // (head_dim or default_head_dim(d_model))
        n_kv_heads = n_kv_heads or (n_heads // 4 if n_heads % 4 == 0 else 1)
        self.build_heads(
            d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            bias=bias,
            out_bias=out_bias,
        )
        if block < 1 or window < 1 or top_k < FORCED:
            raise UserError(
                f"NativeSparseAttention: block and window must be at least 1 and top_k at least {FORCED}; got {block}, "
                f"{window} and {top_k}"
            )
        self.block, self.top_k, self.window = block, top_k, window
        self.g_proj = nn.Linear(d_model, 3 * n_heads, bias=False)

    def forward(
        self, x: Float[Tensor, "B T D"], state: NSACache | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], NSACache | None]:
        q, k, v = self.heads(x, state, cu_seqlens)
        o, state = native_sparse_attention(
            q,
            k,
            v,
            self.g_proj(x).sigmoid().unflatten(-1, (-1, 3)),
            block=self.block,
            top_k=self.top_k,
            window=self.window,
            state=state,
            cu_seqlens=cu_seqlens,
        )
        return self.merge(o, cu_seqlens), state

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> NSACache:
        """An empty cache of max_len tokens and their blocks' means."""
        blocks = -(-max_len // self.block)
        return NSACache(*self.empty_slots(batch_size, dtype, max_len, max_len, blocks, blocks))
