"""Log decays of every channel, cumulated within chunks in fixed point, so that their differences are exact.

A token's decay since another one is the exponential of a difference of sums. In float32 such a difference loses what
the sums are large by: over gates that mix -0.01 and -1e4 it is off by 4e-4. So the sums are integers here, in units of
2^-20 powers of two, and the exponential of a difference is right to 7e-7, and to what float32 gates lose as powers of
two. A gate below -31 powers of two counts as -31, a decay of 5e-10, so that the sum over a chunk fits 32 bits.
"""

import triton
import triton.language as tl

from subquad.kernels.triton.segments import CHUNK
from subquad.kernels.triton.tiles import exp2

UNIT = tl.constexpr(2.0**-20)
LOWEST = tl.constexpr(-31.0)
assert CHUNK * 31 * 2**20 < 2**31


@triton.jit
def load_sums(sums, row, col, K: tl.constexpr):
    """[rows, columns], zero before row 0."""
    mask = (row >= 0)[:, None] & (col < K)[None, :]
    return tl.load(sums + row[:, None] * K + col[None, :], mask=mask, other=0)


@triton.jit
def decay_between(one, other):
    """The decay between tokens with these sums, whichever is later."""
    return exp2(-tl.abs((one - other).to(tl.float32)) * UNIT)


@triton.jit
def boundary(row, level):
    """The last token of the first of the two blocks of 2^level tokens between which `row` is: they meet there."""
    return (((row >> level) | 1) << level) - 1


@triton.jit
def load_stacked(one, one_t, two, two_t, row, upper, inside, col, WIDTH: tl.constexpr):
    """Rows of two matrices, of the second (zero where there is none) where `upper`; zero where not inside.

    Two loads of which a mask leaves one: choosing between addresses would load element by element.
    """
    column = (col < WIDTH)[None, :]
    at = row[:, None] * one_t + col[None, :]
    x = tl.load(one + at, mask=(inside & (upper == 0))[:, None] & column, other=0.0)
    if two is not None:
        at = row[:, None] * two_t + col[None, :]
        x = tl.where(upper[:, None], tl.load(two + at, mask=(inside & upper)[:, None] & column, other=0.0), x)
    return x


@triton.jit
def store_stacked(one, two, stride, row, upper, inside, col, value, WIDTH: tl.constexpr):
    """The reverse, of two contiguous matrices, with rows `stride` apart."""
    column = (col < WIDTH)[None, :]
    at = row[:, None] * stride + col[None, :]
    value = value.to(one.dtype.element_ty)
    tl.store(one + at, value, mask=(inside & (upper == 0))[:, None] & column)
    if two is not None:
        tl.store(two + at, value, mask=(inside & upper)[:, None] & column)
