"""mLSTM (xLSTM): a matrix memory with exponential gates."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.packing import mask_padding
from subquad.kernels.running_max import running_max
from subquad.kernels.short_conv import shift
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import (
    Card,
    Facts,
    Layer,
    WideLinear,
    check_divides,
    default_head_dim,
    placement,
    width_of,
)
from subquad.layers.norms import GroupNorm


class MLSTMState(NamedTuple):
    S: Recurrent  # [N, H, K, V]
    z: Recurrent  # [N, H, K]
    m: Recurrent  # [N, H]


class MLSTM(Layer):
    """mLSTM (Beck et al. 2024, arXiv:2405.04517) as in xLSTM-7B (arXiv:2503.13427).

    q, k, v = their projections of x;  i, f = cap(i_proj(x)), log_sigmoid(cap(f_proj(x))),  cap(a) = c tanh(a / c)
    m_t = max(m_{t-1} + f_t, i_t), m_0 = 0: everything below is held divided by exp(m_t), which nothing overflows
    S_t = exp(f_t) S_{t-1} + exp(i_t) k_t v_t^T,  z_t = exp(f_t) z_{t-1} + exp(i_t) k_t
    o_t = S_t^T q_t / max(|z_t . q_t|, 1),  with q / sqrt(K);  y_t = o_proj(sigmoid(out_gate(x)) * norm(o_t))

    Cost: train O(T D K), decode O(D K) a token, state D' K + H (K + 1); D' = expand_v D.

    Arguments
        n_heads: H; by default with values of width 64. expand_qk, expand_v: widths of all keys and of all values over
        d_model. gate_soft_cap: c, which bounds both gates. norm_eps: of the heads' LayerNorm.
    """

    card = Card(
        "Beck et al. 2024, arXiv:2405.04517", "running_max, linear_attention", "O(T D K)", "O(D K)", "D' K + H (K + 1)"
    )
    min_width = 2
    facts = Facts(residual=("o_proj",), keeps_init=("i_proj", "f_proj"))

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        expand_qk: float = 0.5,
        expand_v: float = 1.0,
        gate_soft_cap: float = 15.0,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        keys, values = width_of(self, "expand_qk", expand_qk, d_model), width_of(self, "expand_v", expand_v, d_model)
        n_heads = n_heads or values // default_head_dim(values)
        check_divides(self, "n_heads", n_heads, "expand_qk * d_model", keys)
        check_divides(self, "n_heads", n_heads, "expand_v * d_model", values)
        if gate_soft_cap <= 0:
            raise UserError(f"MLSTM: gate_soft_cap is {gate_soft_cap}; it must be above 0")
        self.n_heads, self.K, self.V, self.cap = n_heads, keys // n_heads, values // n_heads, gate_soft_cap
        self.q_proj = nn.Linear(d_model, keys, bias=False)
        self.k_proj = nn.Linear(d_model, keys, bias=False)
        self.v_proj = nn.Linear(d_model, values, bias=False)
        # Both start from their biases: little is written, and memories last from 20 to 400 tokens.
        self.i_proj = WideLinear(d_model, n_heads)
        self.f_proj = WideLinear(d_model, n_heads)
        for gate, bias in ((self.i_proj, torch.full((n_heads,), -10.0)), (self.f_proj, torch.linspace(3, 6, n_heads))):
            nn.init.zeros_(gate.weight)
            gate.bias = nn.Parameter(bias)
        self.out_gate = nn.Linear(d_model, values, bias=False)
        self.norm = GroupNorm(values, n_heads, eps=norm_eps, affine="weight")
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: MLSTMState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], MLSTMState | None]:
        q, k, v = (p(x).unflatten(-1, (self.n_heads, -1)) for p in (self.q_proj, self.k_proj, self.v_proj))
        wide = accumulator_dtype(x.dtype)
        i, f = (self.cap * torch.tanh(p(x).to(wide) / self.cap) for p in (self.i_proj, self.f_proj))
        f = F.logsigmoid(f)
        S, z, m = state if state is not None else (None, None, None)
        before = None if m is None else m[:, None].clone()  # running_max writes into m
        maximum, m = running_max(f, i, state=m, cu_seqlens=cu_seqlens)
        previous, _ = shift(maximum, state=before, cu_seqlens=cu_seqlens)
        g = (f + previous - maximum).clamp(max=0)  # above 0 by rounding only
        o, carried = linear_attention(
            q * self.K**-0.5,
            k * (i - maximum).exp()[..., None],
            v,
            g,
            normalizer=(-maximum).exp(),
            state=None if S is None else (S, z),
            cu_seqlens=cu_seqlens,
        )
        y = mask_padding(self.o_proj(self.norm(o.flatten(-2), self.out_gate(x), activation="sigmoid")), cu_seqlens)
        return y, None if carried is None else MLSTMState(*carried, m)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> MLSTMState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        S = torch.zeros(batch_size, self.n_heads, self.K, self.V, dtype=accumulator_dtype(dtype), device=device)
        return MLSTMState(S, torch.zeros_like(S[..., 0]), torch.zeros_like(S[..., 0, 0]))
