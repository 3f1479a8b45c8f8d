"""What layers of softmax attention share: projections to heads, rotary positions, the projection back."""

from typing import Any

import torch
from torch import Tensor, nn

from subquad.errors import UserError
from subquad.kernels.packing import mask_padding
from subquad.layers.base import Facts, Layer, check_divides, default_head_dim, placement, width_of
from subquad.layers.rotary import check_theta, rotary_angles, rotate


class SoftmaxLayer(Layer):
    """Base of the softmax family. H query heads and G key/value heads of width K; rotary angles follow from
    state.count."""

    min_width = 2
    facts = Facts(residual=("o_proj",))

    def build_heads(
        self,
        d_model: int,
        *,
        n_heads: int | None,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope_theta: float | None,
        rope_fraction: float = 1.0,
        bias: bool,
        out_bias: bool = False,
    ) -> None:
        """Make q_proj, k_proj, v_proj, o_proj; by default heads of width 64, each with its own key and value."""
        n_heads = n_heads or d_model // (head_dim or default_head_dim(d_model))
        if head_dim is None:
            check_divides(self, "n_heads", n_heads, "d_model", d_model)
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        check_divides(self, "n_kv_heads", n_kv_heads, "n_heads", n_heads)
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim or d_model // n_heads
        check_theta(self, rope_theta)
        self.rope_theta = rope_theta
        self.rotary_dim = width_of(self, "rope_fraction", rope_fraction, self.head_dim, least=0)
        if rope_theta is not None and self.rotary_dim % 2:
            name, odd = type(self).__name__, self.rotary_dim
            raise UserError(f"{name}: rotary embedding turns pairs, but {odd} features of a head are an odd number")
        # Not as class attributes: those would hide a module that a layer assigns later.
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        self.q_proj = nn.Linear(d_model, n_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(n_heads * self.head_dim, d_model, bias=out_bias)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K] and k, v [B, T, G, K], normed where the layer has norms, without positions."""
        heads = (-1, self.head_dim)
        q, k, v = (proj(x).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def place(self, q: Tensor, k: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
        """q and k turned to their positions, q divided by sqrt(K)."""
        if self.rope_theta is not None:
            count = None if state is None else state.count
            cos, sin = rotary_angles(q, count, cu_seqlens, self.rotary_dim, self.rope_theta)
            turned = rotate(torch.cat([q, k], 2), cos, sin)
            q, k = turned[:, :, : self.n_heads], turned[:, :, self.n_heads :]
        return q * self.head_dim**-0.5, k

    def heads(self, x: Tensor, state: Any, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v for the op."""
        q, k, v = self.project(x)
        return (*self.place(q, k, state, cu_seqlens), v)

    def empty_slots(self, batch_size: int, dtype: torch.dtype | None, *lengths: int) -> tuple[Tensor, ...]:
        """For each length slots for keys or values, [N, length, G, K], all zero, then the count [N] of no tokens."""
        (dtype, device), shape = placement(self, dtype), (self.n_kv_heads, self.head_dim)
        slots = [torch.zeros(batch_size, length, *shape, dtype=dtype, device=device) for length in lengths]
        return *slots, torch.zeros(batch_size, dtype=torch.int64, device=device)

    def merge(self, o: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        """The op's output [B, T, H, K] back in the residual stream."""
        return mask_padding(self.o_proj(o.flatten(-2)), cu_seqlens)
