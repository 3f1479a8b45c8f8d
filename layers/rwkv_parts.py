"""What the RWKV layers share: the mix with the token before, low-rank maps, initial values that follow from depth, and
the time mixing with a matrix state.

Initial values are those of the RWKV papers' code: l is the layer's index of L, i a channel of D.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from subquad.kernels.linear_attention import linear_attention
from subquad.kernels.packing import mask_padding
from subquad.kernels.short_conv import shift
from subquad.kernels.state import Recurrent, accumulator_dtype
from subquad.layers.base import (
    Facts,
    Layer,
    check_divides,
    default_head_dim,
    placement,
)
from subquad.layers.norms import GroupNorm

ACTIVATIONS = {"none": nn.Identity, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


class TokenShift(nn.Module):
    """x_t + (x_{t-1} - x_t) * mu_s for each stream s: mu_s [D] is the share of the token before.

    Initially mu_s = 1 - (i/D)^(p_s (1 - l/L)) - lift_s l/(L-1).

    powers: p_s, one a stream. lifts: lift_s, zero by default.
    """

    facts = Facts(no_decay=("mu",))

    def __init__(
        self,
        d_model: int,
        powers: Sequence[float],
        *,
        lifts: Sequence[float] | None = None,
        layer_idx: int = 0,
        n_layers: int = 1,
    ):
        super().__init__()
        channel = torch.arange(d_model) / d_model
        lift = torch.tensor(lifts or [0.0] * len(powers))[:, None] * relative_depth(layer_idx, n_layers)
        mu = 1 - channel ** (torch.tensor(powers)[:, None] * (1 - layer_idx / n_layers)) - lift
        self.mu = nn.Parameter(mu)

    def forward(
        self, x: Tensor, state: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """x [B, T, D], state [N, 1, D] -> (one [B, T, D] a stream, the new state or None)."""
        before, state = shift(x, state=state, cu_seqlens=cu_seqlens)
        return torch.lerp(x, before, self.mu.to(x.dtype)[:, None, None]).unbind(), state


class LowRank(nn.Module):
    """bias + act(x A) B with A [D, R] zero at first, so that it starts from its bias.

    activation: "none", "tanh" or "sigmoid". bias: initial values [width], None for no bias.
    """

    facts = Facts(float32=("bias",), keeps_init=("down", "up"))

    def __init__(
        self,
        d_model: int,
        rank: int,
        width: int,
        *,
        activation: Literal["none", "tanh", "sigmoid"] = "none",
        bias: Tensor | None = None,
    ):
        super().__init__()
        self.down = nn.Linear(d_model, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.down.weight)
        nn.init.uniform_(self.up.weight, -0.01, 0.01)
        self.activation = ACTIVATIONS[activation]()
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        # The bias is added outside of the product, so that autocast leaves it in float32.
        y = self.up(self.activation(self.down(x)))
        return y if self.bias is None else y + self.bias


def relative_depth(layer_idx: int, n_layers: int) -> float:
    """l / (L - 1): 0 in the first layer, 1 in the last."""
    return layer_idx / max(n_layers - 1, 1)


def initial_decay(width: int, layer_idx: int, n_layers: int, low: float = -6.0, span: float = 5.0) -> Tensor:
    """w of the decay exp(-exp(w)): low + span (i/(width-1))^(0.7 + 1.3 l/(L-1))."""
    channel = torch.arange(width) / max(width - 1, 1)
    return low + span * channel ** (0.7 + 1.3 * relative_depth(layer_idx, n_layers))


def initial_bonus(width: int, layer_idx: int, n_layers: int) -> Tensor:
    """u: l/(L-1) (1 - i/(width-1)), plus -0.1, 0 or 0.1 in turn."""
    i = torch.arange(width)
    return relative_depth(layer_idx, n_layers) * (1 - i / max(width - 1, 1)) + ((i + 1) % 3 - 1) * 0.1


class MatrixWKVState(NamedTuple):
    shift: Recurrent  # [N, 1, D]
    S: Recurrent  # [N, H, K, K]


class MatrixWKV(Layer):
    """The time mixing of RWKV-5 and 6, which differ in how they mix tokens and in their decay.

    A layer built on it gives `token_shift`, whose streams are r, k, v, z and whatever `log_decay` takes.
    """

    token_shift: nn.Module
    facts = Facts(no_decay=("bonus",), residual=("o_proj",))

    def __init__(self, d_model: int, head_dim: int | None, layer_idx: int, n_layers: int, norm_eps: float):
        super().__init__()
        self.d_model, self.head_dim = d_model, head_dim or default_head_dim(d_model)
        check_divides(self, "head_dim", self.head_dim, "d_model", d_model)
        self.n_heads = d_model // self.head_dim
        self.r_proj, self.k_proj, self.v_proj, self.z_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        bonus = initial_bonus(d_model, layer_idx, n_layers).unflatten(0, (self.n_heads, -1))
        self.bonus = nn.Parameter(bonus)
        self.norm = GroupNorm(d_model, self.n_heads, eps=norm_eps)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)

    def log_decay(self, *streams: Tensor) -> Tensor:
        """g <= 0, [H, K] or [B, T, H, K], at least float32."""
        raise NotImplementedError

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: MatrixWKVState | None = None,
        cu_seqlens: Int[Tensor, "M"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], MatrixWKVState | None]:
        shift, S = state if state is not None else (None, None)
        (x_r, x_k, x_v, x_z, *rest), shift = self.token_shift(x, shift, cu_seqlens)
        r, k, v = (
            p(t).unflatten(-1, (self.n_heads, -1))
            for p, t in ((self.r_proj, x_r), (self.k_proj, x_k), (self.v_proj, x_v))
        )
        g = self.log_decay(*rest)
        o, S = linear_attention(r, k, v, g, exclusive=True, bonus=self.bonus, state=S, cu_seqlens=cu_seqlens)
        y = self.o_proj(self.norm(o.flatten(-2), self.z_proj(x_z)))
        return mask_padding(y, cu_seqlens), None if state is None else MatrixWKVState(shift, S)

    def init_state(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> MatrixWKVState:
        """The state before any token; its size does not depend on max_len."""
        dtype, device = placement(self, dtype)
        shift = torch.zeros(batch_size, 1, self.d_model, dtype=dtype, device=device)
        shape = (batch_size, self.n_heads, self.head_dim, self.head_dim)
        return MatrixWKVState(shift, torch.zeros(shape, dtype=accumulator_dtype(dtype), device=device))
