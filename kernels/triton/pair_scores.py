"""What readers and writers within a chunk have to do with each other under a decay for every channel.

Reader i and writer j <= i meet as s_ij = sum_c r_ic exp(G_ic - G_jc) w_jc, where G cumulates the log decays. To be a
product of matrices the exponential has to split, about a token between i and j lest one part overflow: for blocks of 1,
2, 4, ... tokens, late readers decayed since the boundary to the block before meet early writers decayed to it. Each row
is a reader or a writer on a level, so one tile X holds both, and X X^T all that meet there: log2 C products.
(Yang et al. 2023, arXiv:2312.06635, cut chunks once more for the same reason.) Until a channel has decayed by more
than 2^-MILDEST since the chunk's start, that serves as the token between for all pairs: one product. It is made for all
readers, and the others made anew in a second launch, which looks through the chunks for those that have some. So what a
reader gets depends on tokens before it alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.configs import config
from subquad.kernels.triton.fixed_point import (
    boundary,
    cumulate,
    decay_between,
    load_stacked,
    load_sums,
    store_stacked,
)
from subquad.kernels.triton.launch import kernel, launch_each
from subquad.kernels.triton.segments import CHUNK, Segments, segment_bounds
from subquad.kernels.triton.tiles import columns, operand_size, precision, shared

MILDEST = 64  # bits
LOOKING = 528  # programs that look for chunks which one product does not serve: starting one a chunk takes longer
LEAST = tl.constexpr(-MILDEST * 2**20)  # as sums have it
LOST = tl.constexpr(2.0 ** -(MILDEST + 1))  # what writers decayed to after that does not matter, but for being finite


class Scores(NamedTuple):
    """`pairs` [n, H, readers, writers]: of one reader and one writer [C, C], of two the second follow the first in
    rows or columns; zero where the reader is before the writer. An inclusive reader meets its own token undecayed, and
    an exclusive one not at all, but for the bonus. Rows [B, T, H, K] in the inputs' dtype."""

    pairs: Tensor
    r1_since: Tensor  # readers decayed since the chunk's start
    r2_since: Tensor | None
    w1_until: Tensor  # writers decayed to its end
    w2_until: Tensor | None
    whole: Tensor  # [n, H, K] float32: the decay over a chunk
    sums: Tensor  # [n, H, C, K]: see `fixed_point`


def new_scores(
    r1: Tensor, r2: Tensor | None, w1: Tensor, w2: Tensor | None, H: int, n: int, dtype: torch.dtype
) -> Scores:
    """Room for those of n chunks of H heads, the pairs in `dtype`."""
    K, readers, writers = r1.shape[3], 1 + (r2 is not None), 1 + (w2 is not None)
    return Scores(
        r1.new_empty(n, H, readers * CHUNK, writers * CHUNK, dtype=dtype),
        *(None if x is None else x.new_empty(*x.shape[:2], H, K) for x in (r1, r2, w1, w2)),
        r1.new_empty(n, H, K, dtype=torch.float32), r1.new_empty(n, H, CHUNK, K, dtype=torch.int32),
    )  # fmt: skip


def pair_scores(
    r1: Tensor, r2: Tensor | None, w1: Tensor, w2: Tensor | None, g: Tensor, chunks: Segments, *,
    exclusive: tuple[bool, bool] = (False, True), bonus: Tensor | None = None, dtype: torch.dtype = torch.float32,
) -> Scores:  # fmt: skip
    """r, w: [B, T, heads, K], all of one dtype, whose heads divide H; g: [B, T, H, K] of any strides; bonus: [H, K] or
    None; chunks = cut(r1, cu_seqlens, CHUNK); `dtype` is that of the pairs. Rows of no sequence stay unwritten.

    A second writer needs a second reader.
    """
    H, K = g.shape[2:]
    n, readers, writers = chunks.count, 1 + (r2 is not None), 1 + (w2 is not None)
    found = new_scores(r1, r2, w1, w2, H, n, dtype)
    cumulate(g, chunks, found.sums, found.whole)
    if n * H:
        arguments = [
            *(argument for x in (r1, r2, w1, w2) for argument in shared(x, H)),
            None if bonus is None else bonus.float().contiguous(), found.sums, found.whole, *found[:5],
            chunks.table, r1.shape[1], chunks.per_sequence, chunks.packed, H, n * H,
        ]  # fmt: skip
        always = {
            "K": K, "C": CHUNK, "LEVELS": CHUNK.bit_length() - 1, "READERS": readers, "WRITERS": writers,
            "EXCLUSIVE1": exclusive[0], "EXCLUSIVE2": exclusive[1], **precision(r1.dtype),
        }  # fmt: skip
        variants = []
        for single in (True, False):
            widths = {"K": K, "readers": readers, "writers": writers, "levels": int(not single)}
            values = config("pair_scores", device=r1.device, size=operand_size(r1.dtype), **widths)
            values["BLOCK_K"] = columns(K, r1.dtype, values["BLOCK_K"])
            grid = (n * H if single else min(n * H, LOOKING),)
            variants.append((grid, {"SINGLE": single, **always, **values}))
        launch_each(pair_scores_kernel, arguments, variants)
    return found


@triton.jit
def gentle(sums, K: tl.constexpr, C: tl.constexpr):
    """Whether one product serves all readers of a chunk."""
    col = tl.arange(0, triton.next_power_of_2(K))
    return tl.min(tl.load(sums + (C - 1) * K + col, mask=col < K, other=0), 0) >= LEAST


@triton.jit
def _scores(
    place,
    r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
    w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
    bonus, sums, whole, pairs, r1_since, r2_since, w1_until, w2_until, table, T, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, READERS: tl.constexpr,
    WRITERS: tl.constexpr, EXCLUSIVE1: tl.constexpr, EXCLUSIVE2: tl.constexpr, SINGLE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
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
    last = tl.full([1], C - 1, tl.int32)
    out = ((b * T + first) * H + h) * K
    r1_since += out
    w1_until += out
    if READERS == 2:
        r2_since += out
    if WRITERS == 2:
        w2_until += out
    own1 = tl.zeros([LINES], tl.float32)
    own2 = tl.zeros([LINES], tl.float32)
    scores = tl.zeros([LINES, COLUMNS], tl.float32)
    strong = tl.zeros([LINES], tl.int32)  # whether one product does not serve a reader
    for c in tl.static_range(0, K, BLOCK_K):
        col = c + tl.arange(0, BLOCK_K)
        reader = load_stacked(r1, r1_t, r2, r2_t, row, upper, row < count, col, K)
        writer = load_stacked(w1, w1_t, w2, w2_t, token, beyond, token < count, col, K)
        seen = load_sums(sums, row - exclusive, col, K)
        if SINGLE:
            since = reader.to(tl.float32) * decay_between(seen, 0)
            decay = tl.maximum(decay_between(load_sums(sums, token, col, K), 0), LOST)
            y = writer.to(tl.float32) / decay
            scores = tl.dot(since.to(DOT), tl.trans(y.to(DOT)), scores, input_precision=PRECISION)
            # The rows themselves. A NaN among the gates is none among their sums: pass it on.
            sane = tl.load(whole + here * K + col, mask=col < K, other=0.0)[None, :] * 0.0 + 1.0
            since *= sane
            store_stacked(r1_since, r2_since, H * K, row, upper, row < count, col, since, K)
            until = decay_between(load_sums(sums, token, col, K), load_sums(sums, last, col, K))
            until *= writer.to(tl.float32)
            store_stacked(w1_until, w2_until, H * K, token, beyond, token < count, col, until, K)
        else:
            strong |= tl.max((seen < LEAST).to(tl.int32), 1)
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
                    factor = decay_between(
                        load_sums(sums, token, col, K), load_sums(sums, boundary(token, level), col, K)
                    )
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
    if SINGLE:
        scores = tl.where(row[:, None] > token[None, :], scores, 0.0)
    scores += tl.where((line[:, None] == column[None, :]) & (line < C)[:, None], own1[:, None], 0.0)
    if WRITERS == 2:
        scores += tl.where(line[:, None] + C == column[None, :], own2[:, None], 0.0)
    pairs += here * (LINES * COLUMNS)
    due = True if SINGLE else (strong > 0)[:, None]
    tl.store(pairs + line[:, None] * COLUMNS + column[None, :], scores.to(pairs.dtype.element_ty), mask=due)


@kernel(do_not_specialize=["T", "per_sequence", "packed", "n_places"])
def pair_scores_kernel(
    r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
    w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
    bonus, sums, whole, pairs, r1_since, r2_since, w1_until, w2_until, table, T, per_sequence, packed, H, n_places,
    K: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BLOCK_K: tl.constexpr, READERS: tl.constexpr,
    WRITERS: tl.constexpr, EXCLUSIVE1: tl.constexpr, EXCLUSIVE2: tl.constexpr, SINGLE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A place is a chunk of a head: one a program, or those of many that one product does not serve."""
    if SINGLE:
        _scores(
            tl.program_id(0), r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
            w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
            bonus, sums, whole, pairs, r1_since, r2_since, w1_until, w2_until, table, T, per_sequence, packed, H,
            K, C, LEVELS, BLOCK_K, READERS, WRITERS, EXCLUSIVE1, EXCLUSIVE2, SINGLE, DOT, PRECISION,
        )  # fmt: skip
    else:
        for turn in range(tl.cdiv(n_places - tl.program_id(0), tl.num_programs(0))):
            place = tl.program_id(0) + turn * tl.num_programs(0)
            if not gentle(sums + place.to(tl.int64) * (C * K), K, C):
                _scores(
                    place, r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
                    w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
                    bonus, sums, whole, pairs, r1_since, r2_since, w1_until, w2_until, table, T, per_sequence, packed,
                    H, K, C, LEVELS, BLOCK_K, READERS, WRITERS, EXCLUSIVE1, EXCLUSIVE2, SINGLE, DOT, PRECISION,
                )  # fmt: skip
