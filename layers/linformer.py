"""Linformer: attention over learned summaries of the keys and values."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.linformer_attention import SummaryCache, linformer_attention
from subquad.layers.base import Card, available_if
from subquad.layers.softmax_heads import SoftmaxLayer


class LinformerAttention(SoftmaxLayer):
    """Linformer (Wang et al. 2020, arXiv:2006.04768), and a causal form of it that works by blocks.

    causal=False, the paper's: y = o_proj(softmax(q (E k)^T) (F v)) with learned E, F [R, max_len], so a sequence of
    more than max_len tokens is an error. causal: E, F [R, block] summarize each finished block of tokens; a token reads
    the summaries of all finished blocks and the tokens of its own block up to itself, at any length.

    Cost: train O(T R D), causal O(T (T R / C + C) D); decode O((S + C) D) a token over S = R t / C summaries; state
    2 (S + C) D values, S for max_len tokens.

    Arguments
        n_heads: H; by default heads of width 64. rank: R; by default a quarter of block or max_len. E and F serve all
            heads; share_kv: F is E.
        block: C, of the causal form. max_len: of the other; 1024 by default.
        rope_theta: base of the rotary embedding of q and k before they are summarized, None for none (the paper adds
            positions to the embedding). bias: on q, k, v.
    """

    card = Card(
        "Wang et al. 2020, arXiv:2006.04768",
        "linformer_attention",
        "O(T (T R / C + C) D); bidirectional O(T R D)",
        "O((S + C) D)",
        "2 (S + C) D",
    )
    constant_state = False

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        causal: bool = True,
        block: int = 64,
        max_len: int | None = None,
        rank: int | None = None,
        share_kv: bool = False,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
    ):
        super().__init__()
        if causal and max_len is not None:
            raise UserError(f"LinformerAttention: max_len {max_len} is for causal: false; the causal form has none")
        self.build_heads(d_model, n_heads=n_heads, rope_theta=rope_theta, bias=bias)
        self.causal = causal
        self.max_len = None if causal else max_len or 1024
        length = self.max_len or block
        rank = rank or max(1, length // 4)
        self.e_k = nn.Parameter(torch.randn(rank, length) * length**-0.5)
        self.e_v = None if share_kv else nn.Parameter(torch.randn(rank, length) * length**-0.5)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: SummaryCache | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], SummaryCache | None]:
        q, k, v = self.heads(x, state, cu_seqlens)
        o, state = linformer_attention(
            q,
            k,
            v,
            self.e_k,
            self.e_k if self.e_v is None else self.e_v,
            causal=self.causal,
            state=state,
            cu_seqlens=cu_seqlens,
        )
        return self.merge(o, cu_seqlens), state

    @available_if(lambda self: self.causal, "causal=False reads the whole sequence at once")
    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> SummaryCache:
        """No summaries yet, with room for those of max_len tokens, and an empty block."""
        rank, block = self.e_k.shape
        slots = max(1, max_len // block) * rank
        return SummaryCache(*self.empty_slots(batch_size, dtype, slots, slots, block, block))
