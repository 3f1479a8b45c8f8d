"""What the chunk-parallel preparations of the delta rules share: matrices of a chunk, and the triangular inverse."""

import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.configs import config
from subquad.kernels.triton.segments import CHUNK
from subquad.kernels.triton.tiles import columns, operand_size, precision


@triton.jit
def load_matrix(base, C: tl.constexpr, WIDTH: tl.constexpr):
    """[C, C] of a matrix whose rows are WIDTH wide, in float32."""
    row = tl.arange(0, C)
    return tl.load(base + row[:, None] * WIDTH + row[None, :]).to(tl.float32)


@triton.jit
def store_matrix(base, x, C: tl.constexpr, WIDTH: tl.constexpr):
    """x as [C, C] of a matrix whose rows are WIDTH wide."""
    row = tl.arange(0, C)
    tl.store(base + row[:, None] * WIDTH + row[None, :], x.to(base.dtype.element_ty))


@triton.jit
def crossing(row, LEVEL: tl.constexpr):
    """The pairs of a reader in the second of two blocks of 2^LEVEL tokens and a writer in the first."""
    block = row >> LEVEL
    before = tl.where(block % 2 == 1, block - 1, -1)
    return before[:, None] == block[None, :]


@triton.jit
def inverse(A, row, PRECISION: tl.constexpr):
    """(I + A)^-1 of a strictly lower triangular A [64, 64], from blocks of one token to the whole by halves.

    Two neighbours' inverses T1, T2 become the larger block's with -T2 A21 T1 below the diagonal. Up to blocks of 16 on
    the diagonal blocks alone, which a warp each has to itself.
    """
    tl.static_assert(A.shape[0] == 64)
    part = row // 16
    same = part[:, None] == part[None, :]
    blocks = tl.sum(tl.where(same, A, 0.0).reshape(4, 16, 4, 16), 2)
    at = tl.arange(0, 16)
    T = tl.where(at[:, None] == at[None, :], 1.0, 0.0)[None, :, :] - tl.where(crossing(at, 0)[None, :, :], blocks, 0.0)
    for LEVEL in tl.static_range(1, 4):
        below = tl.where(crossing(at, LEVEL)[None, :, :], blocks, 0.0)
        T -= tl.dot(tl.dot(T, below, input_precision=PRECISION), T, input_precision=PRECISION)
    T = tl.broadcast_to(T[:, :, None, :], (4, 16, 4, 16)).reshape(64, 64)
    T = tl.where(same, T, 0.0)
    for LEVEL in tl.static_range(4, 6):
        below = tl.where(crossing(row, LEVEL), A, 0.0)
        T -= tl.dot(tl.dot(T, below, input_precision=PRECISION), T, input_precision=PRECISION)
    return T


def chunk_matrices(like: Tensor, n: int, H: int) -> Tensor:
    """Room for a matrix of each of n chunks of H heads."""
    return like.new_empty(n, H, CHUNK, CHUNK)


def launch(kernel: str, like: Tensor, K: int, **widths: int) -> dict[str, object]:
    """The constexpr options and launch parameters of a preparation of keys of K columns."""
    values = config(kernel, device=like.device, K=K, size=operand_size(like.dtype), **widths)
    values["BLOCK_K"] = columns(K, like.dtype, values["BLOCK_K"])
    return {"K": K, "C": CHUNK, **precision(like.dtype), **values}
