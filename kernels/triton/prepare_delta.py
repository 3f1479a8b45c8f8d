"""Chunks of the delta rule made ready for the pass over the states, and for that of the gradients."""

from functools import partial
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.launch import kernel
from subquad.kernels.triton.pair_scores import Scores, gentle, pair_scores, strong
from subquad.kernels.triton.prepare import chunk_matrices, inverse, launch, load_matrix, store_matrix
from subquad.kernels.triton.segments import CHUNK, Segments, segment_bounds
from subquad.kernels.triton.tiles import cumulated, dot, exp2, load_tile, shared, store_tile


class DeltaChunks(NamedTuple):
    """With v the values, and the gradients do of what is read, e of the writes u:

    u = T (strength v + removal R S),  o = P u + since Q S,  S <- whole S + (until F)^T u, and back
    e = T^T (P^T do + until F dS),  dS <- whole dS + E^T do + (removal R)^T e.

    Factors of rows are float32 [n, H, C], None where rows are decayed already or nothing is.
    """

    T: Tensor  # [n, H, C, C]: of what a write removes from later ones
    P: Tensor  # [n, H, C, C]: what readers see of writes
    Q: Tensor  # [B, T, heads, K]: readers
    R: Tensor  # [B, T, heads, K]: keys as readers, decayed since the chunk's start
    F: Tensor  # [B, T, heads, K]: keys as writers, decayed to its end
    E: Tensor | None  # [B, T, heads, K]: readers decayed since the chunk's start; None if not asked for
    removal: Tensor  # -beta, and R's decay
    whole: Tensor | None  # float32 [n, H, K], [n, H] for a scalar decay
    strength: Tensor | None = None  # beta; not for the way back
    since: Tensor | None = None
    until: Tensor | None = None

    def forward(self) -> dict[str, Tensor | None]:
        """As `Affine` takes them, of v."""
        return {
            "T": self.T, "U": self.P, "Q": self.Q, "R": self.R, "F": self.F, "X_gain": self.strength,
            "R_gain": self.removal, "Q_gain": self.since, "F_gain": self.until, "whole": self.whole,
        }  # fmt: skip

    def backward(self) -> dict[str, Tensor | None]:
        """As a reversed `Affine` takes them, of do; u is e there."""
        return {
            "T": self.T, "X": self.P, "E": self.E, "R": self.F, "F": self.R, "R_gain": self.until,
            "F_gain": self.removal, "whole": self.whole,
        }  # fmt: skip


def delta_scores(q: Tensor, k: Tensor, g: Tensor, chunks: Segments) -> Scores:
    """What `prepare_delta` takes for a decay for every channel, g [B, T, H, K]."""
    return pair_scores(q, k, k, None, g, chunks, exclusive=(False, False))


def prepare_delta(
    q: Tensor, k: Tensor, beta: Tensor, g: Tensor | Scores | None, chunks: Segments, *, back: bool = False
) -> DeltaChunks:
    """q, k: [B, T, heads, K], whose heads divide H; beta: [B, T, H]; g: None, a decay [B, T, H] in float32, or
    `delta_scores` of one for every channel; chunks = cut(q, cu_seqlens, CHUNK); `back` asks for E.

    Rows that belong to no sequence stay unwritten.
    """
    H, K = beta.shape[2], q.shape[3]
    like, n = q, chunks.count
    factors = partial(torch.empty, n, H, CHUNK, dtype=torch.float32, device=q.device)
    T, P, strength, removal = chunk_matrices(q, n, H), chunk_matrices(q, n, H), factors(), factors()
    grown = sums = pairs = decayed = None
    gate = 0 if g is None else 2 if isinstance(g, Scores) else 1
    if gate == 2:
        q, k, until, _, grown, _, whole, sums = g.rows
        pairs = g.pairs
        found = DeltaChunks(T, P, q, k, until, q, removal, whole, strength)
    elif gate == 1:
        decayed = q.new_empty(*q.shape[:2], H, K) if back else None
        whole = factors().new_empty(n, H)
        found = DeltaChunks(T, P, q, k, k, decayed, removal, whole, strength, factors(), factors())
    else:
        found = DeltaChunks(T, P, q, k, k, q, removal, None, strength)
    if n * H:
        prepare_delta_kernel[(n * H,)](
            *shared(q, H), *shared(k, H), beta, *beta.stride(), *((g, *g.stride()) if gate == 1 else (None, 0, 0, 0)),
            grown, sums, pairs, T, P, strength, removal, found.since, found.until,
            found.whole if gate == 1 else None, decayed,
            chunks.table, q.shape[1], chunks.size, chunks.per_sequence, chunks.packed, H,
            GATE=gate, **launch("prepare_delta", like, K, gates=gate),
        )  # fmt: skip
    return found


@kernel(do_not_specialize=["beta_b", "g_b", "T", "segment", "per_sequence", "packed"])
def prepare_delta_kernel(
    q, q_b, q_t, q_h, q_share, k, k_b, k_t, k_h, k_share, beta, beta_b, beta_t, beta_h, g, g_b, g_t, g_h,
    grown, sums, pairs,  # of a decay for every channel, which q and k have in them then
    inverses, reads, strengths, removals, sinces, untils, whole, decayed,
    table, T, segment, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, GATE: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    b, start, end, _chunk = segment_bounds(table, n, T, segment, per_sequence, packed)
    first = start.to(tl.int64)
    row = tl.arange(0, C)
    inside = row < end - start
    q += b * q_b + first * q_t + (h // q_share) * q_h
    k += b * k_b + first * k_t + (h // k_share) * k_h
    out = ((b * T + first) * H + h) * K
    here = tl.program_id(0).to(tl.int64)
    at = beta + b * beta_b + first * beta_t + h * beta_h + row * beta_t
    strength = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(strengths + here * C + row, strength)
    if GATE == 1:
        gate = tl.load(g + b * g_b + first * g_t + h * g_h + row * g_t, mask=inside, other=0.0)
        high, low, _, _, since, until, total = cumulated(gate, False)
        tl.store(whole + here, tl.exp(total))
        tl.store(sinces + here * C + row, since)
        tl.store(untils + here * C + row, until)
        tl.store(removals + here * C + row, -strength * since)
    else:
        tl.store(removals + here * C + row, -strength)
    if GATE == 2:
        sums += here * (C * K)
        served = gentle(sums, K, C)

    # The scores of all pairs.
    P = tl.zeros([C, C], tl.float32)
    A = tl.zeros([C, C], tl.float32)
    for c in tl.static_range(0, K, BLOCK_K):
        col = c + tl.arange(0, BLOCK_K)
        reader = load_tile(q, q_t, row, col, inside, K)
        key = load_tile(k, k_t, row, col, inside, K)
        writer = load_tile(grown + out, H * K, row, col, inside, K) if GATE == 2 else key
        P += dot(reader, tl.trans(writer), DOT, PRECISION)
        A += dot(key, tl.trans(writer), DOT, PRECISION)
    if GATE == 1:
        gap = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        decay = exp2(tl.where(row[:, None] >= row[None, :], gap * 1.4426950408889634, float("-inf")))
        P *= decay
        A *= decay
    elif GATE == 2:
        pairs += here * (2 * C * C)
        if not served:
            there = strong(sums, row, 0, K)[:, None]
            P = tl.where(there, load_matrix(pairs, C, C), P)
            A = tl.where(there, load_matrix(pairs + C * C, C, C), A)
    if GATE != 1:
        P = tl.where(row[:, None] >= row[None, :], P, 0.0)
    store_matrix(reads + here * C * C, P, C, C)
    A = tl.where(row[:, None] > row[None, :], A * strength[:, None], 0.0)
    store_matrix(inverses + here * C * C, inverse(A, row, PRECISION), C, C)
    if decayed is not None:  # beside the products above triton 3.6 has misaligned accesses for 80 columns of float32
        for c in tl.static_range(0, K, BLOCK_K):
            col = c + tl.arange(0, BLOCK_K)
            early = load_tile(q, q_t, row, col, inside, K).to(tl.float32)
            store_tile(decayed + out, H * K, row, col, inside, early * since[:, None], K)
