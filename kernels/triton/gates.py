"""Scalar log decays cumulated within chunks, once for all the programs that read them, and their gradient."""

import torch
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.launch import cdiv, kernel, power_of_2
from subquad.kernels.triton.segments import CHUNK, Segments, cut, segment_bounds


@kernel(do_not_specialize=["g_b", "T", "per_sequence", "packed"])
def _cumulate(g, g_b, g_t, g_h, gates, table, T, per_sequence, packed, H, C: tl.constexpr, HEADS: tl.constexpr):
    n = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    b, start, end, _ = segment_bounds(table, n, T, C, per_sequence, packed)
    row = tl.arange(0, C)
    inside = (row < end - start)[:, None] & (head < H)[None, :]
    at = g + b * g_b + start.to(tl.int64) * g_t + row[:, None] * g_t + head[None, :] * g_h
    gate = tl.load(at, mask=inside, other=0.0).to(tl.float64)
    cumulated = tl.cumsum(gate, 0) * 1.4426950408889634
    high = cumulated.to(tl.float32)
    low = (cumulated - high.to(tl.float64)).to(tl.float32)
    rest = tl.sum(gate, 0)[None, :] * 1.4426950408889634 - cumulated
    since = tl.exp2(high)
    until = tl.exp2(tl.minimum(rest.to(tl.float32), 0.0))
    four = tl.join(tl.join(high, since), tl.join(low, until)).reshape(C, HEADS, 4)  # one store of 16 bytes a token
    to = gates + ((b * H + head[None, :]) * T + start + row[:, None]) * 4
    tl.store(to[:, :, None] + tl.arange(0, 4)[None, None, :], four, mask=inside[:, :, None])


def new_gates(g: Tensor) -> Tensor:
    """Room for what `cumulate` finds."""
    B, T, H = g.shape
    return torch.empty((B, H, T, 4), dtype=torch.float32, device=g.device)


def cumulate(g: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """What a chunk's tokens see of a log decay [B, T, H], float32 [B, H, T, 4].

    Its sum from the start of the chunk in powers of two, as a high and a low part; the decay since the start; and until
    the end. Differences of the pairs keep float64's precision: a float32 sum over gates that mix -0.01 and -1e4 is off
    by 4e-4.
    """
    T, H = g.shape[1:]
    gates = new_gates(g)
    chunks = cut(g, cu_seqlens, CHUNK)
    heads = min(16, power_of_2(H))
    if gates.numel():
        _cumulate[(chunks.count, cdiv(H, heads))](
            g, *g.stride(), gates, chunks.table, T, chunks.per_sequence, chunks.packed, H, C=CHUNK, HEADS=heads,
        )  # fmt: skip
    return gates


@kernel(do_not_specialize=["n_rows", "T", "segment", "per_sequence", "packed", "crossed"])
def _gate_gradient(
    up, down, n_up, n_down, n_rows, edge, dg, table, T, segment, per_sequence, packed, crossed, H,
    C: tl.constexpr, EXCLUSIVE: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0)
    h = tl.program_id(1)
    b, start, end, _ = segment_bounds(table, n, T, segment, per_sequence, packed)
    row = tl.arange(0, C)
    later = tl.load(edge + n * H + h, mask=crossed != 0, other=0.0).to(tl.float64)
    n_chunks = (end - start + C - 1) // C
    for i in range(n_chunks):
        first = start + (n_chunks - 1 - i) * C
        inside = row < end - first
        line = ((b * T + first) * H + h) + row * H
        read = tl.zeros([C], tl.float64)
        for k in range(n_up):
            read += tl.load(up + k * n_rows.to(tl.int64) * H + line, mask=inside, other=0.0).to(tl.float64)
        written = tl.zeros([C], tl.float64)
        for k in range(n_down):
            written += tl.load(down + k * n_rows.to(tl.int64) * H + line, mask=inside, other=0.0).to(tl.float64)
        change = read - written
        since = tl.sum(change, 0) - tl.cumsum(change, 0)  # of the tokens after each in this chunk
        gradient = later + since
        if EXCLUSIVE:
            gradient -= written
        else:
            gradient += change
        tl.store(dg + line, gradient.to(tl.float32), mask=inside)
        later += tl.sum(change, 0)


def gate_gradient(up: Tensor, down: Tensor, edge: Tensor | None, within: Segments, exclusive: bool) -> Tensor:
    """The gradient of a scalar log decay [B, T, H] from what tokens read (`up`) and write (`down`), [parts, B, T, H].

    A decay stands between all tokens written before it and all read from it on. Let R_i = r_i . dr_i be reader i's
    share and W_j = w_j . dw_j writer j's; each pair is in both. So dg_t = sum_{i>=t} R_i - sum_{j>=t} W_j plus what
    crosses the end: <S, dS> there (`edge` [n, H]). It is summed within segments, where rounding cannot pile up.
    """
    _, B, T, H = up.shape
    dg = up.new_empty(B, T, H)
    if dg.numel():
        _gate_gradient[(within.count, H)](
            up, down, up.shape[0], down.shape[0], B * T, up if edge is None else edge, dg, within.table, T, within.size,
            within.per_sequence, within.packed, int(edge is not None), H, C=512, EXCLUSIVE=exclusive,
        )  # fmt: skip
    return dg
