"""Chunks of the generalised delta rule made ready for the pass over the states, forward or reversed for gradients."""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.launch import kernel
from subquad.kernels.triton.pair_scores import Scores, pair_scores
from subquad.kernels.triton.prepare import chunk_matrices, inverse, launch, load_matrix, row_tensor, store_matrix
from subquad.kernels.triton.segments import Segments, segment_bounds
from subquad.kernels.triton.tiles import dot, load_tile, store_tile


class DplrChunks(NamedTuple):
    """u = Y v + W S; o = P v + Q S; S <- whole * S + E^T v + F^T u: u is what a reads."""

    P: Tensor  # [n, H, C, C]
    Q: Tensor  # [B, T, H, K]
    Y: Tensor  # [n, H, C, C]
    W: Tensor  # [B, T, H, K]
    E: Tensor  # [B, T, H, K]: k decayed to the chunk's end
    F: Tensor  # [B, T, H, K]: b decayed to the chunk's end
    whole: Tensor  # [n, H, K] float32


class DplrChunksReversed(NamedTuple):
    """e = Y do + W dS; dv = P do + Q dS; dS <- whole * dS + E^T do + F^T e: e is the gradient of u."""

    P: Tensor
    Q: Tensor
    Y: Tensor
    W: Tensor
    E: Tensor  # q decayed since the chunk's start
    F: Tensor  # a decayed since the chunk's start, before its own token's decay
    whole: Tensor


def dplr_scores(q: Tensor, k: Tensor, a: Tensor, b: Tensor, g: Tensor, chunks: Segments) -> Scores:
    """What `prepare_dplr` takes, both ways; q, k, a, b: [B, T, H, K]; g: [B, T, H, K] float32, with any strides."""
    return pair_scores(q, a, k, b, g, chunks, exclusive=(False, True))


def prepare_dplr(scores: Scores, chunks: Segments, *, reverse: bool = False) -> DplrChunks | DplrChunksReversed:
    """chunks = cut(q, cu_seqlens, CHUNK). Rows that belong to no sequence stay unwritten."""
    q = scores.r1_since
    (_, T, H, K), n = q.shape, chunks.count
    P, Y = (chunk_matrices(q, chunks, H) for _ in range(2))
    Q, W = (row_tensor(q, H, K) for _ in range(2))
    if reverse:
        found = DplrChunksReversed(P, Q, Y, W, q, scores.r2_since, scores.whole)
        straight, through = scores.w1_until, scores.w2_until
    else:
        found = DplrChunks(P, Q, Y, W, scores.w1_until, scores.w2_until, scores.whole)
        straight, through = q, scores.r2_since
    if n * H:
        prepare_dplr_kernel[(n * H,)](
            scores.pairs, straight, through, P, Q, Y, W, chunks.table, T, chunks.per_sequence, chunks.packed, H,
            REVERSE=reverse, **launch("prepare_dplr", q, K),
        )  # fmt: skip
    return found


@kernel(do_not_specialize=["T", "per_sequence", "packed"])
def prepare_dplr_kernel(
    # q and a decayed since the chunk's start, or reversed k and b decayed to its end
    pairs, straight, crossing, P, Q, Y, W, table, T, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, REVERSE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    b, start, end, _ = segment_bounds(table, n, T, C, per_sequence, packed)
    row = tl.arange(0, C)
    inside = row < end - start
    out = ((b * T + start) * H + h) * K
    here = tl.program_id(0).to(tl.int64)
    pairs += here * (4 * C * C)
    solved = inverse(-load_matrix(pairs + 2 * C * C + C, C, 2 * C), row, PRECISION)
    ak = load_matrix(pairs + 2 * C * C, C, 2 * C)
    fresh = dot(solved, ak, DOT, PRECISION)
    through = dot(load_matrix(pairs + C, C, 2 * C), solved, DOT, PRECISION)
    scores = load_matrix(pairs, C, 2 * C) + dot(through, ak, DOT, PRECISION)
    if REVERSE:
        store_matrix(P + here * C * C, tl.trans(scores), C, C)
        store_matrix(Y + here * C * C, tl.trans(through), C, C)
        first = tl.trans(fresh).to(DOT)
        second = tl.trans(solved).to(DOT)
    else:
        store_matrix(P + here * C * C, scores, C, C)
        store_matrix(Y + here * C * C, fresh, C, C)
        first = through.to(DOT)
        second = solved.to(DOT)
    for c in tl.static_range(0, K, BLOCK_K):
        col = c + tl.arange(0, BLOCK_K)
        x = load_tile(crossing + out, H * K, row, col, inside, K)
        y = load_tile(straight + out, H * K, row, col, inside, K).to(tl.float32)
        store_tile(Q + out, H * K, row, col, inside, y + dot(first, x, DOT, PRECISION), K)
        store_tile(W + out, H * K, row, col, inside, dot(second, x, DOT, PRECISION), K)
