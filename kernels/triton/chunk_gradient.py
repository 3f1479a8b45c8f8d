"""Gradients of what reads and writes a matrix state, all chunks side by side.

Given the states S before each chunk and dS after it, nothing in a chunk waits for another one. Readers r_i with the
upstream gradients y_i [V] and writers w_j with the values x_j [V] meet as

    dr_i = sum_{j<=i} (y_i . x_j) D_ij w_j + since_i (S y_i)
    dw_j = sum_{i>=j} (y_i . x_j) D_ij r_i + until_j (dS x_j)

where D_ij = exp(G_i - G_j) decays from writer to reader, `since` from the chunk's start and `until` to its end. A
second reader never reads its own token. Linear attention has one reader and one writer, the delta rule (Yang et al.
2024, "Parallelizing linear transformers with the delta rule") a second reader, its generalisation (Peng et al. 2025)
two of both. The products y . x of a chunk are made once; then programs take some columns of K each, here for the delta
rule with one decay a head or none, in `vector_gradient` for decays for every channel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.triton.chunk_products import chunk_products
from subquad.kernels.triton.configs import config
from subquad.kernels.triton.launch import kernel, settle
from subquad.kernels.triton.pair_scores import LOOKING
from subquad.kernels.triton.prepare import load_matrix
from subquad.kernels.triton.segments import CHUNK, Segments, segment_bounds
from subquad.kernels.triton.tiles import (
    columns,
    cumulated,
    dot,
    load_tile,
    operand_size,
    precision,
    shared,
    store_tile,
    strided,
)
from subquad.kernels.triton.vector_gradient import vector_gradient


@triton.jit
def _add(total, a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), total, input_precision=PRECISION)


@kernel(do_not_specialize=["beta_b", "g_b", "T", "per_sequence", "packed", "n_rows"])
def chunk_gradient(
    # Rows [B, T, heads, width] come with their strides; q and k also with how many of our heads share one.
    q, q_b, q_t, q_h, q_share,
    k, k_b, k_t, k_h, k_share,
    do, do_b, do_t, do_h,
    e, e_b, e_t, e_h,
    u, u_b, u_t, u_h,
    # log decay and write strength [B, T, H]
    g, g_b, g_t, g_h,
    beta, beta_b, beta_t, beta_h,
    # before and after each chunk [n, H, K, V]; what `chunk_products` made
    states, d_states, pairs, own,
    # out, contiguous: dq, dk [B, T, H, K]; dg, dbeta [blocks, B, T, H]
    dq, dk, dg, dbeta,
    table, T, per_sequence, packed, n_rows, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of the delta rule: q and -beta k read, with the upstream gradients do and e, what k writes, u."""
    N_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    block = program % N_BLOCKS
    h = (program // N_BLOCKS) % H
    n = program // (N_BLOCKS * H)
    b, start, end, _ = segment_bounds(table, n, T, C, per_sequence, packed)
    if end <= start:
        return
    row = tl.arange(0, C)
    key = block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = row < end - start
    at = start.to(tl.int64)
    line = ((b * T + at) * H + h).to(tl.int64)  # of a contiguous [B, T, H]
    part = block.to(tl.int64) * n_rows * H + line  # of a contiguous [blocks, B, T, H]
    here = (n * H + h).to(tl.int64)
    k += b * k_b + at * k_t + (h // k_share) * k_h
    writer = load_tile(k, k_t, row, key, inside, K).to(tl.float32)
    q += b * q_b + at * q_t + (h // q_share) * q_h
    reader1 = load_tile(q, q_t, row, key, inside, K).to(tl.float32)
    strength = tl.load(beta + b * beta_b + at * beta_t + h * beta_h + row * beta_t, mask=inside, other=0.0)
    strength = strength.to(tl.float32)[:, None]
    reader2 = writer * -strength

    # The share of the pairs within the chunk but for each token with itself, whom no decay stands between.
    m1 = load_matrix(pairs + here * (2 * C * C), C, C)
    m2 = load_matrix(pairs + here * (2 * C * C) + C * C, C, C)
    read1 = dot(m1, writer, DOT, PRECISION)
    kept = dot(tl.trans(m1), reader1, DOT, PRECISION)
    read2 = dot(m2, writer, DOT, PRECISION)
    kept = _add(kept, tl.trans(m2), reader2, DOT, PRECISION)
    if g is None:
        since, until = 1.0, 1.0
    else:
        gate = tl.load(g + b * g_b + at * g_t + h * g_h + row * g_t, mask=inside, other=0.0)
        _q_high, _q_low, _k_high, _k_low, since, until, total = cumulated(gate, False)
        since, until, whole = since[:, None], until[:, None], tl.exp(total)

    # The share of the states.
    from_state1 = tl.zeros([C, BLOCK_K], tl.float32)
    from_state2 = tl.zeros([C, BLOCK_K], tl.float32)
    to_state = tl.zeros([C, BLOCK_K], tl.float32)
    crossing = tl.zeros([BLOCK_K], tl.float32)
    for c in range(0, V, BLOCK_V):
        col = c + tl.arange(0, BLOCK_V)
        S = load_tile(states + here * K * V, V, key, col, key < K, V)
        dS = load_tile(d_states + here * K * V, V, key, col, key < K, V)
        if g is not None:
            crossing += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        y = load_tile(do + b * do_b + at * do_t + h * do_h, do_t, row, col, inside, V)
        from_state1 = _add(from_state1, y, tl.trans(S), DOT, PRECISION)
        y = load_tile(e + b * e_b + at * e_t + h * e_h, e_t, row, col, inside, V)
        from_state2 = _add(from_state2, y, tl.trans(S), DOT, PRECISION)
        x = load_tile(u + b * u_b + at * u_t + h * u_h, u_t, row, col, inside, V)
        to_state = _add(to_state, x, tl.trans(dS), DOT, PRECISION)
    read1 += from_state1 * since
    read2 += from_state2 * since
    to_state *= until
    kept += to_state

    # A decay stands between all that was written before it and all that is read from it on, or after it.
    if g is not None:
        crossing = crossing * whole + tl.sum(writer * to_state, 0)
        change = tl.sum(reader1 * read1 + reader2 * read2 - writer * kept, 1).to(tl.float64)
        dgate = tl.sum(crossing, 0) + tl.sum(change, 0) - tl.cumsum(change, 0) + change
        tl.store(dg + part + row * H, dgate.to(tl.float32), mask=inside)

    same = tl.load(own + here * C + row)[:, None]
    read1 += same * writer
    kept += same * reader1 - strength * read2
    tl.store(dbeta + part + row * H, -tl.sum(writer * read2, 1), mask=inside)
    store_tile(dq + line * K, H * K, row, key, inside, read1, K)
    store_tile(dk + line * K, H * K, row, key, inside, kept, K)


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
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, sums: Tensor, whole: Tensor, do: Tensor, states: Tensor,
    d_states: Tensor, chunks: Segments, *, exclusive: bool = False, bonus: Tensor | None = None,
) -> LinearGradient:  # fmt: skip
    """Of linear attention with a decay for every channel; `bonus` [H, K] only if `exclusive`.

    For all three: `sums` and `whole` are what `decayed_rows` makes of g [B, T, H, K]; `states` and `d_states`
    [n, H, K, V] are S before and dS after each of `chunks`, which `cut` makes of CHUNK tokens. Rows of padding come out
    undefined.
    """
    launch = _Launch(v, k, chunks)
    dq, dk, dg = launch.like(q), launch.like(k), launch.new(*g.shape)
    dbonus = None if bonus is None else launch.new(chunks.count, launch.H, launch.K)
    launch.vector(
        "linear_gradient", (q, None, k, None), (do, None, v, None), sums, whole, states, d_states,
        (dq, None, dk, None), dg, exclusive=(exclusive, False), bonus=bonus, dbonus=dbonus,
    )  # fmt: skip
    return LinearGradient(dq, dk, dg, None if bonus is None else dbonus.sum(0).to(bonus.dtype))


def delta_gradient(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, sums: Tensor | None, whole: Tensor | None,
    do: Tensor, u: Tensor, e: Tensor, states: Tensor, d_states: Tensor, chunks: Segments,
) -> DeltaGradient:  # fmt: skip
    """Of the delta rule; u: its writes [B, T, H, V], e: their whole gradient; g: None, [B, T, H] or [B, T, H, K]."""
    launch = _Launch(v, k, chunks)
    dq, dk, dv = launch.like(q), launch.like(k), torch.empty_like(v, memory_format=torch.contiguous_format)
    given = {"beta": beta, "v": v, "dv": dv}
    if g is not None and g.dim() == 4:
        dg = launch.new(*g.shape)
        dbeta = launch.vector(
            "delta_gradient", (q, k, k, None), (do, e, u, None), sums, whole, states, d_states, (dq, None, dk, None),
            dg, exclusive=(False, False), **given,
        )  # fmt: skip
    else:
        dbeta, dg = launch.scalar(q, k, g, do, e, u, states, d_states, dq, dk, **given)
    return DeltaGradient(dq, dk, dv, dbeta.to(beta.dtype), dg)


def dplr_gradient(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor, sums: Tensor, whole: Tensor, do: Tensor,
    u: Tensor, e: Tensor, states: Tensor, d_states: Tensor, chunks: Segments
) -> DplrGradient:  # fmt: skip
    """Of the generalised delta rule; u: what `a` reads [B, T, H, V], e: its whole gradient."""
    launch = _Launch(v, k, chunks)
    dq, dk, da, db = (launch.like(x) for x in (q, k, a, b))
    dg = launch.new(*g.shape)
    launch.vector(
        "dplr_gradient", (q, a, k, b), (do, e, v, u), sums, whole, states, d_states, (dq, da, dk, db), dg,
        exclusive=(False, True),
    )  # fmt: skip
    return DplrGradient(dq, dk, da, db, dg)


class _Launch:
    """v [B, T, H, V] says how many rows, heads and values there are, and k the width."""

    def __init__(self, v: Tensor, k: Tensor, chunks: Segments):
        self.B, self.T, self.H, self.V = v.shape
        self.v, self.K, self.chunks = v, k.shape[3], chunks
        self.programs = chunks.count * self.H
        self.where = (chunks.table, self.T, chunks.per_sequence, int(chunks.packed))
        self.always = {"V": self.V, "C": CHUNK, **precision(v.dtype)}

    def vector(
        self, kernel, rows_in, values, sums, whole, states, d_states, grads, dg, *, exclusive, beta=None, v=None,
        dv=None, bonus=None, dbonus=None,
    ) -> Tensor | None:  # fmt: skip
        """Of readers and writers (r1, r2, w1, w2), None where there is none, into `grads`; returns dbeta."""
        halves = 1 + (rows_in[1] is not None)
        options, blocks = self._options(kernel)
        dbeta = None if beta is None else self.new(blocks + 1, self.B, self.T, self.H)
        if self.programs:
            found = (*strided(values[0]), *strided(values[1]), *strided(values[2]), *strided(values[3]))
            places = self.programs * blocks
            n_own = 1 + (rows_in[3] is not None)
            pairs, own = self._products(found, halves**2, n_own, beta, None, v, dv, dbeta, blocks, VECTOR=True)
            arguments = [
                *(argument for x in rows_in for argument in shared(x, self.H)), *found, *self._head(beta),
                None if bonus is None else bonus.contiguous(), sums, whole, states, d_states, pairs, own, self.programs,
                *grads, dg, dbeta, dbonus, *self.where, self.B * self.T, self.H, places,
            ]  # fmt: skip
            always = {
                "LEVELS": CHUNK.bit_length() - 1, "HALVES": halves, "EXCLUSIVE1": exclusive[0],
                "EXCLUSIVE2": exclusive[1], **self.always, **options,
            }  # fmt: skip
            grids = {True: places, False: min(places, LOOKING)}
            for single, grid in grids.items():
                vector_gradient[(grid,)](*arguments, SINGLE=single, **always)
        settle()
        return None if dbeta is None else dbeta.sum(0)

    def scalar(self, q, k, g, do, e, u, states, d_states, dq, dk, *, beta, v, dv) -> tuple[Tensor, Tensor | None]:
        """Of the delta rule into dq, dk and dv; returns dbeta and dg."""
        options, blocks = self._options("chunk_gradient", gates=0 if g is None else 1)
        dbeta = self.new(blocks + 1, self.B, self.T, self.H)
        dg = None if g is None else self.new(blocks, self.B, self.T, self.H)
        if self.programs:
            found = (*strided(do), *strided(e), *strided(u))
            pairs, own = self._products(
                (*found, *strided(None)), 2, 1, beta, g, v, dv, dbeta, blocks, VECTOR=False
            )  # fmt: skip
            chunk_gradient[(self.programs * blocks,)](
                *shared(q, self.H), *shared(k, self.H), *found, *self._head(g), *self._head(beta), states, d_states,
                pairs, own, dq, dk, dg, dbeta, *self.where, self.B * self.T, self.H, **self.always, **options,
            )  # fmt: skip
        settle()
        return dbeta.sum(0), None if g is None else dg[0] if blocks == 1 else dg.sum(0)

    def _products(self, values, matrices, n_own, beta, g, v, dv, dbeta, blocks, *, VECTOR):
        # Products of float16 go through tf32, whose range they may need.
        dtype = self.v.dtype if self.v.dtype == torch.bfloat16 else torch.float32
        pairs = torch.empty(self.programs, matrices, CHUNK, CHUNK, dtype=dtype, device=self.v.device)
        own = self.new(n_own, self.programs, CHUNK)
        tiles = config("chunk_products", device=self.v.device, V=self.V, size=operand_size(self.v.dtype))
        tiles["BLOCK_V"] = columns(self.V, self.v.dtype, tiles["BLOCK_V"])
        chunk_products[(self.programs,)](
            *values, *self._head(g), *self._head(beta), *strided(v), pairs, own, dv, dbeta, blocks,
            *self.where, self.B * self.T, self.chunks.count, self.H, VECTOR=VECTOR,
            **self.always, **tiles,
        )  # fmt: skip
        return pairs, own

    def _options(self, kernel: str, **gates: int) -> tuple[dict[str, int], int]:
        """Those of the launch, and how many blocks of columns of K there are."""
        values = config(kernel, device=self.v.device, K=self.K, V=self.V, size=operand_size(self.v.dtype), **gates)
        values["BLOCK_K"] = columns(self.K, self.v.dtype, values["BLOCK_K"])
        values["BLOCK_V"] = columns(self.V, self.v.dtype, values["BLOCK_V"])
        return {"K": self.K, **values}, -(-self.K // values["BLOCK_K"])

    def like(self, x: Tensor) -> Tensor:
        """For the gradient of x [B, T, heads, K], with all heads."""
        return torch.empty((*x.shape[:2], self.H, x.shape[3]), dtype=x.dtype, device=x.device)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.v.device)

    @staticmethod
    def _head(x: Tensor | None):
        return (None, 0, 0, 0) if x is None else (x, *x.stride())
