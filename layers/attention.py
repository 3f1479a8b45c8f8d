"""Softmax attention: multi-head, multi-query, grouped-query, with a window, sinks, rotary positions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.attention import attention
from subquad.kernels.state import KVCache, RingCache
from subquad.layers.base import (
    Card,
    Facts,
    available_if,
)
from subquad.layers.norms import RMSNorm
from subquad.layers.softmax_heads import SoftmaxLayer


class Attention(SoftmaxLayer):
    """Softmax attention (Vaswani et al. 2017, arXiv:1706.03762; grouped-query: Ainslie et al. 2023, arXiv:2305.13245).

    y_t = o_proj(concat_h sum_s softmax_s(q_t . k_s / sqrt(K)) v_s) over the s that causality, window and sinks allow.

    Cost: train O(T^2 D), O(T W D) with a window; decode O(S D) a token over S cached slots (W with a window); state
    2 S G K values, S = max_len, or n_sinks + window.

    Arguments
        n_heads: H; by default heads of width 64. head_dim: K; d_model / n_heads by default.
        n_kv_heads: G key/value heads, dividing H: H is multi-head (the default), 1 multi-query, between them
            grouped-query.
        causal: False reads the whole sequence (no decoding then).
        window: read the last `window` tokens only, the current one included.
        n_sinks: keep the first n_sinks tokens visible whatever the window (Xiao et al. 2023, arXiv:2309.17453); they
            keep their own rotary positions.
        sink_logits: learn one extra softmax column a head whose weight is dropped (gpt-oss).
        rope_theta: base of the rotary embedding, None for none. rope_fraction: the share of K that is rotated.
        qk_norm: RMSNorm on every head of q and k. output_gate: o_proj's input times sigmoid(z_proj(x)) (Qiu et al.
            2025, arXiv:2505.06708). bias: on q, k, v. out_bias: on the output.
    """

    card = Card(
        "Vaswani et al. 2017, arXiv:1706.03762",
        "attention",
        "O(T^2 D); window O(T W D)",
        "O(S D)",
        "2 S G K",
    )
    constant_state = False
    facts = Facts(no_decay=("sink_logits",))

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = True,
        window: int | None = None,
        n_sinks: int = 0,
        sink_logits: bool = False,
        rope_theta: float | None = 10000.0,
        rope_fraction: float = 1.0,
        qk_norm: bool = False,
        output_gate: bool = False,
        bias: bool = False,
        out_bias: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.build_heads(
            d_model,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_fraction=rope_fraction,
            bias=bias,
            out_bias=out_bias,
        )
        self.causal, self.window, self.n_sinks = causal, window, n_sinks
        if window is not None and window < 1:
            raise UserError(f"Attention: window is {window}; it must be at least 1, or null for none")
        self.constant_state = window is not None
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.z_proj = nn.Linear(d_model, self.n_heads * self.head_dim, bias=bias) if output_gate else None
        self.sink_logits = nn.Parameter(torch.zeros(self.n_heads)) if sink_logits else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: KVCache | RingCache | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KVCache | RingCache | None]:
        q, k, v = self.heads(x, state, cu_seqlens)
        o, state = attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            n_sinks=self.n_sinks,
            sink_logits=self.sink_logits,
            state=state,
            cu_seqlens=cu_seqlens,
        )
        if self.z_proj is not None:
            o = o * self.z_proj(x).sigmoid().view_as(o)
        return self.merge(o, cu_seqlens), state

    @available_if(lambda self: self.causal, "causal=False reads the whole sequence at once")
    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> KVCache | RingCache:
        """An empty cache: max_len slots, or with a window n_sinks + window slots whatever max_len."""
        slots = max_len if self.window is None else self.n_sinks + self.window
        return (KVCache if self.window is None else RingCache)(*self.empty_slots(batch_size, dtype, slots, slots))
