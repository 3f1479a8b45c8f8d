"""Softmax attention within buckets of a random hash."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.bucket_attention import BucketCache, bucket_attention
from subquad.layers.base import Card, Facts, placement
from subquad.layers.softmax_heads import SoftmaxLayer


class LSHAttention(SoftmaxLayer):
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
    facts = Facts(float32=("rotations",))

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
        self.build_heads(d_model, n_heads=n_heads, head_dim=head_dim, rope_theta=rope_theta, bias=bias)
        if n_buckets < 2 or n_buckets % 2 or window < 1:
            raise UserError(f"LSHAttention: n_buckets must be even and window at least 1; got {n_buckets} and {window}")
        self.n_buckets, self.window = n_buckets, window
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("rotations", torch.randn(self.n_heads, self.head_dim, n_buckets // 2, generator=generator))

    def forward(
        self, x: Float[Tensor, "B T D"], state: BucketCache | None = None, cu_seqlens: Int[Tensor, "M"] | None = None
    ) -> tuple[Float[Tensor, "B T D"], BucketCache | None]:
        q, k, v = self.project(x)
        turned = torch.einsum("bthk,hkn->bthn", k.detach().to(self.rotations.dtype), self.rotations)
        bucket = torch.cat([turned, -turned], -1).argmax(-1)
        q, k = self.place(q, k, state, cu_seqlens)
        o, state = bucket_attention(
            q,
            k,
            v,
            bucket,
            n_buckets=self.n_buckets,
            window=self.window,
            state=state,
            cu_seqlens=cu_seqlens,
        )
        return self.merge(o, cu_seqlens), state

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> BucketCache:
        """Empty rings; max_len does not matter."""
        dtype, device = placement(self, dtype)
        shape = (batch_size, self.n_heads, self.n_buckets, self.window, self.head_dim)
        k = torch.zeros(shape, dtype=dtype, device=device)
        seen = torch.zeros(shape[:3], dtype=torch.int64, device=device)
        return BucketCache(k, torch.zeros_like(k), seen, torch.zeros(batch_size, dtype=torch.int64, device=device))
