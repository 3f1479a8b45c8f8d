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

from subquad.kernels.triton.chunk_products import chunk_products
from subquad.kernels.triton.configs import config
from subquad.kernels.triton.prepare import load_rows, sibling
from subquad.kernels.triton.segments import CHUNK, Segments, segment_bounds
from subquad.kernels.triton.tiles import cumulated, dot, load_tile, padded, precision, rows, store_tile


@triton.jit
def _add(total, a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), total, input_precision=PRECISION)


@triton.jit
def _meet(pairs, reader, writer, factor, second, row, LEVEL: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """What readers in second blocks of 2^LEVEL tokens get from writers in the first ones, and those from them.

    Rows of second blocks are readers, those of first ones writers, so one product of symmetric pairs serves both.
    """
    block = row >> LEVEL
    near = tl.where((block ^ 1)[:, None] == block[None, :], pairs, 0.0)
    return dot(near, tl.where(second, reader, writer) * factor, DOT, PRECISION) * factor


@triton.jit(do_not_specialize=["T", "per_sequence", "packed", "n_rows", "count"])
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
    # the delta rule's write strength [B, T, H]: r2 is w1 there and weighs -beta
    beta, beta_b, beta_t, beta_h,
    # weight [H, K] of a token's own writer in what an exclusive r1 reads
    bonus,
    # before and after each chunk [n, H, K, V]; what `chunk_products` made
    states, d_states, pairs, own,
    # out, contiguous: dr1, dr2, dw1, dw2 and a vector's dg are [B, T, H, width]; dbeta and a scalar's dg
    # [blocks, B, T, H]; dbonus [n, H, K]
    dr1, dr2, dw1, dw2, dg, dbeta, dbonus,
    table, T, per_sequence, packed, n_rows, count, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, LEVELS: tl.constexpr, VECTOR: tl.constexpr, WARPS: tl.constexpr,
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
    first_key = block * BLOCK_K
    key = first_key + tl.arange(0, BLOCK_K)
    inside = row < end - start
    at = start.to(tl.int64)
    line = ((b * T + at) * H + h).to(tl.int64)  # of a contiguous [B, T, H]
    part = block.to(tl.int64) * n_rows * H + line  # of a contiguous [blocks, B, T, H]
    if end <= start:
        if dbonus is not None:
            tl.store(dbonus + (n * H + h) * K + key, tl.zeros([BLOCK_K], tl.float32), mask=key < K)
        return

    here = (n * H + h).to(tl.int64)
    next = count.to(tl.int64) * H
    m11 = _matrix(pairs + here * C * C, C)
    if r2 is not None:
        m21 = _matrix(pairs + (next + here) * C * C, C)
    if w2 is not None:
        m12 = _matrix(pairs + (2 * next + here) * C * C, C)
        m22 = _matrix(pairs + (3 * next + here) * C * C, C)
    w1 += b * w1_b + at * w1_t + (h // w1_share) * w1_h
    writer1 = load_rows(w1, w1_t, 1, end - start, first_key, K, C, BLOCK_K, WARPS)
    r1 += b * r1_b + at * r1_t + (h // r1_share) * r1_h
    reader1 = load_rows(r1, r1_t, 1, end - start, first_key, K, C, BLOCK_K, WARPS)
    if DELTA:
        strength = tl.load(beta + b * beta_b + at * beta_t + h * beta_h + row * beta_t, mask=inside, other=0.0)
        strength = strength.to(tl.float32)[:, None]
        reader2 = writer1 * -strength
    elif r2 is not None:
        r2 += b * r2_b + at * r2_t + (h // r2_share) * r2_h
        reader2 = load_rows(r2, r2_t, 1, end - start, first_key, K, C, BLOCK_K, WARPS)
    if w2 is not None:
        w2 += b * w2_b + at * w2_t + (h // w2_share) * w2_h
        writer2 = load_rows(w2, w2_t, 1, end - start, first_key, K, C, BLOCK_K, WARPS)

    # The share of the pairs within the chunk but for each token with itself, whom no decay stands between.
    if VECTOR:
        g += b * g_b + at * g_t + h * g_h
        decay = tl.exp(load_rows(g, g_t, 1, end - start, first_key, K, C, BLOCK_K, WARPS))
        read1 = tl.zeros([C, BLOCK_K], tl.float32)
        kept1 = tl.zeros([C, BLOCK_K], tl.float32)
        read2 = tl.zeros([C, BLOCK_K], tl.float32)
        kept2 = tl.zeros([C, BLOCK_K], tl.float32)
        whole = decay  # a row a block of 2^LEVEL tokens
        until = tl.full([C, BLOCK_K], 1.0, tl.float32)  # its end
        since = until if EXCLUSIVE else decay  # its start
        if APART:
            reader1 *= decay
        for LEVEL in tl.static_range(LEVELS):
            second = ((row >> LEVEL) % 2 == 1)[:, None]
            factor = tl.where(second, since, until)
            met = _meet(m11, reader1, writer1, factor, second, row, LEVEL, DOT, PRECISION)
            read1 += tl.where(second, met, 0.0)
            kept1 += tl.where(second, 0.0, met)
            if r2 is not None:
                met = _meet(m21, reader2, writer1, factor, second, row, LEVEL, DOT, PRECISION)
                read2 += tl.where(second, met, 0.0)
                kept1 += tl.where(second, 0.0, met)
            if w2 is not None:
                met = _meet(m12, reader1, writer2, factor, second, row, LEVEL, DOT, PRECISION)
                read1 += tl.where(second, met, 0.0)
                kept2 += tl.where(second, 0.0, met)
                met = _meet(m22, reader2, writer2, factor, second, row, LEVEL, DOT, PRECISION)
                read2 += tl.where(second, met, 0.0)
                kept2 += tl.where(second, 0.0, met)
            found = sibling(whole)
            whole = tl.max((whole * found).reshape(C >> (LEVEL + 1), 2, BLOCK_K), 1)  # the two are equal
            other = tl.broadcast_to(found[:, None, :], (C >> LEVEL, 1 << LEVEL, BLOCK_K)).reshape(C, BLOCK_K)
            since = tl.where(second, since * other, since)
            until = tl.where(second, until, until * other)
        whole = tl.sum(whole, 0)
    else:
        read1 = dot(m11, writer1, DOT, PRECISION)
        kept1 = dot(tl.trans(m11), reader1, DOT, PRECISION)
        if r2 is not None:
            read2 = dot(m21, writer1, DOT, PRECISION)
            kept1 = _add(kept1, tl.trans(m21), reader2, DOT, PRECISION)
        if w2 is not None:
            read1 = _add(read1, m12, writer2, DOT, PRECISION)
            read2 = _add(read2, m22, writer2, DOT, PRECISION)
            kept2 = dot(tl.trans(m12), reader1, DOT, PRECISION)
            kept2 = _add(kept2, tl.trans(m22), reader2, DOT, PRECISION)
        if g is None:
            since, until = 1.0, 1.0
        else:
            gate = tl.load(g + b * g_b + at * g_t + h * g_h + row * g_t, mask=inside, other=0.0)
            _q_high, _q_low, _k_high, _k_low, since, until, total = cumulated(gate, EXCLUSIVE)
            since, until, whole = since[:, None], until[:, None], tl.exp(total)

    # The share of the states.
    from_state1 = tl.zeros([C, BLOCK_K], tl.float32)
    to_state1 = tl.zeros([C, BLOCK_K], tl.float32)
    crossing = tl.zeros([BLOCK_K], tl.float32)
    if r2 is not None:
        from_state2 = tl.zeros([C, BLOCK_K], tl.float32)
    if w2 is not None:
        to_state2 = tl.zeros([C, BLOCK_K], tl.float32)
    for c in range(0, V, BLOCK_V):
        col = c + tl.arange(0, BLOCK_V)
        S = load_tile(states + here * K * V, V, key, col, key < K, V)
        dS = load_tile(d_states + here * K * V, V, key, col, key < K, V)
        if g is not None:
            crossing += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        y = load_tile(y1 + b * y1_b + at * y1_t + h * y1_h, y1_t, row, col, inside, V)
        from_state1 = _add(from_state1, y, tl.trans(S), DOT, PRECISION)
        x = load_tile(x1 + b * x1_b + at * x1_t + h * x1_h, x1_t, row, col, inside, V)
        to_state1 = _add(to_state1, x, tl.trans(dS), DOT, PRECISION)
        if r2 is not None:
            y = load_tile(y2 + b * y2_b + at * y2_t + h * y2_h, y2_t, row, col, inside, V)
            from_state2 = _add(from_state2, y, tl.trans(S), DOT, PRECISION)
        if w2 is not None:
            x = load_tile(x2 + b * x2_b + at * x2_t + h * x2_h, x2_t, row, col, inside, V)
            to_state2 = _add(to_state2, x, tl.trans(dS), DOT, PRECISION)
    read1 += from_state1 * since
    to_state1 *= until
    kept1 += to_state1
    if r2 is not None:
        read2 += from_state2 * since
    if w2 is not None:
        to_state2 *= until
        kept2 += to_state2

    # A decay stands between all that was written before it and all that is read from it on, or after it.
    if g is not None:
        crossing = crossing * whole + tl.sum(writer1 * to_state1, 0)
        change = reader1 * read1 - writer1 * kept1
        if w2 is not None:
            crossing += tl.sum(writer2 * to_state2, 0)
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
        read1 *= decay
        reader1 = load_rows(r1, r1_t, 1, end - start, first_key, K, C, BLOCK_K, WARPS)
    same = tl.load(own + here * C + row)[:, None]
    if EXCLUSIVE1:
        if bonus is not None:
            own_weight = tl.load(bonus + h * K + key, mask=key < K, other=0.0).to(tl.float32)[None, :]
            d_weight = tl.sum(same * reader1 * writer1, 0)
            tl.store(dbonus + (n * H + h) * K + key, d_weight, mask=key < K)
            read1 += same * own_weight * writer1
            kept1 += same * own_weight * reader1
    else:
        read1 += same * writer1
        kept1 += same * reader1
        if w2 is not None:
            same = tl.load(own + (next + here) * C + row)[:, None]
            read1 += same * writer2
            kept2 += same * reader1

    if DELTA:
        tl.store(dbeta + part + row * H, -tl.sum(writer1 * read2, 1), mask=inside)
        kept1 -= strength * read2
    elif r2 is not None:
        store_tile(dr2 + line * K, H * K, row, key, inside, read2, K)
    store_tile(dr1 + line * K, H * K, row, key, inside, read1, K)
    store_tile(dw1 + line * K, H * K, row, key, inside, kept1, K)
    if w2 is not None:
        store_tile(dw2 + line * K, H * K, row, key, inside, kept2, K)


@triton.jit
def _matrix(base, C: tl.constexpr):
    row = tl.arange(0, C)
    return tl.load(base + row[:, None] * C + row[None, :])


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
    dbeta = launch.parts(launch.blocks + 1)
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
        self.gates = 0 if g is None else g.dim() - 2  # none, one a head, one a channel
        chosen = config(kernel, device=v.device, K=self.K, V=self.V, size=v.element_size(), gates=self.gates)
        tiles = {"BLOCK_K": min(chosen["BLOCK_K"], padded(self.K)), "BLOCK_V": min(chosen["BLOCK_V"], padded(self.V))}
        self.blocks = -(-self.K // tiles["BLOCK_K"])
        self.always = {"V": self.V, "C": CHUNK, "VECTOR": self.gates == 2, **precision(v.dtype)}
        self.options = {
            "K": self.K, "LEVELS": CHUNK.bit_length() - 1, "WARPS": chosen["num_warps"], **chosen, **tiles,
        }  # fmt: skip
        self._dg = None if g is None else self.new(*g.shape) if self.gates == 2 else self.parts(self.blocks)

    def __call__(
        self, r1, r2, w1, w2, y1, y2, x1, x2, states, d_states, *,
        dr1, dw1, dr2=None, dw2=None, beta=None, v=None, dv=None, dbeta=None, bonus=None, dbonus=None,
        exclusive=(False, False),
    ) -> None:  # fmt: skip
        chunks = self.chunks
        programs = chunks.count * self.H
        if not programs:
            return
        gates = (None, 0, 0, 0) if self.g is None else self._row(self.g) if self.g.dim() == 4 else self._head(self.g)
        values = (*self._row(y1), *self._row(y2), *self._row(x1), *self._row(x2), *gates, *self._head(beta))
        where = (chunks.table, self.T, chunks.per_sequence, int(chunks.packed))
        # Products of float16 go through tf32, whose range they may need.
        dtype = self.v.dtype if self.v.dtype == torch.bfloat16 else torch.float32
        matrices = 1 if r2 is None else 2 if w2 is None else 4
        pairs = torch.empty(matrices, programs, CHUNK, CHUNK, dtype=dtype, device=self.v.device)
        own = self.new(2 if w2 is not None else 1, programs, CHUNK)
        tiles = config("chunk_products", device=self.v.device, V=self.V, size=self.v.element_size())
        tiles["BLOCK_V"] = min(tiles["BLOCK_V"], padded(self.V))
        chunk_products[(programs,)](
            *values, *self._row(v), pairs, own, dv, None if dbeta is None else dbeta[self.blocks], *where,
            chunks.count, self.H, EXCLUSIVE=exclusive[0], **self.always, **tiles,
        )  # fmt: skip
        shared = [argument for x in (r1, r2, w1, w2) for argument in self._shared(x)]
        chunk_gradient[(programs * self.blocks,)](
            *shared, *values, bonus, states, d_states, pairs, own, dr1, dr2, dw1, dw2, self._dg, dbeta, dbonus,
            *where, self.B * self.T, chunks.count, self.H,
            EXCLUSIVE1=exclusive[0], EXCLUSIVE2=exclusive[1], **self.always, **self.options,
        )  # fmt: skip

    def dg(self) -> Tensor | None:
        return self._dg if self.g is None or self.g.dim() == 4 else _sum(self._dg)

    def like(self, x: Tensor) -> Tensor:
        """For the gradient of x [B, T, heads, K], with all heads."""
        return torch.empty((*x.shape[:2], self.H, x.shape[3]), dtype=x.dtype, device=x.device)

    def parts(self, count: int) -> Tensor:
        """For sums over K, a part a block of it."""
        return self.new(count, self.B, self.T, self.H)

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
