"""Norms, computed in at least float32 whatever surrounds them, with the sum before and the gate after in one call."""

from typing import Any, Literal

from torch import Tensor, nn, ones, zeros

from subquad.kernels.norm import norm


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean x^2 + eps) * weight over the last dimension, or over each of `n_groups` equal parts of it; without
    the weight where `affine` is false.

    norm(x, z): times act(z), or of x * act(z) where `gate_first`. norm(x, residual=r): (the norm of x + r, x + r).
    """

    def __init__(self, width: int, n_groups: int = 1, *, eps: float = 1e-5, affine: bool = True):
        super().__init__(width, eps=eps, elementwise_affine=affine)
        self.n_groups = n_groups

    def forward(self, x: Tensor, z: Tensor | None = None, **options: Any) -> Any:
        return _norm(x, self.weight, None, z, n_groups=self.n_groups, eps=self.eps, **options)


class GroupNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and variance over each of `n_groups` equal parts of the last
    dimension; `affine` "none" leaves out weight and bias, "weight" the bias. Called as RMSNorm."""

    def __init__(
        self, width: int, n_groups: int = 1, *, eps: float = 1e-5, affine: Literal["none", "weight", "all"] = "all"
    ):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(ones(width)) if affine != "none" else None
        self.bias = nn.Parameter(zeros(width)) if affine == "all" else None

    def forward(self, x: Tensor, z: Tensor | None = None, **options: Any) -> Any:
        return _norm(x, self.weight, self.bias, z, centered=True, n_groups=self.n_groups, eps=self.eps, **options)


def _norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    z: Tensor | None,
    *,
    residual: Tensor | None = None,
    **options: Any,
) -> Any:
    y, total = norm(x, weight, bias, z=z, residual=residual, **options)
    return y if residual is None else (y, total)


def l2_normalize(x: Tensor, *, scale: float = 1.0, eps: float = 1e-6) -> Tensor:
    """scale * x / sqrt(sum x^2 + eps) over the last dimension: keys of (almost) unit length, zero for zero."""
    D = x.shape[-1]
    return norm(x, scale=scale * D**-0.5, eps=eps / D)[0]
