"""Chunks of the generalised delta rule made ready for the pass over the states, and for that of the gradients."""

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.launch import kernel
from subquad.kernels.triton.pair_scores import Scores, gentle, pair_scores, strong
from subquad.kernels.triton.prepare import chunk_matrices, inverse, launch, load_matrix, store_matrix
from subquad.kernels.triton.segments import Segments, segment_bounds
from subquad.kernels.triton.tiles import dot, load_tile


class DplrChunks(NamedTuple):
    """With v the values, and the gradients do of what is read, e of what a reads, u:

    u = T (ak v + a S),  o = qk v + qb u + q S,  S <- whole S + k^T v + b^T u, and back
    e = T^T (qb^T do + b dS),  dv = qk^T do + ak^T e + k dS,  dS <- whole dS + q^T do + a^T e.
    """

    T: Tensor  # [n, H, C, C]: of what a write changes in later ones
    qk: Tensor  # [n, H, C, C], as are the others: what readers and writers have to do with each other
    qb: Tensor
    ak: Tensor
    q: Tensor  # [B, T, H, K]: decayed since the chunk's start
    a: Tensor
    k: Tensor  # [B, T, H, K]: decayed to its end
    b: Tensor
    whole: Tensor  # [n, H, K] float32

    def forward(self) -> dict[str, Tensor]:
        """As `Affine` takes them, of v."""
        return {
            "T": self.T, "X": self.ak, "P": self.qk, "U": self.qb, "R": self.a, "Q": self.q, "E": self.k, "F": self.b,
            "whole": self.whole,
        }  # fmt: skip

    def backward(self) -> dict[str, Tensor]:
        """As a reversed `Affine` takes them, of do; u is e there, and o dv."""
        return {
            "T": self.T, "X": self.qb, "P": self.qk, "U": self.ak, "R": self.b, "Q": self.k, "E": self.q, "F": self.a,
            "whole": self.whole,
        }  # fmt: skip


def dplr_scores(q: Tensor, k: Tensor, a: Tensor, b: Tensor, g: Tensor, chunks: Segments) -> Scores:
    """What `prepare_dplr` takes; q, k, a, b: [B, T, H, K]; g: [B, T, H, K], with any strides."""
    return pair_scores(q, a, k, b, g, chunks, exclusive=(False, True))


def prepare_dplr(scores: Scores, chunks: Segments) -> DplrChunks:
    """chunks = cut(q, cu_seqlens, CHUNK). Rows that belong to no sequence stay unwritten."""
    q, a, k, b, k_grown, b_grown, whole, sums = scores.rows
    (_, T, H, K), n = k.shape, chunks.count
    matrices = [chunk_matrices(k, n, H) for _ in range(4)]
    if n * H:
        prepare_dplr_kernel[(n * H,)](
            q, a, k_grown, b_grown, sums, scores.pairs, *matrices,
            chunks.table, T, chunks.per_sequence, chunks.packed, H, **launch("prepare_dplr", k, K),
        )  # fmt: skip
    return DplrChunks(*matrices, q, a, k, b, whole)


@kernel(do_not_specialize=["T", "per_sequence", "packed"])
def prepare_dplr_kernel(
    # q and a decayed since the chunk's start, k and b grown back to it
    q, a, k, b, sums, pairs, inverses, of_qk, of_qb, of_ak, table, T, per_sequence, packed, H,
    K: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) // H
    h = tl.program_id(0) % H
    batch, start, end, _ = segment_bounds(table, n, T, C, per_sequence, packed)
    row = tl.arange(0, C)
    inside = row < end - start
    at = ((batch * T + start) * H + h) * K
    here = tl.program_id(0).to(tl.int64)
    sums += here * (C * K)
    served = gentle(sums, K, C)
    qk = tl.zeros([C, C], tl.float32)
    qb = tl.zeros([C, C], tl.float32)
    ak = tl.zeros([C, C], tl.float32)
    ab = tl.zeros([C, C], tl.float32)
    for c in tl.static_range(0, K, BLOCK_K):
        col = c + tl.arange(0, BLOCK_K)
        reader = load_tile(q + at, H * K, row, col, inside, K)
        early = load_tile(a + at, H * K, row, col, inside, K)
        key = load_tile(k + at, H * K, row, col, inside, K)
        writer = load_tile(b + at, H * K, row, col, inside, K)
        qk += dot(reader, tl.trans(key), DOT, PRECISION)
        qb += dot(reader, tl.trans(writer), DOT, PRECISION)
        ak += dot(early, tl.trans(key), DOT, PRECISION)
        ab += dot(early, tl.trans(writer), DOT, PRECISION)
    if not served:
        there = strong(sums, row, 0, K)[:, None]
        pairs += here * (4 * C * C)
        qk = tl.where(there, load_matrix(pairs, C, 2 * C), qk)
        qb = tl.where(there, load_matrix(pairs + C, C, 2 * C), qb)
        there = strong(sums, row, 1, K)[:, None]
        ak = tl.where(there, load_matrix(pairs + 2 * C * C, C, 2 * C), ak)
        ab = tl.where(there, load_matrix(pairs + 2 * C * C + C, C, 2 * C), ab)
    sees = row[:, None] >= row[None, :]
    follows = row[:, None] > row[None, :]
    store_matrix(of_qk + here * C * C, tl.where(sees, qk, 0.0), C, C)
    store_matrix(of_qb + here * C * C, tl.where(sees, qb, 0.0), C, C)
    store_matrix(of_ak + here * C * C, tl.where(follows, ak, 0.0), C, C)
    store_matrix(inverses + here * C * C, inverse(tl.where(follows, -ab, 0.0), row, PRECISION), C, C)
