"""Softmax attention over a declared sparse pattern."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.kernels.patterns import make_pattern
from subquad.kernels.sparse_attention import SparseCache, empty_cache, sparse_attention
from subquad.layers.base import (
    Card,
    available_if,
    placement,
)
from subquad.layers.softmax_heads import SoftmaxLayer


class SparseAttention(SoftmaxLayer):
    """Attention over a union of windows, blocks, global, random, strided and summary tokens (Beltagy et al. 2020,
    arXiv:2004.05150; Zaheer et al. 2020, arXiv:2007.14062; Child et al. 2019, arXiv:1904.10509).

    y_t = o_proj(concat_h sum_s softmax_s(q_t . k_s / sqrt(K)) v_s) over the s that the pattern lets head h at t read.

    Cost: train O(E K) over the pattern's E edges a head, never T^2 for a pattern of bounded parts; decode O(what one
    token reads); state 2 (first + ring + far) G K values: the global tokens, the last tokens that some part reaches
    back to, and with `summaries` width / stride of all tokens (with `strided` all of them).

    Arguments
        pattern: a name, a mapping {name: ..., **arguments}, or a list of those to unite. Ready-made: longformer,
            bigbird, sparse_transformer (own block and summaries), sparse_transformer_strided. Parts: window,
            dilated_window, local_blocks, global_tokens, random_blocks, strided, summaries. Their arguments are those
            of subquad.kernels.patterns.
        n_heads: H; by default heads of width 64. head_dim: K; d_model / n_heads by default. n_kv_heads: G, dividing H.
        causal: False reads both ways; global tokens then read everything, and there is no decoding.
        rope_theta: base of the rotary embedding, None for none. bias: on q, k, v. out_bias: on the output.
    """

    card = Card(
        "Beltagy et al. 2020, arXiv:2004.05150; Zaheer et al. 2020, arXiv:2007.14062; Child et al. 2019, "
        "arXiv:1904.10509",
        "sparse_attention",
        "O(T E_t D) over E_t edges a token",
        "O(E_t D)",
        "2 (first + ring) G K; summaries add T width / stride, strided T",
    )

    def __init__(
        self,
        d_model: int,
        *,
        pattern: str | dict[str, Any] | list[Any] = "longformer",
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
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
        self.causal = causal
        self.pattern = make_pattern(pattern, causal)
        for part in self.pattern.parts:
            part.split(self.n_heads, causal)  # one dilation a head, or an error
        self.constant_state = self.pattern.far is None

    def forward(
        self, x: Float[Tensor, "B T D"], state: SparseCache | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], SparseCache | None]:
        q, k, v = self.heads(x, state, cu_seqlens)
        o, state = sparse_attention(q, k, v, self.pattern, state=state, cu_seqlens=cu_seqlens)
        return self.merge(o, cu_seqlens), state

    @available_if(lambda self: self.causal, "causal=False reads the whole sequence at once")
    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> SparseCache:
        """An empty cache of what the pattern can read again."""
        return empty_cache(self.pattern, batch_size, max_len, self.n_kv_heads, self.head_dim, *placement(self, dtype))
