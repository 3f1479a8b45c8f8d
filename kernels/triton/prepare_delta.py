"""Chunks of the delta rule made ready for the pass over the states: forward, or reversed for the gradients."""

from functools import partial
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.launch import kernel
from subquad.kernels.triton.pair_scores import Scores, pair_scores
from subquad.kernels.triton.prepare import chunk_matrices, inverse, launch, load_matrix, row_tensor, store_matrix
from subquad.kernels.triton.segments import CHUNK, Segments, segment_bounds
from subquad.kernels.triton.tiles import cumulated, dot, exp2, load_tile, rows, store_tile


class DeltaChunks(NamedTuple):
    """u = Y v + W S; o = P v + Q S; S <- whole * S + (F_gain F)^T u: u are the writes."""

    P: Tensor  # [n, H, C, C]
    Q: Tensor  # [B, T, H, K]
    Y: Tensor  # [n, H, C, C]
    W: Tensor  # [B, T, H, K]
    F: Tensor  # [B, T, heads, K]: keys, decayed to the chunk's end by F_gain
    F_gain: Tensor | None  # [n, H, C] float32; None where F is decayed already, or nothing is
    whole: Tensor | None  # float32 [n, H, K], [n, H] for a scalar decay


class DeltaChunksReversed(NamedTuple):
    """e = Y do + W dS; dS <- whole * dS + E^T do + (F_gain F)^T e: e is the writes' gradient, beta e that of v."""

    Y: Tensor
    W: Tensor
    E: Tensor  # readers decayed since the chunk's start
    F: Tensor  # keys; F_gain is -beta and their decay since the chunk's start
    F_gain: Tensor
    whole: Tensor | None


def delta_scores(q: Tensor, k: Tensor, g: Tensor, chunks: Segments) -> Scores:
    """What `prepare_delta` takes for a decay for every channel, g [B, T, H, K], both ways."""
    return pair_scores(q, k, k, None, g, chunks, exclusive=(False, False))


def prepare_delta(
    q: Tensor, k: Tensor, beta: Tensor, g: Tensor | Scores | None, chunks: Segments, *, reverse: bool = False
) -> DeltaChunks | DeltaChunksReversed:
    """q, k: [B, T, heads, K], whose heads divide H; beta: [B, T, H]; g: None, a decay [B, T, H] in float32, or
    `delta_scores` of one for every channel; chunks = cut(q, cu_seqlens, CHUNK).

    Rows that belong to no sequence stay unwritten.
    """
    H, K = beta.shape[2], q.shape[3]
    like, matrix, row = q, (lambda: chunk_matrices(q, chunks, H)), (lambda: row_tensor(q, H, K))
    new = partial(torch.empty, dtype=torch.float32, device=q.device)
    whole, pairs, key_until, gate, strides = None, None, None, 0, (0, 0, 0)
    if isinstance(g, Scores):
        q, k, key_until, whole, pairs, gate = g.r1_since, g.r2_since, g.w1_until, g.whole, g.pairs, 2
    elif g is not None:
        whole, gate, strides = new(chunks.count, H), 1, g.stride()
    q, k = rows(q), rows(k)
    # A decay for every channel is in the rows of its scores already. Readers meet rows that the pass has as they are
    # to be multiplied, where a factor takes longer than here.
    gain = new(chunks.count, H, CHUNK) if gate == 1 or reverse else None
    if reverse:
        found = DeltaChunksReversed(matrix(), row(), row() if gate == 1 else q, k, gain, whole)
        P, Q, Y, W = None, found.E, found.Y, found.W
    else:
        found = DeltaChunks(matrix(), row(), matrix(), row(), k if key_until is None else key_until, gain, whole)
        P, Q, Y, W = found[:4]
    if chunks.count * H:
        prepare_delta_kernel[(chunks.count * H,)](
            q, *q.stride()[:3], H // q.shape[2], k, *k.stride()[:3], H // k.shape[2], beta, *beta.stride(),
            g if gate == 1 else None, *strides, pairs, key_until, P, Q, Y, W, gain, whole,
            chunks.table, q.shape[1], chunks.size, chunks.per_sequence, chunks.packed, H,
            GATE=gate, REVERSE=reverse, **launch("prepare_delta", like, K, gates=gate),
        )  # fmt: skip
    return found


@kernel(do_not_specialize=["beta_b", "g_b", "T", "segment", "per_sequence", "packed"])
def prepare_delta_kernel(
    q, q_b, q_t, q_h, q_share, k, k_b, k_t, k_h, k_share, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    pairs, key_until,  # of a decay for every channel, which q and k have in them then
    P, Q, Y, W, gain, whole,  # reversed: no P, and Q stands for E
    table, T, segment, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, GATE: tl.constexpr,
    REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    b, start, end, _chunk = segment_bounds(table, n, T, segment, per_sequence, packed)
    count = end - start
    first = start.to(tl.int64)
    row = tl.arange(0, C)
    q += b * q_b + first * q_t + (h // q_share) * q_h
    k += b * k_b + first * k_t + (h // k_share) * k_h
    if GATE == 1:
        g += b * g_b + first * g_t + h * g_h
    out = ((b * T + first) * H + h) * K
    line = H * K
    here = tl.program_id(0).to(tl.int64)
    at = beta + b * beta_b + first * beta_t + h * beta_h + row * beta_t
    strength = tl.load(at, mask=row < count, other=0.0).to(tl.float32)
    if GATE == 1:
        gate = tl.load(g + row * g_t, mask=row < count, other=0.0)
        high, low, _, _, since, until, total = cumulated(gate, False)
        tl.store(whole + here, tl.exp(total))
    if REVERSE:
        tl.store(gain + here * C + row, -strength * since if GATE == 1 else -strength)
    elif GATE == 1:
        tl.store(gain + here * C + row, until)

    # The scores of all pairs.
    if GATE == 2:
        pairs += here * (2 * C * C)
        P0 = load_matrix(pairs, C, C)
        A = load_matrix(pairs + C * C, C, C)
    else:
        P0 = tl.zeros([C, C], tl.float32)
        A = tl.zeros([C, C], tl.float32)
        for c in tl.static_range(0, K, BLOCK_K):
            col = c + tl.arange(0, BLOCK_K)
            reader = load_tile(q, q_t, row, col, row < count, K)
            key = load_tile(k, k_t, row, col, row < count, K)
            P0 += dot(reader, tl.trans(key), DOT, PRECISION)
            A += dot(key, tl.trans(key), DOT, PRECISION)
        if GATE == 1:
            gap = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
            pairs = exp2(tl.where(row[:, None] >= row[None, :], gap * 1.4426950408889634, float("-inf")))
            P0 *= pairs
            A *= pairs
        else:
            P0 = tl.where(row[:, None] >= row[None, :], P0, 0.0)
    A = tl.where(row[:, None] > row[None, :], A, 0.0)
    P0 = P0.to(DOT)

    solved = inverse(A * strength[:, None], row, PRECISION)
    through = dot(P0, solved, DOT, PRECISION)
    if REVERSE:
        store_matrix(Y + here * C * C, tl.trans(through), C, C)
        if GATE == 1:
            solved *= until[:, None]
        solved = tl.trans(solved).to(DOT)
        for c in tl.static_range(0, K, BLOCK_K):
            col = c + tl.arange(0, BLOCK_K)
            if GATE == 2:
                key = load_tile(key_until + out, line, row, col, row < count, K)
            elif K > BLOCK_K:
                key = load_tile(k, k_t, row, col, row < count, K)
            store_tile(W + out, line, row, col, row < count, dot(solved, key, DOT, PRECISION), K)
            if GATE == 1:  # beside the products above triton 3.6 has misaligned accesses for 80 columns of float32
                early = load_tile(q, q_t, row, col, row < count, K).to(tl.float32)
                store_tile(Q + out, line, row, col, row < count, early * since[:, None], K)
    else:
        through *= strength[None, :]
        solved *= -strength[None, :]
        store_matrix(P + here * C * C, through, C, C)
        store_matrix(Y + here * C * C, -solved, C, C)
        if GATE == 1:
            through *= since[None, :]
            solved *= since[None, :]
        through = -through.to(DOT)
        solved = solved.to(DOT)
        for c in tl.static_range(0, K, BLOCK_K):
            col = c + tl.arange(0, BLOCK_K)
            if GATE == 2 or K > BLOCK_K:
                key = load_tile(k, k_t, row, col, row < count, K)
                reader = load_tile(q, q_t, row, col, row < count, K)
            straight = reader.to(tl.float32)
            if GATE == 1:
                straight *= since[:, None]
            straight += dot(through, key, DOT, PRECISION)
            store_tile(Q + out, line, row, col, row < count, straight, K)
            store_tile(W + out, line, row, col, row < count, dot(solved, key, DOT, PRECISION), K)
