"""Chunks of the generalised delta rule made ready for the pass over the states, forward or reversed for gradients."""

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
    load_matrix,
    load_rows,
    neighbours,
    row_tensor,
    store_matrix,
    store_rows,
    store_whole,
    with_near,
)
from subquad.kernels.triton.segments import Segments, segment_bounds
from subquad.kernels.triton.tiles import dot, rows


class DplrChunks(NamedTuple):
    """u = Y v + W S; o = P v + Q S; S <- whole * S + E^T v + F^T u: u is what a reads."""

    P: Tensor  # [n, H, C, C]
    Q: Tensor  # [B, T, H, K]
    Y: Tensor  # [n, H, C, C]
    W: Tensor  # [B, T, H, K]
    E: Tensor  # [B, T, H, K]: k decayed to the chunk's end
    F: Tensor  # [B, T, H, K]: b decayed to the chunk's end
    whole: Tensor | None  # [n, H, K] float32


class DplrChunksReversed(NamedTuple):
    """e = Y do + W dS; dv = P do + Q dS; dS <- whole * dS + E^T do + F^T e: e is the gradient of u."""

    P: Tensor
    Q: Tensor
    Y: Tensor
    W: Tensor
    E: Tensor  # q decayed since the chunk's start
    F: Tensor  # a decayed since the chunk's start, before its own token's decay
    whole: Tensor | None


def prepare_dplr(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, g: Tensor | None, chunks: Segments, *, reverse: bool = False
) -> DplrChunks | DplrChunksReversed:
    """q, k, a, b: [B, T, H, K]; g: None or [B, T, H, K] float32, with any strides; chunks = cut(q, cu_seqlens, CHUNK).

    Rows that belong to no sequence stay unwritten.
    """
    q, k, a, b = rows(q), rows(k), rows(a), rows(b)
    H, K = q.shape[2:]
    whole = None
    if g is not None:
        whole = torch.empty(chunks.count, H, K, dtype=torch.float32, device=q.device)
    P, Y = (chunk_matrices(q, chunks, H) for _ in range(2))
    Q, W, E, F = (row_tensor(q, H, K) for _ in range(4))
    if chunks.count * H:
        prepare_dplr_kernel[(chunks.count * H,)](
            q, *q.stride()[:3], k, *k.stride()[:3], a, *a.stride()[:3], b, *b.stride()[:3],
            g, *((0, 0, 0, 0) if g is None else g.stride()), P, Q, Y, W, E, F, whole,
            chunks.table, q.shape[1], chunks.size, chunks.per_sequence, chunks.packed, H,
            DECAY=g is not None, REVERSE=reverse, **launch("prepare_dplr", q, K),
        )  # fmt: skip
    return (DplrChunksReversed if reverse else DplrChunks)(P, Q, Y, W, E, F, whole)


@triton.jit(do_not_specialize=["T", "segment", "per_sequence", "packed"])
def prepare_dplr_kernel(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, a, a_b, a_t, a_h, b, b_b, b_t, b_h, g, g_b, g_t, g_h, g_k,
    P, Q, Y, W, E, F, whole, table, T, segment, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, DECAY: tl.constexpr,
    REVERSE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    batch, start, end, _chunk = segment_bounds(table, n, T, segment, per_sequence, packed)
    count = end - start
    first = start.to(tl.int64)
    row = tl.arange(0, C)
    q += batch * q_b + first * q_t + h * q_h
    k += batch * k_b + first * k_t + h * k_h
    a += batch * a_b + first * a_t + h * a_h
    b += batch * b_b + first * b_t + h * b_h
    if DECAY:
        g += batch * g_b + first * g_t + h * g_h
    out = ((batch * T + first) * H + h) * K
    line = H * K
    here = tl.program_id(0).to(tl.int64)

    # First what q reads, then what a reads: the scores of both at once do not fit the registers. Those of q wait where
    # P and Y will stand, and of the decayed rows two where their products will.
    qk = tl.zeros([C, C], tl.float32)
    qb = tl.zeros([C, C], tl.float32)
    own_k = tl.zeros([C], tl.float32)
    own_b = tl.zeros([C], tl.float32)
    near_k = tl.zeros([C], tl.float32)
    near_b = tl.zeros([C], tl.float32)
    for c in range(0, K, BLOCK_K):
        query = load_rows(q, q_t, 1, count, c, K, C, BLOCK_K, WARPS)
        key = load_rows(k, k_t, 1, count, c, K, C, BLOCK_K, WARPS)
        writer = load_rows(b, b_t, 1, count, c, K, C, BLOCK_K, WARPS)
        if DECAY:
            decay = tl.exp(load_rows(g, g_t, g_k, count, c, K, C, BLOCK_K, WARPS))
            own_k += tl.sum(query * key, 1)
            own_b += tl.sum(query * writer, 1)
            query *= decay
            near_k += neighbours(query, key)
            near_b += neighbours(query, writer)
            qk, qb, _s21, _s22, query, _r2, key, writer, total = by_halves(
                query, query, key, writer, decay, qk, qb, qk, qb, row, C, 1, 2, DOT, PRECISION
            )
            store_whole(whole + here * K, c, K, total)
        else:
            qk += dot(query, tl.trans(key), DOT, PRECISION)
            qb += dot(query, tl.trans(writer), DOT, PRECISION)
        if REVERSE:
            store_rows(E + out, line, count, c, K, query, C, BLOCK_K, WARPS)
            store_rows(Q + out, line, count, c, K, key, C, BLOCK_K, WARPS)
            store_rows(W + out, line, count, c, K, writer, C, BLOCK_K, WARPS)
        else:
            store_rows(Q + out, line, count, c, K, query, C, BLOCK_K, WARPS)
            store_rows(E + out, line, count, c, K, key, C, BLOCK_K, WARPS)
            store_rows(F + out, line, count, c, K, writer, C, BLOCK_K, WARPS)
    if DECAY:
        qk = with_near(qk, own_k, near_k, row)
        qb = with_near(qb, own_b, near_b, row)
    else:
        qk = tl.where(row[:, None] >= row[None, :], qk, 0.0)
        qb = tl.where(row[:, None] >= row[None, :], qb, 0.0)
    store_matrix(P + here * C * C, qk, C)
    store_matrix(Y + here * C * C, qb, C)

    ak = tl.zeros([C, C], tl.float32)
    ab = tl.zeros([C, C], tl.float32)
    near_k = tl.zeros([C], tl.float32)
    near_b = tl.zeros([C], tl.float32)
    for c in range(0, K, BLOCK_K):
        reader = load_rows(a, a_t, 1, count, c, K, C, BLOCK_K, WARPS)
        key = load_rows(k, k_t, 1, count, c, K, C, BLOCK_K, WARPS)
        writer = load_rows(b, b_t, 1, count, c, K, C, BLOCK_K, WARPS)
        if DECAY:
            decay = tl.exp(load_rows(g, g_t, g_k, count, c, K, C, BLOCK_K, WARPS))
            near_k += neighbours(reader, key)
            near_b += neighbours(reader, writer)
            ak, ab, _s21, _s22, reader, _r2, _key, _writer, _total = by_halves(
                reader, reader, key, writer, decay, ak, ab, ak, ab, row, C, 1, 2, DOT, PRECISION
            )
        else:
            ak += dot(reader, tl.trans(key), DOT, PRECISION)
            ab += dot(reader, tl.trans(writer), DOT, PRECISION)
        if REVERSE:
            store_rows(F + out, line, count, c, K, reader, C, BLOCK_K, WARPS)
        else:
            store_rows(W + out, line, count, c, K, reader, C, BLOCK_K, WARPS)
    if DECAY:
        ak = with_near(ak, None, near_k, row)
        ab = with_near(ab, None, near_b, row)
    else:
        ak = tl.where(row[:, None] > row[None, :], ak, 0.0)
        ab = tl.where(row[:, None] > row[None, :], ab, 0.0)

    tl.debug_barrier()
    solved = inverse(-ab, row, PRECISION)
    fresh = dot(solved, ak, DOT, PRECISION)
    through = dot(load_matrix(Y + here * C * C, C), solved, DOT, PRECISION)
    scores = load_matrix(P + here * C * C, C) + dot(through, ak, DOT, PRECISION)
    tl.debug_barrier()
    if REVERSE:
        store_matrix(P + here * C * C, tl.trans(scores), C)
        store_matrix(Y + here * C * C, tl.trans(through), C)
    else:
        store_matrix(P + here * C * C, scores, C)
        store_matrix(Y + here * C * C, fresh, C)
    for c in range(0, K, BLOCK_K):
        straight = load_rows(Q + out, line, 1, count, c, K, C, BLOCK_K, WARPS)
        x = load_rows(W + out, line, 1, count, c, K, C, BLOCK_K, WARPS)
        if REVERSE:
            straight += dot(tl.trans(fresh), x, DOT, PRECISION)
            x = dot(tl.trans(solved), x, DOT, PRECISION)
        else:
            straight += dot(through, x, DOT, PRECISION)
            x = dot(solved, x, DOT, PRECISION)
        store_rows(Q + out, line, count, c, K, straight, C, BLOCK_K, WARPS)
        store_rows(W + out, line, count, c, K, x, C, BLOCK_K, WARPS)
