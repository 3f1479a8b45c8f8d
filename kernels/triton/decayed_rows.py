"""Readers and writers under a decay for every channel, decayed to where products of matrices can take them.

With G the log decays cumulated within a chunk, reader i and writer j <= i meet as sum_c r_ic exp(G_ic - G_jc) w_jc, a
product of r_ic exp(G_ic), a reader decayed since the chunk's start, and w_jc exp(-G_jc), a writer grown back to it
(Yang et al. 2023, arXiv:2312.06635). The latter must not overflow: see `pair_scores` for what has decayed by more than
2^-MILDEST. The pass over the states takes the former too, and writers decayed to the chunk's end.
"""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.configs import config
from subquad.kernels.triton.fixed_point import LOWEST, UNIT, decay_between, load_sums
from subquad.kernels.triton.launch import cdiv, kernel
from subquad.kernels.triton.segments import CHUNK, Segments, segment_bounds
from subquad.kernels.triton.tiles import exp2, load_tile, padded, shared, store_tile

MILDEST = 64  # bits
MOST = tl.constexpr(float(MILDEST + 1))  # bits that writers grow by: no more matters, but for being finite


class DecayedRows(NamedTuple):
    """Rows [B, T, H, K] in the inputs' dtype, but that float16 has no range for what products take: float32 then.

    An exclusive reader sees no decay of its own token. Rows of no sequence stay unwritten.
    """

    r1_since: Tensor  # readers decayed since the chunk's start
    r2_since: Tensor | None
    w1_until: Tensor  # writers decayed to its end
    w2_until: Tensor | None
    w1_grown: Tensor  # writers grown back to its start
    w2_grown: Tensor | None
    whole: Tensor  # [n, H, K] float32: the decay over a chunk
    sums: Tensor  # [n, H, C, K]: see `fixed_point`


def new_decayed_rows(r1: Tensor, r2: Tensor | None, w1: Tensor, w2: Tensor | None, H: int, n: int) -> DecayedRows:
    """Room for those of n chunks of H heads."""
    K, wide = r1.shape[3], torch.float32 if r1.dtype == torch.float16 else r1.dtype

    def rows(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if x is None else x.new_empty(*x.shape[:2], H, K, dtype=dtype)

    return DecayedRows(
        rows(r1, wide), rows(r2, wide), rows(w1, r1.dtype), rows(w2, r1.dtype), rows(w1, wide), rows(w2, wide),
        r1.new_empty(n, H, K, dtype=torch.float32), r1.new_empty(n, H, CHUNK, K, dtype=torch.int32),
    )  # fmt: skip


def decayed_rows(
    r1: Tensor, r2: Tensor | None, w1: Tensor, w2: Tensor | None, g: Tensor, chunks: Segments, *,
    exclusive: tuple[bool, bool] = (False, True),
) -> DecayedRows:  # fmt: skip
    """r, w: [B, T, heads, K], all of one dtype, whose heads divide H; g: [B, T, H, K] of any strides;
    chunks = cut(r1, cu_seqlens, CHUNK)."""
    H, K = g.shape[2:]
    found = new_decayed_rows(r1, r2, w1, w2, H, chunks.count)
    if found.sums.numel():
        values = config("decayed_rows", device=r1.device, readers=1 + (r2 is not None), writers=1 + (w2 is not None))
        values["BLOCK"] = min(padded(K), values["BLOCK"])
        decayed_rows_kernel[(chunks.count * H * cdiv(K, values["BLOCK"]),)](
            g, *g.stride(), *(argument for x in (r1, r2, w1, w2) for argument in shared(x, H)), *found,
            chunks.table, r1.shape[1], chunks.per_sequence, chunks.packed, H,
            K=K, C=CHUNK, EXCLUSIVE1=exclusive[0], EXCLUSIVE2=exclusive[1], **values,
        )  # fmt: skip
    return found


@kernel(do_not_specialize=["g_b", "T", "per_sequence", "packed"])
def decayed_rows_kernel(
    g, g_b, g_t, g_h, g_k,
    r1, r1_b, r1_t, r1_h, r1_share, r2, r2_b, r2_t, r2_h, r2_share,
    w1, w1_b, w1_t, w1_h, w1_share, w2, w2_b, w2_t, w2_h, w2_share,
    r1_since, r2_since, w1_until, w2_until, w1_grown, w2_grown, whole, sums,
    table, T, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EXCLUSIVE1: tl.constexpr,
    EXCLUSIVE2: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (K + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    here = (program // N_BLOCKS).to(tl.int64)
    h = (program // N_BLOCKS) % H
    b, start, end, _ = segment_bounds(table, program // (N_BLOCKS * H), T, C, per_sequence, packed)
    first = start.to(tl.int64)
    count = end - start
    col = (program % N_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    at = g + b * g_b + first * g_t + h * g_h + col * g_k
    sums += here * (C * K)
    # A sum is `high` in our units and `low`, what a float32 loses of it: all integers of 24 bits and some of 25.
    high = tl.zeros([BLOCK], tl.int32)
    low = tl.zeros([BLOCK], tl.float32)
    last = tl.zeros([BLOCK], tl.int32)
    every = tl.zeros([BLOCK], tl.float32)
    for t in range(0, C, ROWS):
        gates = ()
        for i in tl.static_range(ROWS):  # all loads before the sums that wait for them
            gates += (tl.load(at + (t + i) * g_t, mask=tl.where(t + i < count, col < K, False), other=0.0),)
        for i in tl.static_range(ROWS):
            bits = gates[i].to(tl.float32) * 1.4426950408889634
            bits = tl.where(bits < LOWEST, LOWEST, bits)  # and NaN stays
            every += bits
            fine = tl.where(bits == bits, bits, 0.0) * (1 << 20)
            high += fine.to(tl.int32)
            low += fine - fine.to(tl.int32).to(tl.float32)
            last = high + (low - 0.5).to(tl.int32)  # the nearest: no sum is above zero
            tl.store(sums + (t + i) * K + col, last, mask=col < K)
    # A NaN among the gates is none among their sums: what a chunk leaves passes it on.
    sane = every * 0.0 + 1.0
    tl.store(whole + here * K + col, exp2(last.to(tl.float32) * UNIT) * sane, mask=col < K)

    # Sums come back from the cache, in the layout of rows. A thread has some columns above, here some of a row.
    tl.debug_barrier()
    last = last[None, :]
    sane = sane[None, :]
    out = ((b * T + first) * H + h) * K
    line = H * K
    r1 += b * r1_b + first * r1_t + (h // r1_share) * r1_h
    w1 += b * w1_b + first * w1_t + (h // w1_share) * w1_h
    if r2 is not None:
        r2 += b * r2_b + first * r2_t + (h // r2_share) * r2_h
    if w2 is not None:
        w2 += b * w2_b + first * w2_t + (h // w2_share) * w2_h
    for t in range(0, C, ROWS):
        row = t + tl.arange(0, ROWS)
        inside = row < count
        seen = load_sums(sums, row, col, K)
        earlier = load_sums(sums, row - 1, col, K) if EXCLUSIVE1 or EXCLUSIVE2 else seen
        reader1 = load_tile(r1, r1_t, row, col, inside, K).to(tl.float32)
        writer1 = load_tile(w1, w1_t, row, col, inside, K).to(tl.float32)
        reader2 = load_tile(r2, r2_t, row, col, inside, K).to(tl.float32) if r2 is not None else None
        writer2 = load_tile(w2, w2_t, row, col, inside, K).to(tl.float32) if w2 is not None else None

        since = decay_between(earlier if EXCLUSIVE1 else seen, 0) * sane
        store_tile(r1_since + out, line, row, col, inside, reader1 * since, K)
        if r2 is not None:
            since = decay_between(earlier if EXCLUSIVE2 else seen, 0) * sane
            store_tile(r2_since + out, line, row, col, inside, reader2 * since, K)
        until = decay_between(seen, last)
        grown = exp2(tl.minimum(-seen.to(tl.float32) * UNIT, MOST))
        store_tile(w1_until + out, line, row, col, inside, writer1 * until, K)
        store_tile(w1_grown + out, line, row, col, inside, writer1 * grown, K)
        if w2 is not None:
            store_tile(w2_until + out, line, row, col, inside, writer2 * until, K)
            store_tile(w2_grown + out, line, row, col, inside, writer2 * grown, K)
