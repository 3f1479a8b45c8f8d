"""Chunks of the delta rule made ready for the pass over the states: forward, or reversed for the gradients."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.prepare import (
    by_halves,
    chunk_matrices,
    inverse,
    launch,
    load_rows,
    neighbours,
    row_tensor,
    store_matrix,
    store_rows,
    store_whole,
    with_near,
)
from subquad.kernels.triton.segments import Segments, segment_bounds
from subquad.kernels.triton.tiles import cumulated, dot, load_tile, rows, store_tile


class DeltaChunks(NamedTuple):
    """u = Y v + W S; o = P v + Q S; S <- whole * S + F^T u: u are the writes."""

    P: Tensor  # [n, H, C, C]
    Q: Tensor  # [B, T, H, K]
    Y: Tensor  # [n, H, C, C]
    W: Tensor  # [B, T, H, K]
    F: Tensor  # [B, T, H, K]: keys decayed to the chunk's end
    whole: Tensor | None  # float32 [n, H, K], [n, H] for a scalar decay


class DeltaChunksReversed(NamedTuple):
    """e = Y do + W dS; dS <- whole * dS + E^T do + F^T e: e is the gradient of the writes, beta e that of v."""

    Y: Tensor
    W: Tensor
    E: Tensor  # readers decayed since the chunk's start
    F: Tensor  # -beta k, decayed since the chunk's start
    whole: Tensor | None


def prepare_delta(
    q: Tensor, k: Tensor, beta: Tensor, g: Tensor | None, chunks: Segments, *, reverse: bool = False
) -> DeltaChunks | DeltaChunksReversed:
    """q, k: [B, T, heads, K], whose heads divide H; beta: [B, T, H]; g: None, [B, T, H] or [B, T, H, K], float32.

    chunks = cut(q, cu_seqlens, CHUNK). Rows that belong to no sequence stay unwritten.
    """
    q, k = rows(q), rows(k)
    H, K = beta.shape[2], q.shape[3]
    matrix, row = (lambda: chunk_matrices(q, chunks, H)), (lambda: row_tensor(q, H, K))
    whole = None
    if g is not None:
        whole = torch.empty(chunks.count, H, *g.shape[3:], dtype=torch.float32, device=q.device)
    if reverse:
        found = DeltaChunksReversed(matrix(), row(), row(), row(), whole)
        P, Q, Y, W, F = None, found.E, found.Y, found.W, found.F
    else:
        found = DeltaChunks(matrix(), row(), matrix(), row(), row(), whole)
        P, Q, Y, W, F = found[:5]
    gate = 0 if g is None else g.dim() - 2
    strides = (0, 0, 0, 0) if g is None else (*g.stride(), 0)[:4]
    if chunks.count * H:
        prepare_delta_kernel[(chunks.count * H,)](
            q, *q.stride()[:3], H // q.shape[2], k, *k.stride()[:3], H // k.shape[2], beta, *beta.stride(), g, *strides,
            P, Q, Y, W, F, whole,
            chunks.table, q.shape[1], chunks.size, chunks.per_sequence, chunks.packed, H,
            GATE=gate, REVERSE=reverse, **launch("prepare_delta", q, K, gates=gate),
        )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["T", "segment", "per_sequence", "packed"])
def prepare_delta_kernel(
    q, q_b, q_t, q_h, q_share, k, k_b, k_t, k_h, k_share, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h, g_k,
    P, Q, Y, W, F, whole,  # reversed: Q stands for E, P for nothing
    table, T, segment, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, GATE: tl.constexpr,
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
    if GATE != 0:
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

    # The scores of all pairs; and what both directions need of the decayed rows, of which a vector decay leaves some
    # where their products will stand, to be read again.
    P0 = tl.zeros([C, C], tl.float32)
    A = tl.zeros([C, C], tl.float32)
    if GATE == 2:
        own = tl.zeros([C], tl.float32)
        near = tl.zeros([C], tl.float32)
        near_key = tl.zeros([C], tl.float32)
        for c in range(0, K, BLOCK_K):
            reader = load_rows(q, q_t, 1, count, c, K, C, BLOCK_K, WARPS)
            key = load_rows(k, k_t, 1, count, c, K, C, BLOCK_K, WARPS)
            decay = tl.exp(load_rows(g, g_t, g_k, count, c, K, C, BLOCK_K, WARPS))
            own += tl.sum(reader * key, 1)
            reader *= decay
            late = key * decay
            near += neighbours(reader, key)
            near_key += neighbours(late, key)
            P0, _s12, A, _s22, reader, late, key, _w2, total = by_halves(
                reader, late, key, key, decay, P0, P0, A, A, row, C, 2, 1, DOT, PRECISION
            )
            store_whole(whole + here * K, c, K, total)
            store_rows(Q + out, line, count, c, K, reader, C, BLOCK_K, WARPS)
            if REVERSE:
                store_rows(W + out, line, count, c, K, key, C, BLOCK_K, WARPS)
                store_rows(F + out, line, count, c, K, -strength[:, None] * late, C, BLOCK_K, WARPS)
            else:
                store_rows(W + out, line, count, c, K, late, C, BLOCK_K, WARPS)
                store_rows(F + out, line, count, c, K, key, C, BLOCK_K, WARPS)
        P0 = with_near(P0, own, near, row)
        A = with_near(A, None, near_key, row)
        tl.debug_barrier()
    else:
        for c in tl.static_range(0, K, BLOCK_K):
            col = c + tl.arange(0, BLOCK_K)
            reader = load_tile(q, q_t, row, col, row < count, K)
            key = load_tile(k, k_t, row, col, row < count, K)
            P0 += dot(reader, tl.trans(key), DOT, PRECISION)
            A += dot(key, tl.trans(key), DOT, PRECISION)
            if REVERSE:
                if GATE == 1:
                    store_tile(Q + out, line, row, col, row < count, reader * since[:, None], K)
                    store_tile(F + out, line, row, col, row < count, key * -(strength * since)[:, None], K)
                else:
                    store_tile(Q + out, line, row, col, row < count, reader, K)
                    store_tile(F + out, line, row, col, row < count, key * -strength[:, None], K)
            elif GATE == 1:
                store_tile(F + out, line, row, col, row < count, key * until[:, None], K)
            else:
                store_tile(F + out, line, row, col, row < count, key, K)
        if GATE == 1:
            gap = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
            pairs = tl.exp(tl.where(row[:, None] >= row[None, :], gap, float("-inf")))
            P0 *= pairs
            A *= pairs
        else:
            P0 = tl.where(row[:, None] >= row[None, :], P0, 0.0)
    A = tl.where(row[:, None] > row[None, :], A, 0.0)
    P0 = P0.to(DOT)

    solved = inverse(A * strength[:, None], row, PRECISION)
    through = dot(P0, solved, DOT, PRECISION)
    if REVERSE:
        store_matrix(Y + here * C * C, tl.trans(through), C)
        if GATE == 1:
            solved *= until[:, None]
        solved = tl.trans(solved).to(DOT)
        for c in tl.static_range(0, K, BLOCK_K):
            col = c + tl.arange(0, BLOCK_K)
            if GATE == 2:
                key = load_tile(W + out, line, row, col, row < count, K)
            elif K > BLOCK_K:
                key = load_tile(k, k_t, row, col, row < count, K)
            store_tile(W + out, line, row, col, row < count, dot(solved, key, DOT, PRECISION), K)
    else:
        through *= strength[None, :]
        solved *= -strength[None, :]
        store_matrix(P + here * C * C, through, C)
        store_matrix(Y + here * C * C, -solved, C)
        if GATE == 1:
            through *= since[None, :]
            solved *= since[None, :]
        through = -through.to(DOT)
        solved = solved.to(DOT)
        for c in tl.static_range(0, K, BLOCK_K):
            col = c + tl.arange(0, BLOCK_K)
            if GATE == 2:
                key = load_tile(W + out, line, row, col, row < count, K)
                reader = load_tile(Q + out, line, row, col, row < count, K)
            elif K > BLOCK_K:
                key = load_tile(k, k_t, row, col, row < count, K)
                reader = load_tile(q, q_t, row, col, row < count, K)
            straight = reader.to(tl.float32)
            if GATE == 1:
                straight *= since[:, None]
            straight += dot(through, key, DOT, PRECISION)
            store_tile(Q + out, line, row, col, row < count, straight, K)
            store_tile(W + out, line, row, col, row < count, dot(solved, key, DOT, PRECISION), K)
