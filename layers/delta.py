"""What the layers of the delta rule share: projections with a short convolution, gates, the output norm, the state."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.packing import mask_padding
from subquad.kernels.short_conv import short_conv
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import (
    Facts,
    Layer,
    check_divides,
    conv_weight,
    default_head_dim,
    dt_bias,
    placement,
    width_of,
)
from subquad.layers.norms import RMSNorm, l2_normalize


class DeltaState(NamedTuple):
    conv: Recurrent  # [N, W-1, G K + R (G K + H V)]
    S: Recurrent  # [N, H, K, V]


class DeltaLayer(Layer):
    """Projections to q, k, v (R of k and v a token) and write strengths around one call of delta_rule."""

    facts = Facts(no_decay=("conv_weight", "A_log", "dt_bias"), float32=("A_log", "dt_bias"), residual=("o_proj",))

    def __init__(
        self,
        d_model: int,
        *,
        n_heads: int | None,
        head_dim: int | None,
        n_key_heads: int | None = None,
        n_factors: int = 1,
        expand_v: float,
        d_conv: int,
        conv_bias: bool,
        negative_eigenvalues: bool,
        norm_eps: float,
    ):
        super().__init__()
        if head_dim is None:
            if n_heads is not None:
                check_divides(self, "n_heads", n_heads, "d_model", d_model)
            head_dim = default_head_dim(d_model) if n_heads is None else d_model // n_heads
        n_heads = n_heads or max(1, d_model // head_dim)
        n_key_heads = n_key_heads or n_heads
        check_divides(self, "n_key_heads", n_key_heads, "n_heads", n_heads)
        self.n_heads, self.n_key_heads, self.n_factors = n_heads, n_key_heads, n_factors
        self.K, self.V = head_dim, width_of(self, "expand_v", expand_v, head_dim)
        self.beta_max = 2.0 if negative_eigenvalues else 1.0
        self.sizes = (n_key_heads * self.K, n_factors * n_key_heads * self.K, n_factors * n_heads * self.V)
        self.qkv_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.conv_weight, self.conv_bias = conv_weight(sum(self.sizes), d_conv, conv_bias)
        self.b_proj = nn.Linear(d_model, n_factors * n_heads, bias=False)
        self.norm = RMSNorm(self.V, eps=norm_eps)
        self.o_proj = nn.Linear(n_heads * self.V, d_model, bias=False)

    def add_decay(self, width: int, A_range: tuple[float, float], dt_min: float, dt_max: float) -> None:
        """Parameters of `log_decay` for `width` gates a token."""
        self.A_log = nn.Parameter(torch.empty(self.n_heads).uniform_(*A_range).log())
        self.dt_bias = nn.Parameter(dt_bias(width, dt_min, dt_max))

    def qkv(
        self, x: Tensor, conv: Tensor | None, cu_seqlens: Tensor | None, activation: str | None = "silu"
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [B, T, G, K], k [B, T, R, G, K], v [B, T, R, H, V] after the convolution (no axis R for one factor), and
        its state."""
        rows, conv = short_conv(
            self.qkv_proj(x), self.conv_weight, self.conv_bias, activation=activation, state=conv, cu_seqlens=cu_seqlens
        )
        q, k, v = rows.split(self.sizes, -1)
        q = q.unflatten(-1, (self.n_key_heads, self.K))
        return q, self._factors(k, self.n_key_heads, self.K), self._factors(v, self.n_heads, self.V), conv

    def _factors(self, x: Tensor, *shape: int) -> Tensor:
        return x.unflatten(-1, shape if self.n_factors == 1 else (self.n_factors, *shape))

    def unit(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Queries of length 1 / sqrt(K) and keys of unit length."""
        return l2_normalize(q, scale=self.K**-0.5), l2_normalize(k)

    def beta(self, x: Tensor) -> Tensor:
        """Write strengths [B, T, H], or [B, T, R, H]."""
        strength = self.beta_max * self.b_proj(x).to(accumulator_dtype(x.dtype)).sigmoid()
        return strength if self.n_factors == 1 else strength.unflatten(-1, (self.n_factors, self.n_heads))

    def log_decay(self, a: Tensor) -> Tensor:
        """-exp(A_log) softplus(a + dt_bias) for a [B, T, H] or [B, T, H, K]."""
        wide = accumulator_dtype(a.dtype)
        rate, bias = -self.A_log.to(wide).exp(), self.dt_bias.to(wide)
        if a.dim() == 4:
            rate, bias = rate[:, None], bias.view(a.shape[2:])
        return rate * F.softplus(a.to(wide) + bias)

    def output(
        self, o: Tensor, z: Tensor | None, cu_seqlens: Tensor | None, activation: Literal["silu", "sigmoid"] = "silu"
    ) -> Tensor:
        """o_proj(norm(o) * act(z)), zero in padding; z: [B, T, H V], or None for no gate."""
        o = self.norm(o, None if z is None else z.view_as(o), activation=activation).flatten(-2)
        return mask_padding(self.o_proj(o), cu_seqlens)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> DeltaState:
        """The state before any token; its size does not depend on max_len."""
        (dtype, device), (width, taps) = placement(self, dtype), self.conv_weight.shape
        conv = torch.zeros(batch_size, taps - 1, width, dtype=dtype, device=device)
        S = torch.zeros(batch_size, self.n_heads, self.K, self.V, dtype=accumulator_dtype(dtype), device=device)
        return DeltaState(conv, S)
