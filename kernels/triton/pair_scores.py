"""What readers and writers within a chunk have to do with each other under a decay for every channel.

Until a channel has decayed by more than 2^-MILDEST since the chunk's start, all pairs
s_ij = sum_c r_ic exp(G_ic - G_jc) w_jc are one product of `decayed_rows`, which those make who need them. For other
readers the exponential has to split about a token between i and j: for blocks of 1, 2, 4, ... tokens, late readers
decayed since the boundary to the block before meet early writers decayed to it. Each row is a reader or a writer on a
level, so one tile X holds both, and X X^T all that meet there: log2 C products. (Yang et al. 2023, arXiv:2312.06635,
cut chunks once more for the same reason.) Programs look through the chunks for those that have such readers. What a
reader gets depends on tokens before it alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.configs import config
from subquad.kernels.triton.decayed_rows import MILDEST, DecayedRows, decayed_rows
from subquad.kernels.triton.fixed_point import boundary, decay_between, load_stacked, load_sums
from subquad.kernels.triton.launch import kernel
from subquad.kernels.triton.segments import CHUNK, Segments, segment_bounds
from subquad.kernels.triton.tiles import columns, operand_size, precision, shared

LOOKING = 528  # programs that look for chunks which one product does not serve: starting one a chunk takes longer
AT_ONCE = tl.constexpr(16)
LEAST = tl.constexpr(-MILDEST * 2**20)  # as sums have it


class Scores(NamedTuple):
    """`pairs` [n, H, readers, writers]: of one reader and one writer [C, C], of two the second follow the first in
    rows or columns; of readers which one product does not serve, the rest is unwritten. Zero where the reader is before
    the writer. An inclusive reader meets its own token undecayed, and an exclusive one not at all, but for the bonus.
    """

    pairs: Tensor
    rows: DecayedRows


def pair_scores(
    r1: Tensor, r2: Tensor | None, w1: Tensor, w2: Tensor | None, g: Tensor, chunks: Segments, *,
    exclusive: tuple[bool, bool] = (False, True), bonus: Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> Scores:  # fmt: skip
    """As `decayed_rows` takes them; bonus: [H, K] or None; `dtype` is that of the pairs.

    A second writer needs a second reader.
    """
    H, K = g.shape[2:]
    n, readers, writers = chunks.count, 1 + (r2 is not None), 1 + (w2 is not None)
    pairs = r1.new_empty(n, H, readers * CHUNK, writers * CHUNK, dtype=dtype)
    rows = decayed_rows(r1, r2, w1, w2, g, chunks, exclusive=exclusive)
    if n * H:
        values = config(
            "pair_scores", device=r1.device, size=operand_size(r1.dtype), K=K, readers=readers, writers=writers
        )  # fmt: skip
        values["BLOCK_K"] = columns(K, r1.dtype, values["BLOCK_K"])
        pair_scores_kernel[(min(n * H, LOOKING),)](
            *(argument for x in (r1, r2, w1, w2) for argument in shared(x, H)),
            None if bonus is None else bonus.float().contiguous(), rows.sums, pairs,
            chunks.table, r1.shape[1], chunks.per_sequence, chunks.packed, H, n * H,
            K=K, C=CHUNK, LEVELS=CHUNK.bit_length() - 1, READERS=readers, WRITERS=writers,
            EXCLUSIVE1=exclusive[0], EXCLUSIVE2=exclusive[1], **precision(r1.dtype), **values,
        )  # fmt: skip
    return Scores(pairs, rows)


@triton.jit
def gentle(sums, K: tl.constexpr, C: tl.constexpr):
    """Whether one product serves all readers of a chunk."""
    col = tl.arange(0, triton.next_power_of_2(K))
    return tl.min(tl.load(sums + (C - 1) * K + col, mask=col < K, other=0), 0) >= LEAST


@triton.jit
def least_sums(sums, places, n_places, K: tl.constexpr, C: tl.constexpr):
    """Of each of these chunks, zero past the last: below LEAST where one product does not serve all readers."""
    col = tl.arange(0, triton.next_power_of_2(K))
    at = sums + places.to(tl.int64)[:, None] * (C * K) + (C - 1) * K + col[None, :]
    return tl.min(tl.load(at, mask=(places < n_places)[:, None] & (col < K)[None, :], other=0), 1)


@triton.jit
def strong(sums, row, exclusive, K: tl.constexpr):
    """For each reader, whether one product does not serve it: its pairs are those of `pair_scores`."""
    found = tl.zeros([row.shape[0]], tl.int32)
    for c in range(0, K, 16):
        seen = load_sums(sums, row - exclusive, c + tl.arange(0, 16), K)
        found |= tl.max((seen < LEAST).to(tl.int32), 1)
    return found > 0


@triton.jit
def _scores(
    place,
    r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
    w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
    bonus, sums, pairs, table, T, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, READERS: tl.constexpr,
    WRITERS: tl.constexpr, EXCLUSIVE1: tl.constexpr, EXCLUSIVE2: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = place // H
    h = place % H
    b, start, end, _ = segment_bounds(table, n, T, C, per_sequence, packed)
    count = end - start
    first = start.to(tl.int64)
    here = place.to(tl.int64)
    sums += here * (C * K)
    r1 += b * r1_b + first * r1_t + (h // r1_share) * r1_h
    w1 += b * w1_b + first * w1_t + (h // w1_share) * w1_h
    if READERS == 2:
        r2 += b * r2_b + first * r2_t + (h // r2_share) * r2_h
    if WRITERS == 2:
        w2 += b * w2_b + first * w2_t + (h // w2_share) * w2_h

    # Lines are the tokens of the first reader or writer and then those of the second.
    LINES: tl.constexpr = READERS * C
    COLUMNS: tl.constexpr = WRITERS * C
    line = tl.arange(0, LINES)
    row = line % C
    upper = line >= C
    exclusive = tl.where(upper, EXCLUSIVE2, EXCLUSIVE1).to(tl.int32)  # readers see no decay of their own token
    column = tl.arange(0, COLUMNS)
    token = column % C
    beyond = column >= C
    own1 = tl.zeros([LINES], tl.float32)
    own2 = tl.zeros([LINES], tl.float32)
    scores = tl.zeros([LINES, COLUMNS], tl.float32)
    for c in tl.static_range(0, K, BLOCK_K):
        col = c + tl.arange(0, BLOCK_K)
        reader = load_stacked(r1, r1_t, r2, r2_t, row, upper, row < count, col, K)
        writer = load_stacked(w1, w1_t, w2, w2_t, token, beyond, token < count, col, K)
        for level in range(LEVELS):
            second = (row >> level) % 2 == 1
            factor = decay_between(
                load_sums(sums, row - tl.where(second, exclusive, 0), col, K),
                load_sums(sums, boundary(row, level), col, K),
            )
            if READERS == WRITERS:
                x = (tl.where(second[:, None], reader, writer).to(tl.float32) * factor).to(DOT)
                y = x
            else:
                x = (tl.where(second[:, None], reader, 0.0).to(tl.float32) * factor).to(DOT)
                factor = decay_between(load_sums(sums, token, col, K), load_sums(sums, boundary(token, level), col, K))
                y = (writer.to(tl.float32) * factor).to(DOT)
            added = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
            before = tl.where(second, (row >> level) - 1, -1)
            scores = tl.where(before[:, None] == (token >> level)[None, :], added, scores)

        # Each token with itself.
        reader = reader.to(tl.float32)
        mine = load_stacked(w1, w1_t, None, 0, row, row < 0, row < count, col, K).to(tl.float32)
        if bonus is not None:
            own1 += tl.sum(reader * mine * tl.load(bonus + h * K + col, mask=col < K, other=0.0)[None, :], 1)
        elif not EXCLUSIVE1:
            own1 += tl.sum(reader * mine, 1)
            if WRITERS == 2:
                mine = load_stacked(w2, w2_t, None, 0, row, row < 0, row < count, col, K).to(tl.float32)
                own2 += tl.sum(reader * mine, 1)
    scores += tl.where((line[:, None] == column[None, :]) & (line < C)[:, None], own1[:, None], 0.0)
    if WRITERS == 2:
        scores += tl.where(line[:, None] + C == column[None, :], own2[:, None], 0.0)
    pairs += here * (LINES * COLUMNS)
    due = strong(sums, row, exclusive, K)[:, None]
    tl.store(pairs + line[:, None] * COLUMNS + column[None, :], scores.to(pairs.dtype.element_ty), mask=due)


@kernel(do_not_specialize=["T", "per_sequence", "packed", "n_places"])
def pair_scores_kernel(
    r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
    w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
    bonus, sums, pairs, table, T, per_sequence, packed, H, n_places,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, READERS: tl.constexpr,
    WRITERS: tl.constexpr, EXCLUSIVE1: tl.constexpr, EXCLUSIVE2: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A place is a chunk of a head; a program looks through many, some at once, as each look takes a while."""
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    turn = tl.arange(0, AT_ONCE)
    for first in range(0, tl.cdiv(n_places - program, programs), AT_ONCE):
        least = least_sums(sums, program + (first + turn) * programs, n_places, K, C)
        if tl.min(least, 0) < LEAST:
            for i in range(AT_ONCE):
                if tl.min(tl.where(turn == i, least, 0), 0) < LEAST:
                    _scores(
                        program + (first + i) * programs,
                        r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
                        w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
                        bonus, sums, pairs, table, T, per_sequence, packed, H,
                        K, C, LEVELS, BLOCK_K, READERS, WRITERS, EXCLUSIVE1, EXCLUSIVE2, DOT, PRECISION,
                    )  # fmt: skip
