"""Norms, computed in at least float32 whatever surrounds them."""

from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from subquad.kernels.state import accumulator_dtype


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps) * weight over the last dimension, or over each of `n_groups` equal parts of it; without
    the weight where `affine` is false."""

    def __init__(self, width: int, n_groups: int = 1, *, eps: float = 1e-5, affine: bool = True):
        super().__init__(width, eps=eps, elementwise_affine=affine)
        self.n_groups = n_groups

    def forward(self, x: Tensor) -> Tensor:
        wide, weight = accumulator_dtype(x.dtype), self.weight
        if weight is not None:
            weight = weight.to(wide)
        if self.n_groups == 1:
            return rms_norm(x.to(wide), weight, self.eps).to(x.dtype)
        y = rms_norm(x.to(wide).unflatten(-1, (self.n_groups, -1)), None, self.eps).flatten(-2)
        return (y if weight is None else y * weight).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean x^2 + eps) * weight over the last dimension."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    # torch has no fused form here: it makes eight calls where these are five, and a decoded token is calls.
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    y = x * torch.addcmul(_constant(eps, x.dtype), length, length, value=1 / x.shape[-1]).rsqrt()
    return y if weight is None else y * weight


@lru_cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # the next caller may record gradients
        return torch.tensor(value, dtype=dtype, device="cpu")


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum x^2 + eps) over the last dimension: keys of (almost) unit length, zero for zero."""
    return x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()


class GroupNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and variance over each of `n_groups` equal parts of the last
    dimension; `affine` "none" leaves out weight and bias, "weight" the bias."""

    def __init__(
        self, width: int, n_groups: int, *, eps: float = 1e-5, affine: Literal["none", "weight", "all"] = "all"
    ):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(width)) if affine != "none" else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine == "all" else None

    def forward(self, x: Tensor) -> Tensor:
        wide = accumulator_dtype(x.dtype)
        parts = x.to(wide).unflatten(-1, (self.n_groups, -1))
        y = F.layer_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        if self.weight is not None:
            y = y * self.weight.to(wide)
        return (y if self.bias is None else y + self.bias.to(wide)).to(x.dtype)
