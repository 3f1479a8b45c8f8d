"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated against each other."""

from functools import lru_cache
from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.packing import host_counts, positions
from subquad.kernels.state import accumulator_dtype


def check_theta(owner: object, theta: float | None) -> None:
    if theta is not None and theta <= 0:
        raise UserError(f"{type(owner).__name__}: rope_theta is {theta}; it must be above 0, or None for no rotation")


def rotary_angles(
    x: Float[Tensor, "B T *K"],
    count: Int[Tensor, "N"] | None,
    cu_seqlens: Int[Tensor, "M"] | None,
    dim: int,
    theta: float,
) -> tuple[Float[Tensor, "B2 T 1 R"], Float[Tensor, "B2 T 1 R"]]:
    """cos and sin of p * theta^(-2r / dim), r < dim / 2, at each position p of the new tokens x, for `rotate`.

    In at least float32, over both halves of the `dim` rotated features; sin is negative in the first. `count`: tokens
    before the new ones.
    """
    wide = accumulator_dtype(x.dtype)
    if x.shape[1] == 1 and cu_seqlens is None:
        before = host_counts(count)
        if before and min(before) == max(before):
            return _one_position(before[0], dim, theta, wide)
    return _angles(positions(x.shape[1], count, cu_seqlens, x.device), dim, theta, wide)


def _angles(at: Tensor, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Angles are formed in float64: at position 1,000,000 a float32 angle is off by 0.06."""
    rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64, device=at.device) * (-log(theta) / max(dim, 1)))
    angles = at[..., None, None] * rates
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


@lru_cache(maxsize=8)  # every layer of a model asks for the same position in turn
def _one_position(position: int, dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # the next caller may record gradients
        return _angles(torch.tensor([[position]], device="cpu"), dim, theta, dtype)


def rotate(x: Float[Tensor, "B T H K"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T H K"]:
    """x with its first R features rotated pairwise, feature r with feature r + R / 2; the rest is left as it is."""
    width = cos.shape[-1]
    part = (x if width == x.shape[-1] else x[..., :width]).to(cos.dtype)
    swapped = torch.cat([part[..., width // 2 :], part[..., : width // 2]], -1)
    turned = torch.addcmul(part * cos, swapped, sin).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


def pairs_to_halves(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
    """Features of interleaved pairs (0, 1), (2, 3), ... in the order that `rotate` turns them in."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
