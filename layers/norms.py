"""Norms, computed in at least float32 whatever surrounds them, with the sum before and the gate after in one call."""

from typing import Literal

from torch import Tensor, nn, ones, zeros

from subquad.kernels.norm import norm


class _Norm(nn.Module):
    """Over each of `n_groups` equal parts of the last dimension.

    norm(x, z): times act(z), or of x * act(z) where `gate_first`. norm(x, residual=r): (the norm of x + r, x + r).
    """

    centered: bool

    def __init__(self, width: int, n_groups: int, eps: float, *, weight: bool, bias: bool):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(ones(width)) if weight else None
        self.bias = nn.Parameter(zeros(width)) if bias else None

    def forward(
        self,
        x: Tensor,
        z: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        activation: Literal["silu", "sigmoid"] = "silu",
        gate_first: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        y, total = norm(
            x,
            self.weight,
            self.bias,
            z=z,
            residual=residual,
            centered=self.centered,
            n_groups=self.n_groups,
            activation=activation,
            gate_first=gate_first,
            eps=self.eps,
        )
        return y if total is None else (y, total)

    def extra_repr(self) -> str:
        return f"n_groups={self.n_groups}, eps={self.eps}"


class RMSNorm(_Norm):
    """x / sqrt(mean x^2 + eps) * weight over the last dimension, or over each of `n_groups` equal parts of it; without
    the weight where `affine` is false."""

    centered = False

    def __init__(self, width: int, n_groups: int = 1, *, eps: float = 1e-5, affine: bool = True):
        super().__init__(width, n_groups, eps, weight=affine, bias=False)


class GroupNorm(_Norm):
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and variance over each of `n_groups` equal parts of the last
    dimension; `affine` "none" leaves out weight and bias, "weight" the bias."""

    centered = True

    def __init__(
        self, width: int, n_groups: int = 1, *, eps: float = 1e-5, affine: Literal["none", "weight", "all"] = "all"
    ):
        super().__init__(width, n_groups, eps, weight=affine != "none", bias=affine == "all")


def l2_normalize(x: Tensor, *, scale: float = 1.0, eps: float = 1e-6) -> Tensor:
    """scale * x / sqrt(sum x^2 + eps) over the last dimension: keys of (almost) unit length, zero for zero."""
    D = x.shape[-1]
    return norm(x, scale=scale * D**-0.5, eps=eps / D)[0]
