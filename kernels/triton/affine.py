"""The sequential pass of the delta rules and of vector decays: chunks in turn, the state in registers.

What happens inside a chunk is prepared chunk by chunk in parallel. What is left is affine in the state S [K, V]:

    u = T (X x + R S),    o = P x + U u + Q S,    S <- whole * S + E^T x + F^T u

with rows x [C, V], matrices X, T, P and U [C, C], rows R, Q, E, F [C, K], and S as it was before the chunk. R S, Q S
and F may come with a factor a row, and X may be one, instead of a matrix. The forward passes of linear_attention,
delta_rule and dplr_rule and the gradients of their states, for which the matrices are transposed, are this pass with
other tensors. Yang et al. 2024, "Parallelizing linear transformers with the delta rule", for the chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.backend import INTERPRETED
from subquad.kernels.triton.configs import config
from subquad.kernels.triton.launch import cdiv, kernel
from subquad.kernels.triton.segments import CHUNK, Segments, segment_bounds, segments
from subquad.kernels.triton.tiles import (
    columns,
    dot,
    fetch,
    load_tile,
    operand_size,
    precision,
    rows,
    shared,
    store_tile,
    strided,
)


@triton.jit
def _load_matrix(base, row, C: tl.constexpr, TRANSPOSED: tl.constexpr):
    """A chunk's [C, C], whole: a mask along its rows would load it element by element."""
    matrix = tl.load(base + row[:, None] * C + row[None, :])
    if TRANSPOSED:
        matrix = tl.trans(matrix)
    return matrix


@kernel(do_not_specialize=["T", "segment", "per_sequence", "packed", "carried", "emit"])
def affine_pass(
    # rows [B, T, heads, width], each with the strides of B, T, heads, and how many of our H heads share one
    x, x_b, x_t, x_h,
    r, r_b, r_t, r_h, r_share,
    q, q_b, q_t, q_h, q_share,
    e, e_b, e_t, e_h, e_share,
    f, f_b, f_t, f_h, f_share,
    # [chunks, H, C, C]; factors of rows [chunks, H, C]; the decay over a chunk [chunks, H] or [chunks, H, K]
    mx, mt, mp, mu, x_gain, r_gain, q_gain, f_gain, whole,
    # contiguous: rows out, the states before each chunk [chunks, H, K, V]
    o, u, states,
    # states before and after each segment [n, H, K, V], the latter [n, H, K, V + K] if MATRIX; its whole decay
    s_in, s_out, total,
    table, T, segment, per_sequence, packed, carried, emit, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    VECTOR: tl.constexpr, MATRIX: tl.constexpr, REVERSE: tl.constexpr, ONE: tl.constexpr, ALIKE: tl.constexpr,
    FETCH: tl.constexpr, LATE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """MATRIX: x has K more columns, of zeros, and S the identity in them, which becomes the segment's transition.

    REVERSE: from the last chunk to the first, with the matrices transposed. ONE: f is r. ALIKE: the rows r, q, e, f
    that are given are as far apart as f's, or e's where there is no f. LATE: shared memory has no room for two of P.
    """
    WIDTH: tl.constexpr = V + K if MATRIX else V
    N_BLOCKS: tl.constexpr = (WIDTH + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    block = program % N_BLOCKS
    h = (program // N_BLOCKS) % H
    n = program // (N_BLOCKS * H)
    b, start, end, first_chunk = segment_bounds(table, n, T, segment, per_sequence, packed)
    if ALIKE:  # one set of offsets in registers instead of four
        if f is not None:
            e_t = f_t
        q_t = e_t
        r_t = e_t
    row = tl.arange(0, C)
    key = tl.arange(0, BLOCK_K)
    col = block * BLOCK_V + tl.arange(0, BLOCK_V)

    state_at = (n * H + h).to(tl.int64) * K
    # `carried` and `emit` are 0 or 1, not constants: no state or one makes no other kernel.
    S = load_tile(s_in + state_at * V, V, key, col, key < K * carried, V)
    if MATRIX:
        S += tl.where(key[:, None] == (col - V)[None, :], 1.0, 0.0)
    if total is not None:
        decayed = tl.full([BLOCK_K], 1.0, tl.float32) if VECTOR else 1.0

    n_chunks = (end - start + C - 1) // C
    for i in range(n_chunks):
        c = n_chunks - 1 - i if REVERSE else i
        first = start + c * C
        inside = row < end - first
        at = first.to(tl.int64)
        line = (b * T + at) * H + h  # of a contiguous [B, T, H]
        chunk = ((first_chunk + c) * H + h).to(tl.int64)  # of a contiguous [chunks, H]

        if FETCH:
            following = tl.maximum(c - 1, 0) if REVERSE else tl.minimum(c + 1, n_chunks - 1)
            token = tl.minimum(start + following * C + row, end - 1)
            matrix = ((first_chunk + following) * H + h).to(tl.int64) * (C * C)
            factors = ((first_chunk + following) * H + h).to(tl.int64) * C
            one = tl.zeros([1], tl.int32)
            fetch(x + b * x_b + h * x_h, x_t, token, block * BLOCK_V, BLOCK_V, V)
            if mt is not None:
                fetch(r + b * r_b + (h // r_share) * r_h, r_t, token, 0, BLOCK_K, K)
                if not ONE:
                    fetch(f + b * f_b + (h // f_share) * f_h, f_t, token, 0, BLOCK_K, K)
                fetch(mt + matrix, C, row, 0, C, C)
                if mx is not None:
                    fetch(mx + matrix, C, row, 0, C, C)
                else:
                    fetch(x_gain + factors, C, one, 0, C, C)
                if r_gain is not None:
                    fetch(r_gain + factors, C, one, 0, C, C)
            if o is not None:
                fetch(q + b * q_b + (h // q_share) * q_h, q_t, token, 0, BLOCK_K, K)
                if mp is not None:
                    fetch(mp + matrix, C, row, 0, C, C)
                if mu is not None:
                    fetch(mu + matrix, C, row, 0, C, C)
            if e is not None:
                fetch(e + b * e_b + (h // e_share) * e_h, e_t, token, 0, BLOCK_K, K)
        if states is not None:
            store_tile(states + chunk * (K * V), V, key, col, key < K, S, V)
        values = load_tile(x + b * x_b + at * x_t + h * x_h, x_t, row, col, inside, V)
        if whole is not None:
            kept = tl.load(whole + chunk * K + key, mask=key < K, other=0.0) if VECTOR else tl.load(whole + chunk)
        if mt is not None:  # all loads that do not wait for the state
            if mx is None:
                x_factor = tl.load(x_gain + chunk * C + row)
            if r_gain is not None:
                r_factor = tl.load(r_gain + chunk * C + row)
            if f_gain is not None:
                f_factor = tl.load(f_gain + chunk * C + row)
        if o is not None and q_gain is not None:
            q_factor = tl.load(q_gain + chunk * C + row)
        before = S.to(DOT)
        if mt is not None:
            removers = load_tile(r + b * r_b + at * r_t + (h // r_share) * r_h, r_t, row, key, inside, K)
            found = dot(removers, before, DOT, PRECISION)
            if r_gain is not None:
                found *= r_factor[:, None]
            if mx is not None:
                found += dot(_load_matrix(mx + chunk * (C * C), row, C, REVERSE), values, DOT, PRECISION)
            else:
                found += values.to(tl.float32) * x_factor[:, None]
            found = dot(_load_matrix(mt + chunk * (C * C), row, C, REVERSE), found, DOT, PRECISION)
            if u is not None:
                store_tile(u + line * V, H * V, row, col, inside, found, V)
        if o is not None:
            readers = load_tile(q + b * q_b + at * q_t + (h // q_share) * q_h, q_t, row, key, inside, K)
            out = dot(readers, before, DOT, PRECISION)
            if q_gain is not None:
                out *= q_factor[:, None]
            if mp is not None:
                # The condition always holds, but what is loaded under one is not loaded a turn before.
                some = end > first if LATE else True
                if some:
                    out += dot(_load_matrix(mp + chunk * (C * C), row, C, REVERSE), values, DOT, PRECISION)
            if mu is not None:
                out += dot(_load_matrix(mu + chunk * (C * C), row, C, REVERSE), found, DOT, PRECISION)
            store_tile(o + line * V, H * V, row, col, inside, out, V)

        if whole is not None:
            S *= kept[:, None] if VECTOR else kept
            if total is not None:
                decayed *= kept
        if e is not None:
            writers = load_tile(e + b * e_b + at * e_t + (h // e_share) * e_h, e_t, row, key, inside, K)
            S += dot(tl.trans(writers), values, DOT, PRECISION)
        if mt is not None:
            if ONE:
                writers = removers
            else:
                writers = load_tile(f + b * f_b + at * f_t + (h // f_share) * f_h, f_t, row, key, inside, K)
            if f_gain is not None:
                found *= f_factor[:, None]
            S += dot(tl.trans(writers), found, DOT, PRECISION)

    store_tile(s_out + state_at * WIDTH, WIDTH, key, col, key < K * emit, S, WIDTH)
    if total is not None:
        if VECTOR:
            tl.store(total + state_at + key, decayed, mask=key < K * (block == 0).to(tl.int32))
        else:
            tl.store(total + n * H + h, decayed, mask=block == 0)


@kernel(do_not_specialize=["per_sequence", "packed", "carried", "emit"])
def _through_segments(
    moves, transitions, total, initial, starts, last, first, per_sequence, packed, carried, emit, H,
    K: tl.constexpr, V: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    PART: tl.constexpr, VECTOR: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S before each segment and after the last, from what each adds and its transition: a matrix, a decay, neither.

    moves [n, H, K, WIDTH], of which V columns count; transitions [n, H, K, K], rows V + K apart.
    """
    block = tl.program_id(0)
    n = tl.program_id(1) // H
    h = tl.program_id(1) % H
    key = tl.arange(0, BLOCK_K)
    part = tl.arange(0, PART)
    col = block * BLOCK_V + tl.arange(0, BLOCK_V)
    whole_state = (n * H + h).to(tl.int64) * (K * V)
    S = load_tile(initial + whole_state, V, key, col, key < K * carried, V)
    if packed:
        begin = tl.load(first + n)
        stop = tl.load(first + n + 1)
    else:
        begin = n * per_sequence
        stop = begin + per_sequence
    for i in range(stop - begin):
        s = stop - 1 - i if REVERSE else begin + i
        here = (s * H + h).to(tl.int64)
        start = starts + here * (K * V)
        move = moves + here * (K * WIDTH)
        transition = transitions + here * (K * (V + K)) if transitions is not None else moves
        store_tile(start, V, key, col, key < K, S, V)
        if transitions is not None:
            # The rows of S that a part of the matrix meets are read back from `starts`: registers cannot be sliced.
            tl.debug_barrier()
            S = load_tile(move, WIDTH, key, col, key < K, V)
            for k in tl.range(0, K, PART, num_stages=2):
                at = k + part
                matrix = load_tile(transition, V + K, key, at, key < K, K)
                old = load_tile(start, V, at, col, at < K, V)
                S += tl.dot(matrix, old, input_precision=PRECISION)
        else:
            if total is not None:
                if VECTOR:
                    S *= tl.load(total + here * K + key, mask=key < K, other=0.0)[:, None]
                else:
                    S *= tl.load(total + here)
            S += load_tile(move, V, key, col, key < K, V)
    store_tile(last + whole_state, V, key, col, key < K * emit, S, V)


class Affine:
    """The tensors of one pass in their roles. `states` finds what each segment starts from, `run` writes the rows out.

    x [B, T, H, V] and rows R, Q, E, F [B, T, heads, K] of any strides, whose heads divide H; X, T, P, U
    [chunks, H, C, C] contiguous, finite where no token is, X and T zero between one and none; factors of rows
    [chunks, H, C], float32; `whole`: None, [chunks, H] or [chunks, H, K], float32. Chunks are numbered as
    `segments.cut` numbers them. R, T, F and either X or X_gain are given together. `reverse` goes from the last chunk
    to the first with the matrices transposed, and "before" is then after.
    """

    def __init__(
        self, x: Tensor, *, R: Tensor | None = None, Q: Tensor | None = None, E: Tensor | None = None,
        F: Tensor | None = None, X: Tensor | None = None, T: Tensor | None = None, P: Tensor | None = None,
        U: Tensor | None = None, X_gain: Tensor | None = None, R_gain: Tensor | None = None,
        Q_gain: Tensor | None = None, F_gain: Tensor | None = None, whole: Tensor | None = None,
        cu_seqlens: Tensor | None = None, reverse: bool = False,
    ):  # fmt: skip
        one = F is not None and F is R
        self.x, self.whole = rows(x), whole
        self.B, self.tokens, self.H, self.V = x.shape
        self.R, self.Q, self.E, self.F = (None if t is None else rows(t) for t in (R, Q, E, F))
        self.K = next(t.shape[3] for t in (E, F) if t is not None)
        self.inner, self.outer = (X, T), (P, U)
        self.gains = (X_gain, R_gain, Q_gain, F_gain)
        self.config = config("affine", device=x.device, K=self.K, V=self.V, size=operand_size(x.dtype))
        self.config["BLOCK_V"] = columns(self.V, x.dtype, self.config["BLOCK_V"])
        programs = self.B * self.H * cdiv(self.V, self.config["BLOCK_V"])
        if T is not None:  # one fills the shared memory that two of the others share
            programs *= 2
        self.cut: Segments = segments(x, cu_seqlens, programs)
        strides = {t.stride(1) for t in (self.R, self.Q, self.E, self.F) if t is not None}
        self.options = {
            "K": self.K, "V": self.V, "BLOCK_K": columns(self.K, x.dtype), "C": CHUNK, "REVERSE": reverse,
            "VECTOR": whole is not None and whole.dim() == 3, "ONE": one, "ALIKE": len(strides) == 1,
            "FETCH": not INTERPRETED,
            "LATE": X is not None and P is not None and self.config["num_stages"] > 1,
            **precision(x.dtype), **self.config,
        }  # fmt: skip

    def states(self, S: Tensor | None, last: Tensor | None = None) -> Tensor | None:
        """What each segment starts from, given what the first (reversed: last) does; the final state goes to `last`."""
        if self.cut.whole:
            return S
        n, H, K, V = self.cut.count, self.H, self.K, self.V
        matrix = self.R is not None
        moves = self._float(n, H, K, V + K if matrix else V)
        total = None if matrix or self.whole is None else self._float(n, *self.whole.shape[1:])
        self._launch(None, None, None, None, moves, total, matrix)
        starts = self._float(n, H, K, V)
        if starts.numel():
            some = starts[:0]
            exact = "ieee" if self.options["PRECISION"] == "ieee" else "tf32x3"
            block = columns(V, torch.float32, 32)
            _through_segments[(cdiv(V, block), self.cut.n_seqs * H)](
                moves, moves[..., V:] if matrix else None, total, some if S is None else S, starts,
                some if last is None else last, self.cut.first, self.cut.per_sequence, self.cut.packed,
                int(S is not None), int(last is not None), H,
                K=K, V=V, WIDTH=moves.shape[3], BLOCK_K=columns(K, torch.float32), BLOCK_V=block,
                PART=columns(K, torch.float32, 32), VECTOR=self.options["VECTOR"], REVERSE=self.options["REVERSE"],
                PRECISION=exact, num_warps=4 if K <= 128 else 8, num_stages=1,
            )  # fmt: skip
        return starts

    def run(
        self, before: Tensor | None, out: Tensor | None = None, *, u: Tensor | None = None,
        states: Tensor | None = None, last: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write the rows o and u, and the states before each chunk, as asked; the final state, unless `states` has."""
        self._launch(before, out, u, states, last if self.cut.whole else None, None, False)

    def _launch(self, before, out, u, states, last, total, matrix: bool) -> None:
        programs = self.cut.count * self.H * cdiv(self.V + matrix * self.K, self.config["BLOCK_V"])
        if not programs:
            return
        some = self.cut.unread
        Q, outer = (None, (None, None)) if out is None else (self.Q, self.outer)
        affine_pass[(programs,)](
            *strided(self.x), *(argument for t in (self.R, Q, self.E, self.F) for argument in shared(t, self.H)),
            *self.inner, *outer, *self.gains, self.whole,
            out, u, states, some if before is None else before, some if last is None else last, total,
            self.cut.table, self.tokens, self.cut.size, self.cut.per_sequence, int(self.cut.packed),
            int(before is not None), int(last is not None), self.H, MATRIX=matrix, **self.options,
        )  # fmt: skip

    def _float(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)
