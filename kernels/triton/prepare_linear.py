"""Chunks of linear attention with a decay for every channel, made ready for the pass over the states."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.prepare import (
    by_halves,
    chunk_matrices,
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
from subquad.kernels.triton.tiles import rows


class LinearChunks(NamedTuple):
    """With D_ij the decay from token j to what reader i sees: o = P x + q_s S, S <- whole * S + k_e^T x."""

    P: Tensor  # [n, H, C, C]: q_i . (D_ij * k_j), the readers after their writers, and the bonus
    q_s: Tensor  # [B, T, H, K]: readers decayed since the chunk's start
    k_e: Tensor  # [B, T, H, K]: writers decayed to its end
    whole: Tensor  # [n, H, K] float32


def prepare_linear(
    q: Tensor, k: Tensor, g: Tensor, chunks: Segments, *, exclusive: bool = False, bonus: Tensor | None = None
) -> LinearChunks:
    """q, k: [B, T, G, K]; g: [B, T, H, K] float32, with any strides; bonus: [H, K]; chunks = cut(q, cu_seqlens, CHUNK).

    Rows that belong to no sequence stay unwritten.
    """
    q, k = rows(q), rows(k)
    H, K = g.shape[2:]
    share = H // q.shape[2]
    found = LinearChunks(
        chunk_matrices(q, chunks, H), row_tensor(q, H, K), row_tensor(q, H, K),
        torch.empty(chunks.count, H, K, dtype=torch.float32, device=q.device),
    )  # fmt: skip
    if chunks.count * H:
        prepare_linear_kernel[(chunks.count * H,)](
            q, *q.stride()[:3], k, *k.stride()[:3], share, g, *g.stride(),
            None if bonus is None else bonus.float().contiguous(), *found,
            chunks.table, q.shape[1], chunks.size, chunks.per_sequence, chunks.packed, H,
            EXCLUSIVE=exclusive, **launch("prepare_linear", q, K),
        )  # fmt: skip
    return found


@triton.jit(do_not_specialize=["T", "segment", "per_sequence", "packed"])
def prepare_linear_kernel(
    q, q_b, q_t, q_h, k, k_b, k_t, k_h, share, g, g_b, g_t, g_h, g_k, bonus, P, q_s, k_e, whole,
    table, T, segment, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, EXCLUSIVE: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    b, start, end, _chunk = segment_bounds(table, n, T, segment, per_sequence, packed)
    count = end - start
    first = start.to(tl.int64)
    row = tl.arange(0, C)
    q += b * q_b + first * q_t + (h // share) * q_h
    k += b * k_b + first * k_t + (h // share) * k_h
    g += b * g_b + first * g_t + h * g_h
    out = ((b * T + first) * H + h) * K
    here = tl.program_id(0).to(tl.int64)

    scores = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    near = tl.zeros([C], tl.float32)
    for c in range(0, K, BLOCK_K):
        reader = load_rows(q, q_t, 1, count, c, K, C, BLOCK_K, WARPS)
        writer = load_rows(k, k_t, 1, count, c, K, C, BLOCK_K, WARPS)
        decay = tl.exp(load_rows(g, g_t, g_k, count, c, K, C, BLOCK_K, WARPS))
        if bonus is not None:
            col = c + tl.arange(0, BLOCK_K)
            weight = tl.load(bonus + h * K + col, mask=col < K, other=0.0)
            own += tl.sum(reader * writer * weight[None, :], 1)
        if not EXCLUSIVE:
            own += tl.sum(reader * writer, 1)
            reader *= decay
        near += neighbours(reader, writer)
        scores, _s12, _s21, _s22, reader, _r2, writer, _w2, total = by_halves(
            reader, reader, writer, writer, decay, scores, scores, scores, scores, row, C, 1, 1, DOT, PRECISION
        )
        store_rows(q_s + out, H * K, count, c, K, reader, C, BLOCK_K, WARPS)
        store_rows(k_e + out, H * K, count, c, K, writer, C, BLOCK_K, WARPS)
        store_whole(whole + here * K, c, K, total)
    store_matrix(P + here * C * C, with_near(scores, own, near, row), C)
