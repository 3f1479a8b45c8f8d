"""RWKV-7, Goose: a generalised delta rule with vector gates and a rate of its own for every channel."""

from math import exp
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.dplr_rule import dplr_rule
from subquad.kernels.packing import mask_padding
from subquad.kernels.state import accumulator_dtype
from subquad.layers.base import (
    Card,
    Facts,
    Layer,
    check_divides,
    default_head_dim,
    placement,
)
from subquad.layers.norms import GroupNorm, l2_normalize
from subquad.layers.rwkv_parts import LowRank, MatrixWKVState, TokenShift, relative_depth

FIRST_VALUE = "rwkv7_first_value"  # its key in `shared`


class RWKV7(Layer):
    """RWKV-7 (Peng et al. 2025, arXiv:2503.14456). x_s is x mixed with the token before, for each stream s.

    r, k = r_proj(x_r), k_proj(x_k);  v = v_proj(x_v) + (v_first - v_proj(x_v)) * sigmoid(mix_proj(x_v))
    g = -exp(-1/2) sigmoid(w_proj(x_w));  a = sigmoid(a_proj(x_a));  u = unit(k * k_unit)
    k' = k * (1 + (a - 1) * k_rate)
    S_t = (diag(exp(g_t)) - (a_t * u_t) u_t^T) S_{t-1} + k'_t v_t^T,  o_t = S_t^T r_t
    y_t = o_proj((norm(o_t) + (r_t . (bonus * k'_t)) v_t) * z_proj(x_z))

    v_first is the first layer's v of the same token. It travels in `shared`; without that dict a layer acts as the
    first, which mixes nothing in.

    Cost: train O(T D K), decode O(D K) a token, state D K + D values.

    Arguments
        head_dim: K = V, 64 or what of it divides d_model.
        decay_rank, rate_rank, value_rank, gate_rank: of the low-rank maps w, a, mix and z; by default the paper's for
            this d_model.
        first_layer: index of the layer that makes v_first, where it is not the model's first block.
        layer_idx, n_layers: the layer's place, given by the model; initial values follow from it.
    """

    card = Card("Peng et al. 2025, arXiv:2503.14456", "dplr_rule", "O(T D K)", "O(D K)", "D K + D")
    facts = Facts(no_decay=("k_unit", "k_rate", "bonus"), residual=("o_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        head_dim: int | None = None,
        decay_rank: int | None = None,
        rate_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        first_layer: int = 0,
        layer_idx: int = 0,
        n_layers: int = 1,
        norm_eps: float = 64e-5,
    ):
        super().__init__()
        self.d_model, self.head_dim = d_model, head_dim or default_head_dim(d_model)
        check_divides(self, "head_dim", self.head_dim, "d_model", d_model)
        self.n_heads, self.is_first, self.layer_idx = d_model // self.head_dim, layer_idx == first_layer, layer_idx
        depth, channel = relative_depth(layer_idx, n_layers), torch.arange(d_model) / max(d_model - 1, 1)
        powers = (0.2, 0.7, 0.7, 0.2, 0.9, 0.9)  # r, k, v, z, w, a
        self.token_shift = TokenShift(d_model, powers, layer_idx=layer_idx, n_layers=n_layers)
        self.r_proj, self.k_proj, self.v_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(3))
        half = d_model**0.5
        speed = -6.5 + 5 * channel ** (0.85 + depth**0.5)
        self.w_proj = LowRank(d_model, decay_rank or _rank(1.8 * half), d_model, activation="tanh", bias=speed)
        self.a_proj = LowRank(d_model, rate_rank or _rank(1.8 * half), d_model, bias=torch.zeros(d_model))
        self.z_proj = LowRank(d_model, gate_rank or _rank(0.6 * d_model**0.8), d_model, activation="sigmoid")
        if not self.is_first:
            self.mix_proj = LowRank(d_model, value_rank or _rank(1.3 * half), d_model, bias=torch.ones(d_model))
        self.k_unit = nn.Parameter(torch.full((d_model,), 0.85))
        self.k_rate = nn.Parameter(torch.ones(d_model))
        self.bonus = nn.Parameter(torch.zeros(self.n_heads, self.head_dim))
        self.norm = GroupNorm(d_model, self.n_heads, eps=norm_eps)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: MatrixWKVState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
        shared: dict[str, Any] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], MatrixWKVState | None]:
        shift, S = state if state is not None else (None, None)
        (x_r, x_k, x_v, x_z, x_w, x_a), shift = self.token_shift(x, shift, cu_seqlens)
        r, k, wide = self.r_proj(x_r), self.k_proj(x_k), accumulator_dtype(x.dtype)
        v = self._value(x_v, shared)
        g = -exp(-0.5) * self.w_proj(x_w).to(wide).sigmoid()
        a = self.a_proj(x_a).to(wide).sigmoid()
        unit = l2_normalize(self._heads(k.to(wide) * self.k_unit), eps=1e-12)
        k = k * (1 + (a - 1) * self.k_rate)
        r, k, v, g, a = (self._heads(t) for t in (r, k, v, g, a))
        o, S = dplr_rule(r, k, v, unit, -a * unit, g, state=S, cu_seqlens=cu_seqlens)
        own = (r * self.bonus * k).sum(-1, keepdim=True) * v
        o = (self.norm(o.flatten(-2)) + own.flatten(-2)) * self.z_proj(x_z)
        y = mask_padding(self.o_proj(o.to(x.dtype)), cu_seqlens)
        return y, None if state is None else MatrixWKVState(shift, S)

    def _value(self, x: Tensor, shared: dict[str, Any] | None) -> Tensor:
        v = self.v_proj(x)
        if shared is None:
            return v
        if self.is_first:
            shared[FIRST_VALUE] = v
            return v
        if FIRST_VALUE not in shared:
            raise UserError(
                f"RWKV7 in block {self.layer_idx} finds no first value; set first_layer to that of the first RWKV7"
            )
        return v + (shared[FIRST_VALUE] - v) * self.mix_proj(x).sigmoid().to(v.dtype)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.n_heads, self.head_dim))

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> MatrixWKVState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        shift = torch.zeros(batch_size, 1, self.d_model, dtype=dtype, device=device)
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim)
        return MatrixWKVState(shift, torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device))


def _rank(size: float) -> int:
    """The nearest multiple of 32."""
    return max(32, 32 * round(size / 32))
