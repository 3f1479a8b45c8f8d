"""Softmax attention within buckets of a random hash."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.bucket_attention import BucketCache, bucket_attention
from subquad.kernels.packing import mask_padding, positions
from subquad.layers.base import Card, Layer, check_divides, default_head_dim, residual_linear, state_dtype
from subquad.layers.rotary import rotary_angles, rotate


class LSHAttention(Layer):
    """Locality-sensitive hashing attention (Reformer: Kitaev et al. 2020, arXiv:2001.04451), causal and streaming.

    A token's bucket is argmax [R k_t, -R k_t] under fixed random rotations R, one draw a head; it reads the last
    `window` tokens of its bucket, itself included. Reformer sorts a whole sequence by bucket and cuts it into chunks,
    so that what comes later moves the cuts and changes earlier outputs; here every bucket has a ring of its own, which
    leaks nothing. As in Reformer query and key of a token share a bucket; unlike there they have projections of their
    own, so that a token is not its own best match. The choice of the bucket has no gradient.

    Cost: train O(T W D) and a sort; decode O(W D) a token; state 2 buckets W D values.

    Arguments
        n_buckets: even. window: W. seed: of the rotations, which are saved with the weights.
        n_heads: H; by default heads of width 64. head_dim: K; d_model / n_heads by default.
        rope_theta: base of the rotary embedding (applied after hashing), None for none. bias: on q, k, v.
    """

    card = Card(
        "Kitaev et al. 2020, arXiv:2001.04451",
        "bucket_attention",
        "O(T W D + T log T)",
        "O(W D)",
        "2 buckets W D",
    )
    discrete = True
    min_width = 2

    def __init__(
        self,
        d_model: int,
        *,
        n_buckets: int = 16,
        window: int = 32,
        n_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        n_heads = n_heads or d_model // (head_dim or default_head_dim(d_model))
        if head_dim is None:
            check_divides(self, "n_heads", n_heads, "d_model", d_model)
        self.n_heads, self.head_dim = n_heads, head_dim or d_model // n_heads
        if n_buckets < 2 or n_buckets % 2 or window < 1:
            raise UserError(f"LSHAttention: n_buckets must be even and window at least 1; got {n_buckets} and {window}")
        if rope_theta is not None and self.head_dim % 2:
            raise UserError(f"LSHAttention: rotary embedding turns pairs, but a head has {self.head_dim} features")
        self.n_buckets, self.window, self.rope_theta = n_buckets, window, rope_theta
        inner = n_heads * self.head_dim
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, inner, bias=bias) for _ in range(3))
        self.o_proj = residual_linear(inner, d_model)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rotations", torch.randn(n_heads, self.head_dim, n_buckets // 2, generator=generator))

    def forward(
        self, x: Float[Tensor, "B T D"], state: BucketCache | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], BucketCache | None]:
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        turned = torch.einsum("bthk,hkn->bthn", k.detach().to(self.rotations.dtype), self.rotations)
        bucket = torch.cat([turned, -turned], -1).argmax(-1)
        if self.rope_theta is not None:
            at = positions(x.shape[1], None if state is None else state.count, cu_seqlens, x.device)
            cos, sin = rotary_angles(at, self.head_dim, self.rope_theta, q.dtype)
            q, k = rotate(torch.cat([q, k], 2), cos, sin).chunk(2, 2)
        o, state = bucket_attention(
            q * self.head_dim**-0.5,
            k,
            v,
            bucket,
            n_buckets=self.n_buckets,
            window=self.window,
            state=state,
            cu_seqlens=cu_seqlens,
        )
        return mask_padding(self.o_proj(o.flatten(-2)), cu_seqlens), state

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> BucketCache:
        """Empty rings; max_len does not matter."""
        device = self.k_proj.weight.device
        shape = (batch_size, self.n_heads, self.n_buckets, self.window, self.head_dim)
        k = torch.zeros(shape, dtype=state_dtype(self, dtype), device=device)
        seen = torch.zeros(shape[:3], dtype=torch.int64, device=device)
        return BucketCache(k, torch.zeros_like(k), seen, torch.zeros(batch_size, dtype=torch.int64, device=device))
