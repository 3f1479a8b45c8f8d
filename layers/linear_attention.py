"""Kernel attention: softmax replaced by a feature map's inner product."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.packing import mask_padding
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import Card, Layer, available_if, check_divides, default_head_dim, residual_linear, state_dtype
from subquad.layers.feature_maps import FEATURE_MAPS, FeatureMapName


class LinearAttentionState(NamedTuple):
    S: Recurrent  # [N, H, K, V]
    z: Recurrent | tuple[()]  # [N, H, K] with the normaliser


class LinearAttention(Layer):
    """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) with a choice of feature map phi.

    S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  y_t = o_proj(S_t^T phi(q_t) / max(z_t . phi(q_t), eps))

    Cost: train O(T D K), decode O(D K) a token, state D K + H K values (K: width of phi).

    Arguments
        n_heads: H; by default heads of width 64.
        feature_map: "elu" (1 + elu), "relu", "softmax" (over the features of a token) or "taylor" (1 + x + x^2/2 of
            the inner product, Arora et al. 2024; K = 1 + d + d^2 for heads of width d, so give it narrow ones).
        feature_dim: width of q and k per head before the map; d_model / n_heads by default, at most 16 with "taylor".
        normalizer: divide by z . phi(q); without it the output is left as it is.
        causal: False reads the whole sequence (no decoding then).
        eps: the smallest divisor.
    """

    card = Card("Katharopoulos et al. 2020, arXiv:2006.16236", "linear_attention", "O(T D K)", "O(D K)", "D K + H K")

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        feature_map: FeatureMapName = "elu",
        feature_dim: int | None = None,
        normalizer: bool = True,
        causal: bool = True,
        eps: float = 1e-6,
        bias: bool = False,
    ):
        super().__init__()
        n_heads = n_heads or d_model // default_head_dim(d_model)
        check_divides(self, "n_heads", n_heads, "d_model", d_model)
        self.n_heads, self.head_dim = n_heads, d_model // n_heads
        self.feature_dim = feature_dim or (min(16, self.head_dim) if feature_map == "taylor" else self.head_dim)
        self.causal = causal
        self.floor = eps if normalizer else None
        self.feature_map = FEATURE_MAPS[feature_map](self.feature_dim)
        self.q_proj = nn.Linear(d_model, n_heads * self.feature_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_heads * self.feature_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.o_proj = residual_linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: LinearAttentionState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], LinearAttentionState | None]:
        q, k = (self.feature_map(p(x).unflatten(-1, (self.n_heads, -1))) for p in (self.q_proj, self.k_proj))
        v = self.v_proj(x).unflatten(-1, (self.n_heads, -1))
        carried = None if state is None else state.S if self.floor is None else (state.S, state.z)
        o, carried = linear_attention(
            q, k, v, normalizer=self.floor, causal=self.causal, state=carried, cu_seqlens=cu_seqlens
        )
        if carried is not None:
            state = LinearAttentionState(*carried) if self.floor is not None else LinearAttentionState(carried, ())
        return mask_padding(self.o_proj(o.flatten(-2)), cu_seqlens), state

    @available_if(lambda self: self.causal, "causal=False reads the whole sequence at once")
    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> LinearAttentionState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = accumulator_dtype(state_dtype(self, dtype)), self.q_proj.weight.device
        S = torch.zeros(batch_size, self.n_heads, self.feature_map.width, self.head_dim, dtype=dtype, device=device)
        return LinearAttentionState(S, torch.zeros_like(S[..., 0]) if self.floor is not None else ())
