"""Gradients of what reads and writes a matrix state, all chunks side by side.

Given the states S before each chunk and dS after it, nothing in a chunk waits for another one. Readers r_i with the
upstream gradients y_i [V] and writers w_j with the values x_j [V] meet as

    dr_i = sum_{j<=i} (y_i . x_j) D_ij w_j + since_i (S y_i)
    dw_j = sum_{i>=j} (y_i . x_j) D_ij r_i + until_j (dS x_j)

where D_ij = exp(G_i - G_j) decays from writer to reader, `since` from the chunk's start and `until` to its end. A
second reader never reads its own token. Linear attention has one reader and one writer, the delta rule (Yang et al.
2024, "Parallelizing linear transformers with the delta rule") a second reader, its generalisation (Peng et al. 2025)
two of both. A program takes some columns of K, so the products y . x are made once a block of them.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.configs import config
from subquad.kernels.triton.segments import CHUNK, Segments, segment_bounds
from subquad.kernels.triton.tiles import cumulated, dot, load_tile, padded, precision, rows, store_tile


@triton.jit
def _add(total, a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), total, input_precision=PRECISION)


@triton.jit
def _diagonal(pairs, row):
    return tl.sum(tl.where(row[:, None] == row[None, :], pairs, 0.0), 1)


@triton.jit
def _decay(counts, gate, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """exp of the sums of log decays over the rows that count, [C, C] @ [C, BLOCK_K].

    Terms of one sign cannot cancel, so decays come out as exact as the gates go in. A relative error of the sum counts
    most where the decay is 1 / e: two bfloat16 parts, 16 bits, leave 3e-6 of it.
    """
    weight = tl.where(counts, 1.0, 0.0).to(DOT)
    high = gate.to(DOT)
    if high.dtype.primitive_bitwidth == 16:
        total = tl.dot(weight, (gate - high.to(tl.float32)).to(DOT))
        total = tl.dot(weight, high, total)
    else:
        total = tl.dot(weight, high, input_precision="ieee" if PRECISION == "ieee" else "tf32x3")
    return tl.exp(total)


@triton.jit(do_not_specialize=["T", "per_sequence", "packed", "n_rows"])
def chunk_gradient(
    # Row tensors [B, T, heads, width] come with their strides; r and w also with how many of our heads share one.
    r1, r1_b, r1_t, r1_h, r1_share,
    r2, r2_b, r2_t, r2_h, r2_share,
    w1, w1_b, w1_t, w1_h, w1_share,
    w2, w2_b, w2_t, w2_h, w2_share,
    y1, y1_b, y1_t, y1_h,
    y2, y2_b, y2_t, y2_h,
    x1, x1_b, x1_t, x1_h,
    x2, x2_b, x2_t, x2_h,
    # log decay [B, T, H] or [B, T, H, K]
    g, g_b, g_t, g_h,
    # the delta rule's write strength [B, T, H] and values: r2 is w1 there and weighs -beta
    beta, beta_b, beta_t, beta_h,
    v, v_b, v_t, v_h,
    # weight [H, K] of a token's own writer in what an exclusive r1 reads
    bonus,
    # before and after each chunk [n, H, K, V]
    states, d_states,
    # out, contiguous: dr1, dr2, dw1, dw2, dv and a vector's dg are [B, T, H, width]; dbeta and a scalar's dg
    # [blocks, B, T, H]; dbonus [n, H, K]
    dr1, dr2, dw1, dw2, dg, dv, dbeta, dbonus,
    table, T, per_sequence, packed, n_rows, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, VECTOR: tl.constexpr,
    # Whether readers come before their own token's decay. Where only r2 does, the gates are vectors or none.
    EXCLUSIVE1: tl.constexpr, EXCLUSIVE2: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    DELTA: tl.constexpr = beta is not None
    # `since` leaves out the own token's decay where one of the readers does; the other then takes it by itself.
    EXCLUSIVE: tl.constexpr = EXCLUSIVE1 or EXCLUSIVE2
    APART: tl.constexpr = EXCLUSIVE2 and g is not None
    program = tl.program_id(0)
    block = program % N_BLOCKS
    h = (program // N_BLOCKS) % H
    n = program // (N_BLOCKS * H)
    b, start, end, _ = segment_bounds(table, n, T, C, per_sequence, packed)
    row = tl.arange(0, C)
    key = block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = row < end - start
    at = start.to(tl.int64)
    line = ((b * T + at) * H + h).to(tl.int64)  # of a contiguous [B, T, H]
    part = block.to(tl.int64) * n_rows * H + line  # of a contiguous [blocks, B, T, H]
    if end <= start:
        if dbonus is not None:
            tl.store(dbonus + (n * H + h) * K + key, tl.zeros([BLOCK_K], tl.float32), mask=key < K)
        return

    # What each y has to do with each x, and with the states.
    m11 = tl.zeros([C, C], tl.float32)
    read1 = tl.zeros([C, BLOCK_K], tl.float32)
    kept1 = tl.zeros([C, BLOCK_K], tl.float32)
    crossing = tl.zeros([BLOCK_K], tl.float32)
    if r2 is not None:
        m21 = tl.zeros([C, C], tl.float32)
        read2 = tl.zeros([C, BLOCK_K], tl.float32)
    if w2 is not None:
        m12 = tl.zeros([C, C], tl.float32)
        kept2 = tl.zeros([C, BLOCK_K], tl.float32)
        if r2 is not None:
            m22 = tl.zeros([C, C], tl.float32)
    if DELTA:
        strength = tl.load(beta + b * beta_b + at * beta_t + h * beta_h + row * beta_t, mask=inside, other=0.0)
        strength = strength.to(tl.float32)
        in_first = row < (end - start) * (block == 0).to(tl.int32)  # one block's programs see to what has no K
        dstrength = tl.zeros([C], tl.float32)
    state_at = (n * H + h).to(tl.int64) * K * V
    for c in range(0, V, BLOCK_V):
        col = c + tl.arange(0, BLOCK_V)
        S = load_tile(states + state_at, V, key, col, key < K, V)
        dS = load_tile(d_states + state_at, V, key, col, key < K, V)
        if g is not None:
            crossing += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        y = load_tile(y1 + b * y1_b + at * y1_t + h * y1_h, y1_t, row, col, inside, V)
        x = load_tile(x1 + b * x1_b + at * x1_t + h * x1_h, x1_t, row, col, inside, V)
        m11 = _add(m11, y, tl.trans(x), DOT, PRECISION)
        read1 = _add(read1, y, tl.trans(S), DOT, PRECISION)
        kept1 = _add(kept1, x, tl.trans(dS), DOT, PRECISION)
        if r2 is not None:
            y_second = load_tile(y2 + b * y2_b + at * y2_t + h * y2_h, y2_t, row, col, inside, V)
            m21 = _add(m21, y_second, tl.trans(x), DOT, PRECISION)
            read2 = _add(read2, y_second, tl.trans(S), DOT, PRECISION)
        if w2 is not None:
            x_second = load_tile(x2 + b * x2_b + at * x2_t + h * x2_h, x2_t, row, col, inside, V)
            m12 = _add(m12, y, tl.trans(x_second), DOT, PRECISION)
            kept2 = _add(kept2, x_second, tl.trans(dS), DOT, PRECISION)
            if r2 is not None:
                m22 = _add(m22, y_second, tl.trans(x_second), DOT, PRECISION)
        if DELTA:
            value = load_tile(v + b * v_b + at * v_t + h * v_h, v_t, row, col, in_first, V).to(tl.float32)
            dstrength += tl.sum(y_second.to(tl.float32) * value, 1)
            store_tile(dv + line * V, H * V, row, col, in_first, strength[:, None] * y_second.to(tl.float32), V)

    # Decays since the chunk's start and until its end.
    if VECTOR:
        gate = load_tile(g + b * g_b + at * g_t + h * g_h, g_t, row, key, inside, K).to(tl.float32)
        until = _decay(row[:, None] < row[None, :], gate, DOT, PRECISION)
        if EXCLUSIVE:
            since = _decay(row[:, None] > row[None, :], gate, DOT, PRECISION)
        else:
            since = _decay(row[:, None] >= row[None, :], gate, DOT, PRECISION)
        crossing *= tl.exp(tl.sum(gate, 0))
    elif g is not None:
        gate = tl.load(g + b * g_b + at * g_t + h * g_h + row * g_t, mask=inside, other=0.0)
        q_high, q_low, k_high, k_low, since_start, until_end, whole = cumulated(gate, EXCLUSIVE)
        since, until = since_start[:, None], until_end[:, None]
        crossing *= tl.exp(whole)
    else:
        since, until = 1.0, 1.0

    # The share of the states.
    writer1 = load_tile(w1 + b * w1_b + at * w1_t + (h // w1_share) * w1_h, w1_t, row, key, inside, K).to(tl.float32)
    reader1 = load_tile(r1 + b * r1_b + at * r1_t + (h // r1_share) * r1_h, r1_t, row, key, inside, K).to(tl.float32)
    if APART:
        reader1 *= tl.exp(gate)
    read1 *= since
    kept1 *= until
    crossing += tl.sum(writer1 * kept1, 0)
    if r2 is not None:
        read2 *= since
        if DELTA:
            reader2 = writer1 * -strength[:, None]
        else:
            at2 = r2 + b * r2_b + at * r2_t + (h // r2_share) * r2_h
            reader2 = load_tile(at2, r2_t, row, key, inside, K).to(tl.float32)
    if w2 is not None:
        at2 = w2 + b * w2_b + at * w2_t + (h // w2_share) * w2_h
        writer2 = load_tile(at2, w2_t, row, key, inside, K).to(tl.float32)
        kept2 *= until
        crossing += tl.sum(writer2 * kept2, 0)

    # The share of the pairs within the chunk but for each token with itself, whom no decay stands between.
    if VECTOR:
        # Two neighbouring blocks of 1, 2, 4, .. tokens meet: readers of the second, decayed since its start, and
        # writers of the first, decayed until its end. So no exponent is above zero, and none is a difference.
        for level in range(LEVELS):
            # Of each row, which rows' decays it takes and whom it meets: what depends on the level is one-dimensional
            # first, or the compiler keeps whole matrices of indices in registers through the loop.
            number = row >> level
            second = (number & 1) == 1
            first_counted = tl.where(second, number << level, row + 1)
            end_counted = tl.where(second, row if EXCLUSIVE else row + 1, (number + 1) << level)
            counts = (row[None, :] >= first_counted[:, None]) & (row[None, :] < end_counted[:, None])
            decay = _decay(counts, gate, DOT, PRECISION)
            meet = tl.where(second, number - 1, -1)[:, None] == tl.where(second, -2, number)[None, :]
            pairs = tl.where(meet, m11, 0.0).to(DOT)
            late, early = (reader1 * decay).to(DOT), (writer1 * decay).to(DOT)
            to_reader = dot(pairs, early, DOT, PRECISION)
            to_writer = dot(tl.trans(pairs), late, DOT, PRECISION)
            if w2 is not None:
                pairs = tl.where(meet, m12, 0.0).to(DOT)
                early2 = (writer2 * decay).to(DOT)
                to_reader = _add(to_reader, pairs, early2, DOT, PRECISION)
                to_writer2 = dot(tl.trans(pairs), late, DOT, PRECISION)
            read1 += decay * to_reader
            if r2 is not None:
                pairs = tl.where(meet, m21, 0.0).to(DOT)
                late = (reader2 * decay).to(DOT)
                to_reader = dot(pairs, early, DOT, PRECISION)
                to_writer = _add(to_writer, tl.trans(pairs), late, DOT, PRECISION)
                if w2 is not None:
                    pairs = tl.where(meet, m22, 0.0).to(DOT)
                    to_reader = _add(to_reader, pairs, early2, DOT, PRECISION)
                    to_writer2 = _add(to_writer2, tl.trans(pairs), late, DOT, PRECISION)
                read2 += decay * to_reader
            kept1 += decay * to_writer
            if w2 is not None:
                kept2 += decay * to_writer2
    else:
        weights = tl.where(row[:, None] > row[None, :], 1.0, 0.0)
        if g is not None:
            gap = (q_high[:, None] - k_high[None, :]) + (q_low[:, None] - k_low[None, :])
            weights = tl.exp(tl.where(row[:, None] > row[None, :], gap, float("-inf")))
        pairs = weights * m11
        read1 = _add(read1, pairs, writer1, DOT, PRECISION)
        kept1 = _add(kept1, tl.trans(pairs), reader1, DOT, PRECISION)
        if w2 is not None:
            pairs = weights * m12
            read1 = _add(read1, pairs, writer2, DOT, PRECISION)
            kept2 = _add(kept2, tl.trans(pairs), reader1, DOT, PRECISION)
        if r2 is not None:
            pairs = weights * m21
            read2 = _add(read2, pairs, writer1, DOT, PRECISION)
            kept1 = _add(kept1, tl.trans(pairs), reader2, DOT, PRECISION)
            if w2 is not None:
                pairs = weights * m22
                read2 = _add(read2, pairs, writer2, DOT, PRECISION)
                kept2 = _add(kept2, tl.trans(pairs), reader2, DOT, PRECISION)

    # A decay stands between all that was written before it and all that is read from it on, or after it.
    if g is not None:
        change = reader1 * read1 - writer1 * kept1
        if w2 is not None:
            change -= writer2 * kept2
        if r2 is not None:
            change += reader2 * read2
        if EXCLUSIVE:
            before = reader1 * read1 if EXCLUSIVE1 else reader2 * read2
        if VECTOR:
            dgate = crossing[None, :] + tl.cumsum(change, 0, reverse=True)
            if EXCLUSIVE:
                dgate -= before
            store_tile(dg + line * K, H * K, row, key, inside, dgate, K)
        else:
            wide = tl.sum(change, 1).to(tl.float64)
            dgate = tl.sum(crossing, 0) + tl.sum(wide, 0) - tl.cumsum(wide, 0) + wide
            if EXCLUSIVE:
                dgate -= tl.sum(before, 1)
            tl.store(dg + part + row * H, dgate.to(tl.float32), mask=inside)

    if APART:
        gate = load_tile(g + b * g_b + at * g_t + h * g_h, g_t, row, key, inside, K).to(tl.float32)
        read1 *= tl.exp(gate)
        reader1 = load_tile(r1 + b * r1_b + at * r1_t + (h // r1_share) * r1_h, r1_t, row, key, inside, K)
        reader1 = reader1.to(tl.float32)
    if EXCLUSIVE1:
        if bonus is not None:
            own_weight = tl.load(bonus + h * K + key, mask=key < K, other=0.0).to(tl.float32)[None, :]
            same = _diagonal(m11, row)[:, None]
            d_weight = tl.sum(same * reader1 * writer1, 0)
            tl.store(dbonus + (n * H + h) * K + key, d_weight, mask=key < K)
            read1 += same * own_weight * writer1
            kept1 += same * own_weight * reader1
    else:
        same = _diagonal(m11, row)[:, None]
        read1 += same * writer1
        kept1 += same * reader1
        if w2 is not None:
            same = _diagonal(m12, row)[:, None]
            read1 += same * writer2
            kept2 += same * reader1

    if DELTA:
        dstrength -= tl.sum(writer1 * read2, 1)
        kept1 -= strength[:, None] * read2
        tl.store(dbeta + part + row * H, dstrength, mask=inside)
    elif r2 is not None:
        store_tile(dr2 + line * K, H * K, row, key, inside, read2, K)
    store_tile(dr1 + line * K, H * K, row, key, inside, read1, K)
    store_tile(dw1 + line * K, H * K, row, key, inside, kept1, K)
    if w2 is not None:
        store_tile(dw2 + line * K, H * K, row, key, inside, kept2, K)


class LinearGradient(NamedTuple):
    dq: Tensor  # [B, T, H, K], heads that share a q or k apart; in q's dtype
    dk: Tensor
    dg: Tensor | None  # float32, of g's shape
    dbonus: Tensor | None  # [H, K]


class DeltaGradient(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor  # [B, T, H, V]
    dbeta: Tensor  # [B, T, H]
    dg: Tensor | None


class DplrGradient(NamedTuple):
    dq: Tensor
    dk: Tensor
    da: Tensor
    db: Tensor
    dg: Tensor | None


def linear_gradient(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, do: Tensor, states: Tensor, d_states: Tensor, chunks: Segments,
    *, exclusive: bool = False, bonus: Tensor | None = None,
) -> LinearGradient:  # fmt: skip
    """Of linear attention; `bonus` [H, K] only if `exclusive`.

    For all three: g [B, T, H] or [B, T, H, K]; `states` and `d_states` [n, H, K, V] are S before and dS after each of
    `chunks`, which `cut` makes of CHUNK tokens. Rows of padding come out undefined.
    """
    launch = _Launch("linear_gradient", v, g, k, chunks)
    dq, dk = launch.like(q), launch.like(k)
    roles = {"dr1": dq, "dw1": dk, "exclusive": (exclusive, False)}
    if bonus is None:
        launch(q, None, k, None, do, None, v, None, states, d_states, **roles)
        return LinearGradient(dq, dk, launch.dg(), None)
    dbonus = launch.new(chunks.count, launch.H, launch.K)
    launch(q, None, k, None, do, None, v, None, states, d_states, bonus=bonus.contiguous(), dbonus=dbonus, **roles)
    return LinearGradient(dq, dk, launch.dg(), dbonus.sum(0).to(bonus.dtype))


def delta_gradient(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, do: Tensor, u: Tensor, e: Tensor,
    states: Tensor, d_states: Tensor, chunks: Segments,
) -> DeltaGradient:  # fmt: skip
    """Of the delta rule; u: its writes [B, T, H, V], e: their whole gradient."""
    launch = _Launch("delta_gradient", v, g, k, chunks)
    dq, dk, dv = launch.like(q), launch.like(k), torch.empty_like(v, memory_format=torch.contiguous_format)
    dbeta = launch.parts()
    launch(q, k, k, None, do, e, u, None, states, d_states, dr1=dq, dw1=dk, beta=beta, v=v, dv=dv, dbeta=dbeta)
    return DeltaGradient(dq, dk, dv, _sum(dbeta).to(beta.dtype), launch.dg())


def dplr_gradient(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, do: Tensor, u: Tensor, e: Tensor,
    states: Tensor, d_states: Tensor, chunks: Segments,
) -> DplrGradient:  # fmt: skip
    """Of the generalised delta rule; g: a vector or None; u: what `a` reads [B, T, H, V], e: its whole gradient."""
    launch = _Launch("dplr_gradient", v, g, k, chunks)
    dq, dk, da, db = (launch.like(x) for x in (q, k, a, b))
    launch(q, a, k, b, do, e, v, u, states, d_states, dr1=dq, dr2=da, dw1=dk, dw2=db, exclusive=(False, True))
    return DplrGradient(dq, dk, da, db, launch.dg())


class _Launch:
    """v [B, T, H, V] says how many rows, heads and values there are, and k the width."""

    def __init__(self, kernel: str, v: Tensor, g: Tensor | None, k: Tensor, chunks: Segments):
        self.B, self.T, self.H, self.V = v.shape
        self.v, self.g, self.K, self.chunks = v, g, k.shape[3], chunks
        gates = 0 if g is None else g.dim() - 2  # none, one a head, one a channel
        chosen = config(kernel, device=v.device, K=self.K, V=self.V, size=v.element_size(), gates=gates)
        tiles = {"BLOCK_K": min(chosen["BLOCK_K"], padded(self.K)), "BLOCK_V": min(chosen["BLOCK_V"], padded(self.V))}
        self.blocks = -(-self.K // tiles["BLOCK_K"])
        self.options = {
            "K": self.K, "V": self.V, "C": CHUNK, "LEVELS": CHUNK.bit_length() - 1, "VECTOR": gates == 2,
            **precision(v.dtype), **chosen, **tiles,
        }  # fmt: skip
        self._dg = None if g is None else self.new(*g.shape) if gates == 2 else self.parts()

    def __call__(
        self, r1, r2, w1, w2, y1, y2, x1, x2, states, d_states, *,
        dr1, dw1, dr2=None, dw2=None, beta=None, v=None, dv=None, dbeta=None, bonus=None, dbonus=None,
        exclusive=(False, False),
    ) -> None:  # fmt: skip
        chunks = self.chunks
        if not chunks.count or not self.H:
            return
        shared = [argument for x in (r1, r2, w1, w2) for argument in self._shared(x)]
        gates = (None, 0, 0, 0) if self.g is None else self._row(self.g) if self.g.dim() == 4 else self._head(self.g)
        chunk_gradient[(chunks.count * self.H * self.blocks,)](
            *shared, *self._row(y1), *self._row(y2), *self._row(x1), *self._row(x2), *gates, *self._head(beta),
            *self._row(v), bonus, states, d_states, dr1, dr2, dw1, dw2, self._dg, dv, dbeta, dbonus,
            chunks.table, self.T, chunks.per_sequence, int(chunks.packed), self.B * self.T, self.H,
            EXCLUSIVE1=exclusive[0], EXCLUSIVE2=exclusive[1], **self.options,
        )  # fmt: skip

    def dg(self) -> Tensor | None:
        return self._dg if self.g is None or self.g.dim() == 4 else _sum(self._dg)

    def like(self, x: Tensor) -> Tensor:
        """For the gradient of x [B, T, heads, K], with all heads."""
        return torch.empty((*x.shape[:2], self.H, x.shape[3]), dtype=x.dtype, device=x.device)

    def parts(self) -> Tensor:
        """For sums over K, a part a block of it."""
        return self.new(self.blocks, self.B, self.T, self.H)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.v.device)

    def _shared(self, x: Tensor | None):
        return (None, 0, 0, 0, 1) if x is None else (*self._row(x), self.H // x.shape[2])

    @staticmethod
    def _row(x: Tensor | None):
        if x is None:
            return None, 0, 0, 0
        x = rows(x)
        return x, *x.stride()[:3]

    @staticmethod
    def _head(x: Tensor | None):
        return (None, 0, 0, 0) if x is None else (x, *x.stride())


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)
