"""Gated DeltaNet: the delta rule with a scalar decay a head."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.delta_rule import delta_rule
from subquad.kernels.packing import mask_padding
from subquad.kernels.short_conv import short_conv
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import (
    Card,
    Layer,
    check_divides,
    conv_weight,
    default_head_dim,
    dt_bias,
    no_weight_decay,
    residual_linear,
    silu_gated,
    state_dtype,
)
from subquad.layers.norms import RMSNorm, l2_normalize


class GatedDeltaNetState(NamedTuple):
    conv: Recurrent  # [N, W-1, 2 G K + H V]
    S: Recurrent  # [N, H, K, V]


class GatedDeltaNet(Layer):
    """Gated DeltaNet (Yang et al. 2024, arXiv:2412.06464).

    q, k, v = silu(conv(qkv_proj(x)));  q, k of unit length, q / sqrt(K);  beta = sigmoid(b_proj(x))
    g = -exp(A_log) softplus(a_proj(x) + dt_bias)
    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,  o_t = S_t^T q_t
    y_t = o_proj(norm(o_t) * silu(z_proj(x_t)))

    Cost: train O(T H K V), decode O(H K V) a token, state H K V + (W - 1) (2 G K + H V) values.

    Arguments
        n_heads: H heads of v and of the state; head_dim: K, by default 64 or what of it divides d_model.
        n_key_heads: G heads of q and k, dividing H; by default H. expand_v: V / K.
        d_conv: W, width of the convolution. conv_bias: on it.
        negative_eigenvalues: beta in (0, 2), so that the state can also flip sign (Grazzi et al. 2024,
        arXiv:2411.12537). A_range, dt_min, dt_max: ranges of the initial decay rates and step sizes.
    """

    card = Card(
        "Yang et al. 2024, arXiv:2412.06464", "delta_rule", "O(T H K V)", "O(H K V)", "H K V + (W - 1) (2 G K + H V)"
    )

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None = None,
        head_dim: int | None = None,
        n_key_heads: int | None = None,
        expand_v: float = 1.0,
        d_conv: int = 4,
        conv_bias: bool = False,
        negative_eigenvalues: bool = False,
        A_range: tuple[float, float] = (1.0, 16.0),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if head_dim is None:
            if n_heads is not None:
                check_divides(self, "n_heads", n_heads, "d_model", d_model)
            head_dim = default_head_dim(d_model) if n_heads is None else d_model // n_heads
        n_heads = n_heads or max(1, d_model // head_dim)
        n_key_heads = n_key_heads or n_heads
        check_divides(self, "n_key_heads", n_key_heads, "n_heads", n_heads)
        self.n_heads, self.n_key_heads = n_heads, n_key_heads
        self.K, self.V = head_dim, int(head_dim * expand_v)
        self.beta_max = 2.0 if negative_eigenvalues else 1.0
        self.sizes = (n_key_heads * self.K, n_key_heads * self.K, n_heads * self.V)
        self.qkv_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv_weight, self.conv_bias = conv_weight(sum(self.sizes), d_conv, conv_bias)
        self.a_proj = nn.Linear(d_model, n_heads, bias=False)
        self.b_proj = nn.Linear(d_model, n_heads, bias=False)
        self.z_proj = nn.Linear(d_model, n_heads * self.V, bias=False)
        self.A_log = no_weight_decay(nn.Parameter(torch.empty(n_heads).uniform_(*A_range).log()))
        self.dt_bias = no_weight_decay(nn.Parameter(dt_bias(n_heads, dt_min, dt_max)))
        self.norm = RMSNorm(self.V, eps=norm_eps)
        self.o_proj = residual_linear(n_heads * self.V, d_model)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: GatedDeltaNetState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], GatedDeltaNetState | None]:
        conv, S = state if state is not None else (None, None)
        qkv, conv = short_conv(
            self.qkv_proj(x), self.conv_weight, self.conv_bias, activation="silu", state=conv, cu_seqlens=cu_seqlens
        )
        q, k, v = qkv.split(self.sizes, -1)
        wide = accumulator_dtype(v.dtype)
        q, k = (l2_normalize(t.unflatten(-1, (self.n_key_heads, self.K)).to(wide)) for t in (q, k))
        v = v.unflatten(-1, (self.n_heads, self.V))
        beta = self.beta_max * self.b_proj(x).to(wide).sigmoid()
        g = -self.A_log.to(wide).exp() * F.softplus(self.a_proj(x).to(wide) + self.dt_bias.to(wide))
        o, S = delta_rule(q * self.K**-0.5, k, v, beta, g, state=S, cu_seqlens=cu_seqlens)
        z = self.z_proj(x).unflatten(-1, (self.n_heads, self.V))
        y = self.o_proj(silu_gated(self.norm(o), z).flatten(-2))
        return mask_padding(y, cu_seqlens), None if state is None else GatedDeltaNetState(conv, S)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> GatedDeltaNetState:
        """The state before any token; its size does not depend on max_len."""
        dtype, weight = state_dtype(self, dtype), self.conv_weight
        conv = torch.zeros(batch_size, weight.shape[1] - 1, weight.shape[0], dtype=dtype, device=weight.device)
        S = torch.zeros(batch_size, self.n_heads, self.K, self.V, dtype=accumulator_dtype(dtype), device=weight.device)
        return GatedDeltaNetState(conv, S)
