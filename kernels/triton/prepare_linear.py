"""Chunks of linear attention with a decay for every channel, made ready for the pass over the states."""

from typing import NamedTuple

from torch import Tensor

from subquad.kernels.triton.pair_scores import Scores, new_scores, pair_scores
from subquad.kernels.triton.segments import Segments


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
    """q, k: [B, T, G, K]; g: [B, T, H, K] float32, with any strides; bonus: [H, K]; chunks = cut(q, cu_seqlens, CHUNK).

    Rows that belong to no sequence stay unwritten.
    """
    found = pair_scores(q, None, k, None, g, chunks, exclusive=(exclusive, False), bonus=bonus, dtype=q.dtype)
    return _chunks(found)


def new_linear_chunks(q: Tensor, k: Tensor, H: int, n: int) -> LinearChunks:
    """Room for n chunks of H heads."""
    return _chunks(new_scores(q, None, k, None, H, n, q.dtype))


def _chunks(found: Scores) -> LinearChunks:
    return LinearChunks(found.pairs, found.r1_since, found.w1_until, found.whole, found.sums)
