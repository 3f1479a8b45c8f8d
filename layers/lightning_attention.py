"""Lightning attention (MiniMax): linear attention with one constant decay a head that weakens with depth."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.packing import mask_padding
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import Card, Facts, Layer, check_divides, default_head_dim, placement
from subquad.layers.norms import RMSNorm


class LightningAttentionState(NamedTuple):
    S: Recurrent  # [N, H, K, K]


class LightningAttention(Layer):
    """Lightning attention-2 (Qin et al. 2024, arXiv:2401.04658) as in MiniMax-01 (arXiv:2501.08313).

    q, k, v = silu(qkv_proj(x));  S_t = exp(-s_h) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t
    y_t = o_proj(norm(o_t) * sigmoid(z_proj(x)));  s_h = 2^(-8 (h+1) / H) (1 - l / (L - 1) + 1e-5)
    for head h = 0, 1, ... in layer l of L.

    Cost: train O(T D K), decode O(D K) a token, state D K; K = head_dim.

    Arguments
        n_heads: H; by default heads of width 64. head_dim: K; d_model / n_heads by default.
        layer_idx, n_layers: l and L. norm_eps: of the RMSNorm over all heads together.
    """

    card = Card("Qin et al. 2024, arXiv:2401.04658", "linear_attention", "O(T D K)", "O(D K)", "D K")
    facts = Facts(residual=("o_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        layer_idx: int = 0,
        n_layers: int = 1,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        n_heads = n_heads or d_model // (head_dim or default_head_dim(d_model))
        if head_dim is None:
            check_divides(self, "n_heads", n_heads, "d_model", d_model)
        self.n_heads, self.head_dim = n_heads, head_dim or d_model // n_heads
        self.strength = 1 - layer_idx / (n_layers - 1 + 1e-5) + 1e-5
        inner = n_heads * self.head_dim
        self.qkv_proj = nn.Linear(d_model, 3 * inner, bias=False)  # rows: q, k, v of head 0, then of head 1, ...
        self.z_proj = nn.Linear(d_model, inner, bias=False)
        self.norm = RMSNorm(inner, eps=norm_eps)
        self.o_proj = nn.Linear(inner, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: LightningAttentionState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], LightningAttentionState | None]:
        q, k, v = F.silu(self.qkv_proj(x)).unflatten(-1, (self.n_heads, 3 * self.head_dim)).chunk(3, -1)
        S = None if state is None else state.S
        o, S = linear_attention(q, k, v, self.log_decay(q), state=S, cu_seqlens=cu_seqlens)
        y = self.o_proj(self.norm(o.flatten(-2), self.z_proj(x), activation="sigmoid"))
        return mask_padding(y, cu_seqlens), None if state is None else LightningAttentionState(S)

    def log_decay(self, like: Tensor) -> Tensor:
        """g [H]. Formed anew in each call: as a buffer it would be rounded wherever the layer is cast to bf16."""
        head = torch.arange(1, self.n_heads + 1, device=like.device, dtype=accumulator_dtype(like.dtype))
        return -self.strength * torch.exp2(-8 / self.n_heads * head)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> LightningAttentionState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim)
        return LightningAttentionState(torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device))
