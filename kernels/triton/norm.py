"""The Triton form of `norm`: rows in registers, all read or written once, the sums for the weights as in short_conv.

Rows are taken as [M, G, N]: G groups, or G heads where the heads of M tokens have no one stride. The backward pass
normalises again instead of keeping what a row was divided by.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.norm import dtypes
from subquad.kernels.operators import operator
from subquad.kernels.triton.launch import cdiv, kernel, power_of_2
from subquad.kernels.triton.tape import taped
from subquad.kernels.triton.tiles import rows

VALUES = 2048  # of a tile, 16 a thread; rows that are longer take more threads
PROGRAMS = 1024  # of a backward pass, over which the rows are divided


@triton.jit
def _load(x, x_m, x_g, m, g, col, M, N: tl.constexpr):
    at = x + m.to(tl.int64)[:, None] * x_m + g.to(tl.int64) * x_g + col[None, :]
    return tl.load(at, mask=(m < M)[:, None] & (col < N)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(y, value, m, g, col, M, G, N: tl.constexpr):
    at = y + (m.to(tl.int64)[:, None] * G + g) * N + col[None, :]
    tl.store(at, value.to(y.dtype.element_ty), mask=(m < M)[:, None] & (col < N)[None, :])


@triton.jit
def _vector(weight, w_g, g, col, N: tl.constexpr):
    """A group's weights or biases as a row."""
    return tl.load(weight + g * w_g + col, mask=col < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _activated(z, SILU: tl.constexpr):
    return z * tl.sigmoid(z) if SILU else tl.sigmoid(z)


@triton.jit
def _slope(z, SILU: tl.constexpr):
    s = tl.sigmoid(z)
    return s * (1 + z * (1 - s)) if SILU else s * (1 - s)


@triton.jit
def _unit(u, m, col, M, N: tl.constexpr, CENTERED: tl.constexpr, EPS: tl.constexpr):
    """u / sqrt(mean u^2 + eps), and what each row was multiplied by."""
    if CENTERED:
        u = tl.where((col < N)[None, :], u - (tl.sum(u, 1) / N)[:, None], 0.0)
    inverse = tl.where(m < M, tl.rsqrt(tl.sum(u * u, 1) / N + EPS), 0.0)[:, None]
    return u * inverse, inverse


@kernel(do_not_specialize=["M", "G"])
def _forward(
    x, x_m, x_g, z, z_m, z_g, residual, r_m, r_g, weight, bias, w_g, total, y, M, G,
    N: tl.constexpr, CENTERED: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(0) % G
    m = tl.program_id(0) // G * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, BLOCK)
    u = _load(x, x_m, x_g, m, g, col, M, N)
    if residual is not None:
        u += _load(residual, r_m, r_g, m, g, col, M, N)
        u = u.to(total.dtype.element_ty).to(tl.float32)
        _store(total, u, m, g, col, M, G, N)
    if z is not None:
        gate = _activated(_load(z, z_m, z_g, m, g, col, M, N), SILU)
        if FIRST:
            u *= gate
    value, _ = _unit(u, m, col, M, N, CENTERED, EPS)
    value *= SCALE
    if weight is not None:
        value *= _vector(weight, w_g, g, col, N)
    if bias is not None:
        value += _vector(bias, w_g, g, col, N)
    if z is not None and not FIRST:
        value *= gate
    _store(y, value, m, g, col, M, G, N)


@kernel(do_not_specialize=["M", "G", "stretch"])
def _backward(
    x, x_m, x_g, z, z_m, z_g, dy, dy_m, dy_g, dtotal, dt_m, dt_g, weight, bias, w_g, dx, dz, partial, M, G, stretch,
    N: tl.constexpr, CENTERED: tl.constexpr, SILU: tl.constexpr, FIRST: tl.constexpr, SCALE: tl.constexpr,
    EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, dz, and these rows' share of the gradients of weight and bias: partial [programs, G, 2, N]."""
    g = tl.program_id(0) % G
    first = tl.program_id(0) // G * stretch
    stop = tl.minimum(first + stretch, M)
    col = tl.arange(0, BLOCK)
    weights = tl.full([1, BLOCK], SCALE, tl.float32)
    if weight is not None:
        weights *= _vector(weight, w_g, g, col, N)
    of_weight = tl.zeros([ROWS, BLOCK], tl.float32)
    of_bias = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, stop, ROWS):
        m = start + tl.arange(0, ROWS)
        given = _load(x, x_m, x_g, m, g, col, stop, N)
        dvalue = _load(dy, dy_m, dy_g, m, g, col, stop, N)
        u = given
        if z is not None:
            before = _load(z, z_m, z_g, m, g, col, stop, N)
            gate = _activated(before, SILU)
            if FIRST:
                u *= gate
        unit, inverse = _unit(u, m, col, stop, N, CENTERED, EPS)
        if z is not None and not FIRST:
            value = unit * weights
            if bias is not None:
                value += _vector(bias, w_g, g, col, N)
            _store(dz, dvalue * value * _slope(before, SILU), m, g, col, stop, G, N)
            dvalue *= gate
        if weight is not None:
            of_weight += dvalue * unit
        if bias is not None:
            of_bias += dvalue
        dunit = dvalue * weights
        du = dunit - (tl.sum(dunit * unit, 1) / N)[:, None] * unit
        if CENTERED:
            du -= (tl.sum(dunit, 1) / N)[:, None]
        du *= inverse
        if z is not None and FIRST:
            _store(dz, du * given * _slope(before, SILU), m, g, col, stop, G, N)
            du *= gate
        if dtotal is not None:
            du += _load(dtotal, dt_m, dt_g, m, g, col, stop, N)
        _store(dx, du, m, g, col, stop, G, N)
    if partial is not None:
        partial += tl.program_id(0).to(tl.int64) * 2 * N
        tl.store(partial + col, tl.sum(of_weight, 0) * SCALE, mask=col < N)
        tl.store(partial + N + col, tl.sum(of_bias, 0), mask=col < N)


def form(x, weight, bias, z, residual, centered, n_groups, silu, gate_first, scale, eps):
    return _norm(x, weight, bias, z, residual, centered, n_groups, silu, gate_first, float(scale), eps)


@operator("norm_triton")
@taped
def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None, residual: Tensor | None, centered: bool,
    n_groups: int, silu: bool, gate_first: bool, scale: float, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, x + residual, empty where there is none)"""
    y, total = _outputs(x, z, residual)
    if y.numel():
        (x, z, residual), M, G, N = _in_rows((x, z, residual), n_groups)
        shape, weight, bias = _tile(N), *_contiguous(weight, bias)
        _forward[(cdiv(M, shape["ROWS"]) * G,)](
            *x, *z, *residual, weight, bias, N if n_groups > 1 else 0, None if residual[0] is None else total, y, M, G,
            N=N, CENTERED=centered, SILU=silu, FIRST=gate_first, SCALE=scale, EPS=eps, **shape,
        )  # fmt: skip
    return y, total


@_norm.register_fake
def _(x, weight, bias, z, residual, *options):
    return _outputs(x, z, residual)


def _outputs(x, z, residual):
    of_total, of_y = dtypes(x, z, residual)
    return x.new_empty(x.shape, dtype=of_y), x.new_empty(0 if residual is None else x.shape, dtype=of_total)


@operator("norm_triton_backward")
@taped
def _norm_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, z: Tensor | None,
    centered: bool, n_groups: int, silu: bool, gate_first: bool, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x (the sum, where there was one), weight, bias and z; empty where there is none."""
    dx, dweight, dbias, dz = _gradients(x, weight, bias, z)
    partial = None
    if x.numel():
        (taken, z, dy, dtotal), M, G, N = _in_rows((x, z, dy, dtotal), n_groups)
        shape, weight, bias = _tile(N), *_contiguous(weight, bias)
        share = cdiv(M, cdiv(PROGRAMS, G))
        stretch = cdiv(share, shape["ROWS"]) * shape["ROWS"]
        n_programs = cdiv(M, stretch)
        if weight is not None or bias is not None:
            partial = torch.empty(n_programs, G, 2, N, dtype=torch.float32, device=x.device)
        _backward[(n_programs * G,)](
            *taken, *z, *dy, *dtotal, weight, bias, N if n_groups > 1 else 0, dx, None if z[0] is None else dz, partial,
            M, G, stretch,
            N=N, CENTERED=centered, SILU=silu, FIRST=gate_first, SCALE=scale, EPS=eps, **shape,
        )  # fmt: skip
    sums = None if partial is None else partial.sum(0 if n_groups > 1 else (0, 1))
    for of, part in ((dweight, 0), (dbias, 1)):
        if of.numel():
            of.copy_(torch.zeros_like(of) if sums is None else sums.select(-2, part).flatten())
    return dx, dweight, dbias, dz


@_norm_backward.register_fake
def _(dy, dtotal, x, weight, bias, z, *options):
    return _gradients(x, weight, bias, z)


def _gradients(x, *others):
    """Room for the gradient of each; nothing where there is none."""
    return x.new_empty(x.shape), *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in others)


def _in_rows(tensors, n_groups):
    """Each as (tensor, stride of M, stride of G), None as (None, 0, 0); and M, G, N."""
    x = tensors[0]
    tensors = [None if t is None else rows(t) for t in tensors]
    strides = [None if t is None else _stride(t, 1) for t in tensors]
    if n_groups == 1 and x.dim() > 3 and any(s is None for s, t in zip(strides, tensors, strict=True) if t is not None):
        strides = [None if t is None else _stride(t, 2) for t in tensors]
        G, N = x.shape[-2:]
        steps = [0 if t is None else t.stride(-2) for t in tensors]
    else:
        G, N = n_groups, x.shape[-1] // n_groups
        steps = [0 if t is None or n_groups == 1 else N for t in tensors]
    found = []
    for t, stride, step in zip(tensors, strides, steps, strict=True):
        if t is not None and stride is None:
            t, stride, step = t.contiguous(), G * N, 0 if G == 1 else N
        found.append((t, stride or 0, step))
    return found, x.numel() // (G * N), G, N


def _stride(x: Tensor, kept: int) -> int | None:
    """The one stride of all but the last `kept` dimensions; None where they have none."""
    lead = [(size, stride) for size, stride in zip(x.shape[:-kept], x.stride(), strict=False) if size != 1]
    if any(outer != size * inner for (_, outer), (size, inner) in pairwise(lead)):
        return None
    return lead[-1][1] if lead else x.shape[-kept:].numel()


def _contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.contiguous() for t in tensors)


def _tile(N: int) -> dict[str, int]:
    block = power_of_2(N)
    n_rows = max(1, VALUES // block)
    return {"ROWS": n_rows, "BLOCK": block, "num_warps": min(16, max(4, block // 512))}


def _save(ctx, inputs, output):
    x, weight, bias, z, residual, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(x if residual is None else output[1], weight, bias, z)


def _differentiate(ctx, dy, dtotal):
    x, weight, bias, z = ctx.saved_tensors
    of_x, of_residual = ctx.dtypes
    if dy is None:
        dy = torch.zeros_like(x)
    found = _norm_backward(dy, dtotal if of_residual else None, x, weight, bias, z, *ctx.options)
    dx, *rest = (g if t is not None else None for g, t in zip(found, (x, weight, bias, z), strict=True))
    return dx.to(of_x), *rest, dx.to(of_residual) if of_residual else None, *(None for _ in ctx.options)


_norm.register_autograd(_differentiate, setup_context=_save)
_norm_backward.once_differentiable("norm")
