"""Norms, computed in at least float32 whatever surrounds them."""

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
        wide = accumulator_dtype(x.dtype)
        if self.n_groups == 1:
            # At one token a cast that does nothing counts.
            if x.dtype == wide and (self.weight is None or self.weight.dtype == wide):
                return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
            weight = None if self.weight is None else self.weight.to(wide)
            return F.rms_norm(x.to(wide), self.normalized_shape, weight, self.eps).to(x.dtype)
        parts = x.to(wide).unflatten(-1, (self.n_groups, -1))
        y = F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        return (y if self.weight is None else y * self.weight.to(wide)).to(x.dtype)


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
