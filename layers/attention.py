"""Softmax attention: multi-head, multi-query, grouped-query, with a window, sinks, rotary positions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.attention import attention
from subquad.kernels.packing import mask_padding, positions
from subquad.kernels.state import KVCache, RingCache
from subquad.layers.base import (
    Card,
    Layer,
    available_if,
    check_divides,
    default_head_dim,
    no_weight_decay,
    residual_linear,
    state_dtype,
)
from subquad.layers.norms import RMSNorm
from subquad.layers.rotary import rotary_angles, rotate


class Attention(Layer):
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
        qk_norm: RMSNorm on every head of q and k. bias: on q, k, v. out_bias: on the output.
    """

    card = Card(
        "Vaswani et al. 2017, arXiv:1706.03762",
        "attention",
        "O(T^2 D); window O(T W D)",
        "O(S D)",
        "2 S G K",
    )
    constant_state = False
    min_width = 2

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
        bias: bool = False,
        out_bias: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        n_heads = n_heads or d_model // (head_dim or default_head_dim(d_model))
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if head_dim is None:
            check_divides(self, "n_heads", n_heads, "d_model", d_model)
        check_divides(self, "n_kv_heads", n_kv_heads, "n_heads", n_heads)
        self.head_dim = head_dim or d_model // n_heads
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.causal, self.window, self.n_sinks = causal, window, n_sinks
        if window is not None and window < 1:
            raise UserError(f"Attention: window is {window}; it must be at least 1, or null for none")
        self.constant_state = window is not None
        self.rope_theta, self.rotary_dim = rope_theta, int(self.head_dim * rope_fraction)
        if rope_theta is not None and self.rotary_dim % 2:
            raise UserError(
                f"Attention: rotary embedding turns pairs, but {self.rotary_dim} features of a head are odd"
            )
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.o_proj = residual_linear(n_heads * self.head_dim, d_model, bias=out_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.sink_logits = no_weight_decay(nn.Parameter(torch.zeros(n_heads))) if sink_logits else None

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: KVCache | RingCache | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KVCache | RingCache | None]:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_theta is not None:
            at = positions(x.shape[1], None if state is None else state.count, cu_seqlens, x.device)
            cos, sin = rotary_angles(at, self.rotary_dim, self.rope_theta, q.dtype)
            q, k = rotate(torch.cat([q, k], 2), cos, sin).split([self.n_heads, self.n_kv_heads], 2)
        o, state = attention(
            q * self.head_dim**-0.5,
            k,
            v,
            causal=self.causal,
            window=self.window,
            n_sinks=self.n_sinks,
            sink_logits=self.sink_logits,
            state=state,
            cu_seqlens=cu_seqlens,
        )
        return mask_padding(self.o_proj(o.flatten(-2)), cu_seqlens), state

    @available_if(lambda self: self.causal, "causal=False reads the whole sequence at once")
    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> KVCache | RingCache:
        """An empty cache: max_len slots, or with a window n_sinks + window slots whatever max_len."""
        weight = self.k_proj.weight
        slots = max_len if self.window is None else self.n_sinks + self.window
        shape = (batch_size, slots, self.n_kv_heads, self.head_dim)
        k = torch.zeros(shape, dtype=state_dtype(self, dtype), device=weight.device)
        count = torch.zeros(batch_size, dtype=torch.int64, device=weight.device)
        return (KVCache if self.window is None else RingCache)(k, torch.zeros_like(k), count)
