"""Gated linear attention (GLA): a data-dependent decay a key channel."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.packing import mask_padding
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import Card, Facts, Layer, check_divides, placement, width_of
from subquad.layers.norms import RMSNorm


class GatedLinearAttentionState(NamedTuple):
    S: Recurrent  # [N, H, K, V]


class GatedLinearAttention(Layer):
    """Gated linear attention (Yang et al. 2023, arXiv:2312.06635).

    q, k, v, z = their projections of x;  g_t = log_sigmoid(gate_up(gate_down(x))) / tau
    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T,  o_t = S_t^T q_t / sqrt(K),  y_t = o_proj(norm(o_t) * silu(z_t))

    Cost: train O(T D K), decode O(D K) a token, state H K V.

    Arguments
        n_heads: H. expand_k, expand_v: widths of all keys and of all values over d_model. gate_rank: width between
        gate_down and gate_up. gate_logit_normalizer: tau, which keeps decays near one. norm_eps: of the heads' RMSNorm.
    """

    card = Card("Yang et al. 2023, arXiv:2312.06635", "linear_attention", "O(T D K)", "O(D K)", "H K V")
    min_width = 4
    facts = Facts(residual=("o_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        gate_logit_normalizer: float = 16.0,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        keys, values = width_of(self, "expand_k", expand_k, d_model), width_of(self, "expand_v", expand_v, d_model)
        check_divides(self, "n_heads", n_heads, "expand_k * d_model", keys)
        check_divides(self, "n_heads", n_heads, "expand_v * d_model", values)
        self.n_heads, self.K, self.V = n_heads, keys // n_heads, values // n_heads
        self.tau = gate_logit_normalizer
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        self.gate_down = nn.Linear(d_model, gate_rank, bias=False)
        self.gate_up = nn.Linear(gate_rank, keys)
        self.z_proj = nn.Linear(d_model, values, bias=False)
        self.norm = RMSNorm(self.V, eps=norm_eps)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: GatedLinearAttentionState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], GatedLinearAttentionState | None]:
        q, k, v, gate, z = (
            t.unflatten(-1, (self.n_heads, -1))
            for t in (self.q_proj(x), self.k_proj(x), self.v_proj(x), self.gate_up(self.gate_down(x)), self.z_proj(x))
        )
        g = F.logsigmoid(gate.to(accumulator_dtype(gate.dtype))) / self.tau
        S = None if state is None else state.S
        o, S = linear_attention(q * self.K**-0.5, k, v, g, state=S, cu_seqlens=cu_seqlens)
        y = self.o_proj(self.norm(o, z).flatten(-2))
        return mask_padding(y, cu_seqlens), None if state is None else GatedLinearAttentionState(S)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> GatedLinearAttentionState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        S = torch.zeros(batch_size, self.n_heads, self.K, self.V, dtype=accumulator_dtype(dtype), device=device)
        return GatedLinearAttentionState(S)
