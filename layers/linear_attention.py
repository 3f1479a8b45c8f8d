"""Kernel attention: softmax replaced by a feature map's inner product."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.packing import advance, mask_padding, positions
from subquad.kernels.state import Count, Recurrent, accumulator_dtype
from subquad.layers.base import (
    Card,
    Facts,
    Layer,
    available_if,
    check_divides,
    check_length,
    default_head_dim,
    placement,
)
from subquad.layers.feature_maps import FEATURE_MAPS, FeatureMapName, make_feature_map


class LinearAttentionState(NamedTuple):
    S: Recurrent  # [N, H, K, V]
    z: Recurrent | tuple[()]  # [N, H, K] with the normaliser
    count: Count | tuple[()]  # [N] where the feature map needs positions


class LinearAttention(Layer):
    """Linear attention (Katharopoulos et al. 2020, arXiv:2006.16236) with a choice of feature map phi.

    S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t),  y_t = o_proj(S_t^T phi(q_t) / max(z_t . phi(q_t), eps))

    Cost: train O(T D K), decode O(D K) a token, state D K + H K values (K: width of phi).

    Arguments
        n_heads: H; by default heads of width 64.
        feature_map: for heads of width d
            "elu": 1 + elu(x); K = d.
            "relu"; K = d.
            "softmax": over the features of a token; K = d (Shen et al. 2021, arXiv:1812.01243).
            "taylor": 1 + s + s^2 / 2, s = q . k / sqrt(d); K = 1 + d + d^2 (Arora et al. 2024, arXiv:2402.18668).
            "performer": positive random features; K = n_features (Choromanski et al. 2020, arXiv:2009.14794).
                `layer.feature_map.redraw()` draws new ones, never while a state is in use.
            "cosformer": relu, weighed by cos of the distance; K = 2 d (Qin et al. 2022, arXiv:2202.08791).
            "hedgehog": softmax of (W x, -W x), W learned; K = 2 d (Zhang et al. 2024, arXiv:2402.04347).
        feature_dim: d; d_model / n_heads by default, at most 16 with "taylor".
        n_features: of "performer", 2 d by default.
        horizon: of "cosformer", the longest sequence that it serves, 4096 by default; a longer one is an error.
        normalizer: divide by z . phi(q); without it the output is left as it is.
        causal: False reads the whole sequence (no decoding then).
        eps: the smallest divisor.
    """

    card = Card("Katharopoulos et al. 2020, arXiv:2006.16236", "linear_attention", "O(T D K)", "O(D K)", "D K + H K")
    facts = Facts(residual=("o_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        feature_map: FeatureMapName = "elu",
        feature_dim: int | None = None,
        n_features: int | None = None,
        horizon: int | None = None,
        normalizer: bool = True,
        causal: bool = True,
        eps: float = 1e-6,
        bias: bool = False,
    ):
        super().__init__()
        n_heads = n_heads or d_model // default_head_dim(d_model)
        check_divides(self, "n_heads", n_heads, "d_model", d_model)
        self.n_heads, self.head_dim = n_heads, d_model // n_heads
        self.feature_dim = feature_dim or min(self.head_dim, FEATURE_MAPS[feature_map].widest or self.head_dim)
        self.causal = causal
        self.floor = eps if normalizer else None
        self.feature_map = make_feature_map(
            feature_map, self.feature_dim, n_heads, n_features=n_features, horizon=horizon
        )
        self.max_len = self.feature_map.max_len
        self.q_proj = nn.Linear(d_model, n_heads * self.feature_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_heads * self.feature_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=bias)
        self.o_proj = nn.Linear(d_model, d_model, bias=bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: LinearAttentionState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], LinearAttentionState | None]:
        count = None if state is None or not self.feature_map.needs_positions else state.count
        check_length(self, x.shape[1], count, cu_seqlens)
        at = positions(x.shape[1], count, cu_seqlens, x.device) if self.feature_map.needs_positions else None
        q, k, v = (p(x).unflatten(-1, (self.n_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.feature_map(q, k, at)
        carried = None if state is None else state.S if self.floor is None else (state.S, state.z)
        o, carried = linear_attention(
            q, k, v, normalizer=self.floor, causal=self.causal, state=carried, cu_seqlens=cu_seqlens
        )
        if carried is not None:
            S, z = (carried, ()) if self.floor is None else carried
            state = LinearAttentionState(S, z, () if count is None else advance(count, x.shape[1], cu_seqlens))
        return mask_padding(self.o_proj(o.flatten(-2)), cu_seqlens), state

    @available_if(lambda self: self.causal, "causal=False reads the whole sequence at once")
    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> LinearAttentionState:
        """The state before any token; its size does not depend on max_len."""
        check_length(self, max_len)
        dtype, device = placement(self, dtype)
        shape = (batch_size, self.n_heads, self.feature_map.width, self.head_dim)
        S = torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device)
        count = torch.zeros(batch_size, dtype=torch.int64, device=device) if self.feature_map.needs_positions else ()
        return LinearAttentionState(S, torch.zeros_like(S[..., 0]) if self.floor is not None else (), count)
