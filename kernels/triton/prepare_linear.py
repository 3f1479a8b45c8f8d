"""Chunks of linear attention with a decay for every channel, made ready for the pass over the states."""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.decayed_rows import new_decayed_rows
from subquad.kernels.triton.launch import kernel
from subquad.kernels.triton.pair_scores import Scores, gentle, pair_scores, strong
from subquad.kernels.triton.prepare import chunk_matrices, launch
from subquad.kernels.triton.segments import Segments, segment_bounds
from subquad.kernels.triton.tiles import dot, load_tile, shared


class LinearChunks(NamedTuple):
    """With D_ij the decay from token j to what reader i sees: o = P x + q_s S, S <- whole * S + k_e^T x."""

    P: Tensor  # [n, H, C, C]: q_i . (D_ij * k_j), the readers after their writers, and the bonus
    q_s: Tensor  # [B, T, H, K]: readers decayed since the chunk's start
    k_e: Tensor  # [B, T, H, K]: writers decayed to its end
    whole: Tensor  # [n, H, K] float32
    sums: Tensor  # [n, H, C, K]: see `fixed_point`


def prepare_linear(
    q: Tensor, k: Tensor, g: Tensor, chunks: Segments, *, exclusive: bool = False, bonus: Tensor | None = None
) -> LinearChunks:
    """q, k: [B, T, G, K]; g: [B, T, H, K], with any strides; bonus: [H, K]; chunks = cut(q, cu_seqlens, CHUNK).

    Rows that belong to no sequence stay unwritten.
    """
    H, K = g.shape[2:]
    found = pair_scores(q, None, k, None, g, chunks, exclusive=(exclusive, False), bonus=bonus, dtype=q.dtype)
    if chunks.count * H:
        prepare_linear_kernel[(chunks.count * H,)](
            *shared(q, H), *shared(k, H), None if bonus is None else bonus.float().contiguous(),
            found.rows.r1_since, found.rows.w1_grown, found.rows.sums, found.pairs,
            chunks.table, q.shape[1], chunks.per_sequence, chunks.packed, H,
            EXCLUSIVE=exclusive, **launch("prepare_linear", q, K),
        )  # fmt: skip
    return _chunks(found)


def new_linear_chunks(q: Tensor, k: Tensor, H: int, n: int) -> LinearChunks:
    """Room for n chunks of H heads."""
    return _chunks(Scores(chunk_matrices(q, n, H), new_decayed_rows(q, None, k, None, H, n)))


def _chunks(found: Scores) -> LinearChunks:
    return LinearChunks(found.pairs, found.rows.r1_since, found.rows.w1_until, found.rows.whole, found.rows.sums)


@kernel(do_not_specialize=["T", "per_sequence", "packed"])
def prepare_linear_kernel(
    q, q_b, q_t, q_h, q_share, k, k_b, k_t, k_h, k_share, bonus, q_since, k_grown, sums, pairs,
    table, T, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, EXCLUSIVE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The pairs of all readers that one product serves; those of the others are there."""
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    b, start, end, _ = segment_bounds(table, n, T, C, per_sequence, packed)
    first = start.to(tl.int64)
    row = tl.arange(0, C)
    inside = row < end - start
    out = ((b * T + first) * H + h) * K
    here = tl.program_id(0).to(tl.int64)
    found = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    for c in tl.static_range(0, K, BLOCK_K):
        col = c + tl.arange(0, BLOCK_K)
        reader = load_tile(q_since + out, H * K, row, col, inside, K)
        writer = load_tile(k_grown + out, H * K, row, col, inside, K)
        found += dot(reader, tl.trans(writer), DOT, PRECISION)
        if bonus is not None:
            reader = load_tile(q + b * q_b + first * q_t + (h // q_share) * q_h, q_t, row, col, inside, K)
            writer = load_tile(k + b * k_b + first * k_t + (h // k_share) * k_h, k_t, row, col, inside, K)
            weight = tl.load(bonus + h * K + col, mask=col < K, other=0.0)[None, :]
            own += tl.sum(reader.to(tl.float32) * writer.to(tl.float32) * weight, 1)
    if EXCLUSIVE:
        found = tl.where(row[:, None] > row[None, :], found, 0.0)
        found += tl.where(row[:, None] == row[None, :], own[:, None], 0.0)
    else:
        found = tl.where(row[:, None] >= row[None, :], found, 0.0)
    there = row < 0
    sums += here * (C * K)
    if not gentle(sums, K, C):
        there = strong(sums, row, EXCLUSIVE, K)
    pairs += here * (C * C)
    tl.store(pairs + row[:, None] * C + row[None, :], found.to(pairs.dtype.element_ty), mask=(there == 0)[:, None])
