"""What the chunk-parallel preparations share: tiles of rows, decayed scores by halves, the triangular inverse.

A program takes one chunk of one head. A vector decay is only ever multiplied: blocks of 1, 2, 4, ... tokens hold their
readers decayed since the block's start and their writers decayed to its end. Two neighbours meet in one product, late
readers with early writers, and become one block by multiplying the late readers and the early writers with the other's
whole decay. So log C multiplications a token stand in for C exponentials: no difference of sums that could cancel,
nothing above one, exact for gates from 0 to -1e4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.configs import config
from subquad.kernels.triton.segments import CHUNK, Segments
from subquad.kernels.triton.tiles import padded, precision


@triton.jit
def tile(base, stride, step, n, c, K, C: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """Addresses and mask of the chunk's first n rows, columns c to c + BLOCK (below K), in the shape `flat` takes.

    A warp holds consecutive tokens, of which a thread has a few in a row: of the exchanges between neighbouring blocks,
    those of small blocks stay within a thread, larger ones take shuffles, and only a row a warp crosses warps.
    """
    LANES: tl.constexpr = max(1, min(256 // BLOCK, C // WARPS))
    EACH: tl.constexpr = C // (WARPS * LANES)
    lane = tl.arange(0, LANES)[:, None, None, None] * EACH
    warp = tl.arange(0, WARPS)[None, :, None, None] * (EACH * LANES)
    each = tl.arange(0, EACH)[None, None, :, None]
    row = lane + warp + each
    col = c + tl.arange(0, BLOCK)[None, None, None, :]
    return base + row * stride + col * step, (row < n) & (col < K)


@triton.jit
def load_rows(base, stride, step, n, c, K, C: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """[C, BLOCK] in float32: n rows, columns c to c + BLOCK, zero elsewhere."""
    at, mask = tile(base, stride, step, n, c, K, C, BLOCK, WARPS)
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    return tl.permute(x, (1, 0, 2, 3)).reshape(C, BLOCK)


@triton.jit
def store_rows(base, stride, n, c, K, x, C: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    at, mask = tile(base, stride, 1, n, c, K, C, BLOCK, WARPS)
    LANES: tl.constexpr = max(1, min(256 // BLOCK, C // WARPS))
    x = x.to(base.dtype.element_ty).reshape(WARPS, LANES, C // (WARPS * LANES), BLOCK)
    tl.store(at, tl.permute(x, (1, 0, 2, 3)), mask=mask)


@triton.jit
def load_matrix(base, C: tl.constexpr):
    """A chunk's matrix [C, C], in float32."""
    row = tl.arange(0, C)
    return tl.load(base + row[:, None] * C + row[None, :]).to(tl.float32)


@triton.jit
def store_matrix(base, x, C: tl.constexpr):
    """A chunk's matrix [C, C]."""
    row = tl.arange(0, C)
    tl.store(base + row[:, None] * C + row[None, :], x.to(base.dtype.element_ty))


@triton.jit
def sibling(x):
    """[R, K]: every row exchanged with its neighbour, 2 i with 2 i + 1."""
    R: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    bits = x.to(tl.int32, bitcast=True).reshape(R // 2, 2, K)
    both = tl.sum(bits, 1, keep_dims=True).to(tl.int64)  # wraps, and back
    return (both - bits.to(tl.int64)).to(tl.int32).to(tl.float32, bitcast=True).reshape(R, K)


@triton.jit
def crossing(row, LEVEL: tl.constexpr):
    """The pairs of a reader in the second of two blocks of 2^LEVEL tokens and a writer in the first."""
    block = row >> LEVEL
    before = tl.where(block % 2 == 1, block - 1, -1)
    return before[:, None] == block[None, :]


@triton.jit
def add_pairs(scores, r, w, row, LEVEL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """scores, with r w^T added for the pairs `crossing`.

    The product accumulates on the scores, so that the compiler cannot put off the sums of all levels, for which it
    would keep every level's product in registers.
    """
    added = tl.dot(r.to(DOT), tl.trans(w.to(DOT)), scores, input_precision=PRECISION)
    if LEVEL >= 3:
        return tl.where(crossing(row, LEVEL), added, scores)
    # In two steps, of which few different conditions need a register: a thread's pairs share their place within 8 x 8.
    near = tl.where(crossing(row % 8, LEVEL), added, scores)
    return tl.where((row >> 3)[:, None] == (row >> 3)[None, :], near, scores)


@triton.jit
def by_halves(
    r1, r2, w1, w2, decay, s11, s12, s21, s22, row,
    C: tl.constexpr, READERS: tl.constexpr, WRITERS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds this block of columns to the scores s[reader][writer] of all pairs, reader after writer, but `neighbours`.

    r, w, decay: [C, BLOCK]; inclusive readers come with their own token's decay. A second reader or writer that is not
    there (READERS, WRITERS) is any tensor, and comes back. Returns the scores, the readers decayed since the chunk's
    start, the writers decayed to its end, and the whole decay, [1, BLOCK].
    """
    BLOCK: tl.constexpr = decay.shape[1]
    LEVELS: tl.constexpr = 6
    tl.static_assert(C == 1 << LEVELS)
    whole = decay  # a row a block
    for LEVEL in tl.static_range(LEVELS):
        if LEVEL > 0:
            s11 = add_pairs(s11, r1, w1, row, LEVEL, DOT, PRECISION)
            if WRITERS == 2:
                s12 = add_pairs(s12, r1, w2, row, LEVEL, DOT, PRECISION)
            if READERS == 2:
                s21 = add_pairs(s21, r2, w1, row, LEVEL, DOT, PRECISION)
                if WRITERS == 2:
                    s22 = add_pairs(s22, r2, w2, row, LEVEL, DOT, PRECISION)
        found = sibling(whole)
        whole = tl.max((whole * found).reshape(C >> (LEVEL + 1), 2, BLOCK), 1)  # the two are equal
        other = tl.broadcast_to(found[:, None, :], (C >> LEVEL, 1 << LEVEL, BLOCK)).reshape(C, BLOCK)
        second = ((row >> LEVEL) % 2 == 1)[:, None]
        r1 = tl.where(second, r1 * other, r1)
        w1 = tl.where(second, w1, w1 * other)
        if READERS == 2:
            r2 = tl.where(second, r2 * other, r2)
        if WRITERS == 2:
            w2 = tl.where(second, w2, w2 * other)
    return s11, s12, s21, s22, r1, r2, w1, w2, whole


@triton.jit
def neighbours(r, w):
    """[C]: each second token's reader times the first one's writer, of the blocks of one token that `by_halves` skips.

    Sums along rows are cheaper than another product, and exact.
    """
    return tl.sum(r * sibling(w), 1)


@triton.jit
def with_near(scores, own, near, row):
    """scores, with the products of tokens with themselves, `own` [C], and with their neighbours."""
    second = crossing(row, 0)
    if own is not None:
        scores += tl.where(row[:, None] == row[None, :], own[:, None], 0.0)
    return scores + tl.where(second, near[:, None], 0.0)


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


@triton.jit
def store_whole(base, c, K, whole):
    """The whole decay [1, BLOCK] of columns from c on."""
    col = c + tl.arange(0, whole.shape[1])[None, :]
    tl.store(base + col, whole, mask=col < K)


def chunk_matrices(like: Tensor, chunks: Segments, H: int) -> Tensor:
    return torch.empty(chunks.count, H, CHUNK, CHUNK, dtype=like.dtype, device=like.device)


def row_tensor(like: Tensor, H: int, K: int) -> Tensor:
    return torch.empty(*like.shape[:2], H, K, dtype=like.dtype, device=like.device)


def launch(kernel: str, like: Tensor, K: int, **widths: int) -> dict[str, object]:
    """The constexpr options and launch parameters of a preparation of keys of K columns."""
    values = config(kernel, device=like.device, K=K, **widths)
    block = min(values.pop("BLOCK_K"), max(padded(K), 64))  # narrower tiles went wrong, as the table says
    return {"K": K, "C": CHUNK, "BLOCK_K": block, "WARPS": values["num_warps"], **precision(like.dtype), **values}
