"""Root mean square and layer norm, with what stands around them: the sum into the residual stream and the gate."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.state import accumulator_dtype

WIDEST = 16384  # values of a group that the Triton form holds at once


def norm(
    x: Float[Tensor, "*S D"],
    weight: Float[Tensor, "D"] | None = None,
    bias: Float[Tensor, "D"] | None = None,
    *,
    z: Float[Tensor, "*S D"] | None = None,
    residual: Float[Tensor, "*S D"] | None = None,
    centered: bool = False,
    n_groups: int = 1,
    activation: Literal["silu", "sigmoid"] = "silu",
    gate_first: bool = False,
    scale: float = 1.0,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "*S D"], Float[Tensor, "*S D"] | None]:
    """y = norm(x + residual) * act(z), or norm((x + residual) * act(z)) where `gate_first`; each part may be absent.

    norm(u) = scale * u / sqrt(mean u^2 + eps) * weight + bias over each of `n_groups` equal parts of the last dimension
    (Zhang and Sennrich 2019); centered: of u - mean u (Ba et al. 2016). activation: of the gate z.
    Returns (y, x + residual or None), the sum rounded to its dtype before it is read; everything between is computed in
    float32 or wider. y has the sum's dtype, or the wider one of that and z's.
    Cost: O(D) a token; fused, every tensor is read or written once.
    """
    shape, D = x.shape, x.shape[-1]
    if n_groups != 1 and (n_groups < 1 or D % n_groups):
        raise UserError(f"norm: n_groups {n_groups} does not divide the width {D}")
    if activation not in ("silu", "sigmoid"):
        raise UserError(f"norm: activation is 'silu' or 'sigmoid', not {activation!r}")
    if weight is not None and weight.shape != (D,):
        raise _misfit("weight", weight, (D,), shape)
    if bias is not None and bias.shape != (D,):
        raise _misfit("bias", bias, (D,), shape)
    if z is not None and z.shape != shape:
        raise _misfit("z", z, shape, shape)
    if residual is not None and residual.shape != shape:
        raise _misfit("residual", residual, shape, shape)
    unfit = f"groups of {D // n_groups} values, above {WIDEST}" if WIDEST * n_groups < D else None
    form = pick("norm", _FORMS, x, unfit)
    y, total = form(x, weight, bias, z, residual, centered, n_groups, activation == "silu", gate_first, scale, eps)
    return y, None if residual is None else total


def _misfit(name: str, given: Tensor, wanted: Sequence[int], shape: Sequence[int]) -> UserError:
    return UserError(f"norm: {name} is {tuple(wanted)} for x {tuple(shape)}; got {tuple(given.shape)}")


def _in_full(normalized):
    """A form in plain torch around a norm of tensors in the accumulator's dtype."""

    def form(x, weight, bias, z, residual, centered, n_groups, silu, gate_first, scale, eps):
        total = x if residual is None else x + residual
        wide = accumulator_dtype(total.dtype)
        u, weight, bias = _in(wide, total), _in(wide, weight), _in(wide, bias)
        if z is None:
            return _in(total.dtype, normalized(u, weight, bias, centered, n_groups, scale, eps)), total
        gate = F.silu(z.to(wide)) if silu else z.to(wide).sigmoid()
        if gate_first:
            y = normalized(u * gate, weight, bias, centered, n_groups, scale, eps)
        else:
            y = normalized(u, weight, bias, centered, n_groups, scale, eps) * gate
        return y.to(dtypes(total, z)[1]), total

    return form


def dtypes(x: Tensor, z: Tensor | None, residual: Tensor | None = None) -> tuple[torch.dtype, torch.dtype]:
    """Of the sum and of the output."""
    total = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return total, total if z is None else torch.promote_types(total, z.dtype)


def _in(dtype, x):
    return x if x is None or x.dtype == dtype else x.to(dtype)  # a call that changes nothing takes as long as a sum


def _naive(u, weight, bias, centered, n_groups, scale, eps):
    u = u.unflatten(-1, (n_groups, -1))
    if centered:
        u = u - u.mean(-1, keepdim=True)
    y = (scale * u / (u.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(-2)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _torch(u, weight, bias, centered, n_groups, scale, eps):
    if n_groups == 1 and scale == 1 and (centered or bias is None):
        return _parts(u, weight, bias, centered, eps)
    # The scale inside the root: x / sqrt(m / s^2 + e / s^2) takes no call of its own.
    y = _parts(u if n_groups == 1 else u.unflatten(-1, (n_groups, -1)), None, None, centered, eps, scale)
    y = y if n_groups == 1 else y.flatten(-2)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def _parts(u, weight, bias, centered, eps, scale=1.0):
    """Of the whole last dimension; torch's own norms where it has fused ones, which on a CPU is layer norm."""
    shape = u.shape[-1:]
    if centered or u.device.type != "cpu" or torch.compiler.is_compiling():
        y = torch.layer_norm(u, shape, weight, bias, eps) if centered else torch.rms_norm(u, shape, weight, eps)
        return y if scale == 1 else scale * y
    # For a root mean square torch makes eight calls where these are five, and a decoded token is calls.
    length = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    if length.requires_grad:  # from 1.8e19 on its square overflows: the slope of the root is 0 then, and 0 * inf is NaN
        length = length.clamp(max=torch.finfo(u.dtype).max)
    squared = torch.addcmul(_constant(eps / scale**2, u.dtype), length, length, value=1 / (shape[0] * scale**2))
    y = u * squared.rsqrt()
    return y if weight is None else y * weight


@lru_cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # the next caller may record gradients
        return torch.tensor(value, dtype=dtype, device="cpu")


def _triton(*arguments):
    from subquad.kernels.triton.norm import form

    return form(*arguments)


_FORMS = register("norm", naive=_in_full(_naive), torch=_in_full(_torch), triton=_triton)
