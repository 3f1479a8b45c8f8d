"""Multi-head latent attention: one short latent a token is cached instead of every head's keys and values."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.latent_attention import LatentCache, latent_attention
from subquad.kernels.packing import mask_padding
from subquad.layers.base import Card, Facts, Layer, check_divides, default_head_dim, matrix_of, placement
from subquad.layers.norms import RMSNorm
from subquad.layers.rotary import check_theta, pairs_to_halves, rotary_angles, rotate


class LatentAttention(Layer):
    """Multi-head latent attention, MLA (DeepSeek-AI 2024, arXiv:2405.04434).

    c_t = norm(W_dkv x_t);  k_t = [W_uk c_t, rope(W_kr x_t)], v_t = W_uv c_t;  softmax attention over s <= t, of which
    only c and the rotary key, one for all heads, are cached.

    Cost: train O(T^2 H (K + V)); decode O(S H R) a token over S cached slots, with W_uk and W_uv taken into the query
    and the output where that is fewer products; state S (R + P) values.

    Arguments
        n_heads: H; by default heads of width 64. kv_lora_rank: R, the latent's width; d_model / 4 by default.
        q_lora_rank: width of a latent for the queries too; None for one projection.
        qk_nope_head_dim, qk_rope_head_dim: K and P, a head's features without and with rotary positions; by default
            d_model / H and half of it. v_head_dim: V; K by default.
        rope_theta: base of the rotary embedding, None for none (Kimi Linear). rope_interleave: features turn in pairs
            (0, 1), (2, 3), ... as in DeepSeek's weights, not by halves.
        bias: on the projections into the latents and on the output.
    """

    card = Card("DeepSeek-AI 2024, arXiv:2405.04434", "latent_attention", "O(T^2 D)", "O(S H R)", "S (R + P)")
    constant_state = False
    min_width = 4
    facts = Facts(residual=("o_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        qk_nope_head_dim: int | None = None,
        qk_rope_head_dim: int | None = None,
        v_head_dim: int | None = None,
        rope_theta: float | None = 10000.0,
        rope_interleave: bool = False,
        bias: bool = False,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        n_heads = n_heads or d_model // default_head_dim(d_model)
        if qk_nope_head_dim is None:
            check_divides(self, "n_heads", n_heads, "d_model", d_model)
        K = qk_nope_head_dim or d_model // n_heads
        P = 2 * max(1, K // 4) if qk_rope_head_dim is None else qk_rope_head_dim
        V, R = v_head_dim or K, kv_lora_rank or max(1, d_model // 4)
        if rope_theta is not None and P % 2:
            raise UserError(f"LatentAttention: qk_rope_head_dim is {P}; rotary embedding turns pairs, so it is even")
        self.n_heads, self.rank, self.nope_dim, self.rope_dim, self.v_dim = n_heads, R, K, P, V
        check_theta(self, rope_theta)
        self.rope_theta, self.rope_interleave = rope_theta, rope_interleave
        self.q_a_proj = self.q_a_norm = None
        if q_lora_rank is not None:
            self.q_a_proj = nn.Linear(d_model, q_lora_rank, bias=bias)
            self.q_a_norm = RMSNorm(q_lora_rank, eps=norm_eps)
        self.q_proj = nn.Linear(q_lora_rank or d_model, n_heads * (K + P), bias=False)
        self.kv_a_proj = nn.Linear(d_model, R + P, bias=bias)
        self.kv_a_norm = RMSNorm(R, eps=norm_eps)
        self.kv_b_proj = nn.Linear(R, n_heads * (K + V), bias=False)
        self.o_proj = nn.Linear(n_heads * V, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: LatentCache | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], LatentCache | None]:
        from_x = x
        if self.q_a_proj is not None and self.q_a_norm is not None:
            from_x = self.q_a_norm(self.q_a_proj(x))
        q, q_rope = self.q_proj(from_x).unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.rope_dim], -1)
        c, k_rope = self.kv_a_proj(x).split([self.rank, self.rope_dim], -1)
        if self.rope_theta is not None:
            count = None if state is None else state.count
            cos, sin = rotary_angles(q, count, cu_seqlens, self.rope_dim, self.rope_theta)
            turning = torch.cat([q_rope, k_rope[:, :, None]], 2)
            turned = rotate(pairs_to_halves(turning) if self.rope_interleave else turning, cos, sin)
            q_rope, k_rope = turned[:, :, :-1], turned[:, :, -1]
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        inputs, w_k, w_v = (q * scale, q_rope * scale, self.kv_a_norm(c), k_rope), None, None
        if (weight := matrix_of(self.kv_b_proj)) is not None:
            w_k, w_v = weight.unflatten(0, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], 1)
        o, state = latent_attention(*inputs, w_k, w_v, expand=self.keys_and_values, state=state, cu_seqlens=cu_seqlens)
        return mask_padding(self.o_proj(o.flatten(-2)), cu_seqlens), state

    def keys_and_values(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """[.., H, K] and [.., H, V] of latents [.., R]."""
        k, v = self.kv_b_proj(c).unflatten(-1, (self.n_heads, -1)).split([self.nope_dim, self.v_dim], -1)
        return k, v

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> LatentCache:
        """An empty cache of max_len slots."""
        dtype, device = placement(self, dtype)
        c, k_rope = (
            torch.zeros(batch_size, max_len, width, dtype=dtype, device=device) for width in (self.rank, self.rope_dim)
        )
        return LatentCache(c, k_rope, torch.zeros(batch_size, dtype=torch.int64, device=device))
