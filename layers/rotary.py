"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated against each other."""

from math import log

import torch
from jaxtyping import Float, Int
from torch import Tensor

from subquad.kernels.state import accumulator_dtype


def rotary_angles(
    at: Int[Tensor, "B T"], dim: int, theta: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "B T R"], Float[Tensor, "B T R"]]:
    """cos and sin of at * theta^(-2r / dim) for r < dim / 2, in at least float32.

    Angles are formed in float64: at position 1,000,000 a float32 angle is off by 0.06.
    """
    rates = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64, device=at.device) * (-log(theta) / dim))
    angles = at[..., None] * rates
    wide = accumulator_dtype(dtype)
    return angles.cos().to(wide), angles.sin().to(wide)


def rotate(x: Float[Tensor, "B T H K"], cos: Tensor, sin: Tensor) -> Float[Tensor, "B T H K"]:
    """x with its first 2R features rotated pairwise, feature r with feature r + R; the rest is left as it is."""
    width = 2 * cos.shape[-1]
    halves = x[..., :width].to(cos.dtype).unflatten(-1, (2, -1))
    cos, sin = cos[..., None, None, :], torch.stack([-sin, sin], -2)[..., None, :, :]
    turned = torch.addcmul(halves * cos, halves.flip(-2), sin).flatten(-2).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], -1)


def pairs_to_halves(x: Float[Tensor, "*B K"]) -> Float[Tensor, "*B K"]:
    """Features of interleaved pairs (0, 1), (2, 3), ... in the order that `rotate` turns them in."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
