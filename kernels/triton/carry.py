"""The pass that every matrix-state op shares: chunks in turn, the state in registers, nothing written but the rows out.

Readers r_i [K], writers w_j [K] and their values x_j [V] meet in

    o_i = sum_j exp(G_i - G_j) (r_i . w_j) x_j        over j <= i, or over j >= i when run in REVERSE with G_j - G_i,

with S = sum_j w_j x_j^T carried from chunk to chunk. Forward attention is (r, w, x) = (q, k, v); with do the gradient
of the output, dq is (do, v, k), dk the reversed (v, do, q), dv the reversed (k, q, do): one kernel, four calls, and no
state is ever written to memory between chunks. Katharopoulos et al. 2020 for the recurrence, Yang et al. 2024 for the
chunks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from subquad.kernels.backend import INTERPRETED
from subquad.kernels.triton.configs import config
from subquad.kernels.triton.launch import cdiv, kernel
from subquad.kernels.triton.segments import CHUNK, Segments, combine, segment_bounds
from subquad.kernels.triton.tiles import columns, dot, exp2, fetch, load_tile, precision, shared, store_tile


@triton.jit
def pair_weights(gap, row, DECAY: tl.constexpr, STRICT: tl.constexpr, REVERSE: tl.constexpr):
    """2^gap where the pair counts, else 0. Rows are the readers, which REVERSE makes the keys."""
    if REVERSE:
        counts = row[None, :] > row[:, None] if STRICT else row[None, :] >= row[:, None]
    else:
        counts = row[:, None] > row[None, :] if STRICT else row[:, None] >= row[None, :]
    if not DECAY:
        return tl.where(counts, 1.0, 0.0)
    return exp2(tl.where(counts, gap, float("-inf")))


@triton.jit
def gate_columns(base, token, C: tl.constexpr):
    """(high, low, since, until) [C] of `cumulate`'s rows: one load of 16 bytes a token, in one layout."""
    four = tl.load(base + token[:, None] * 4 + tl.arange(0, 4)[None, :])
    even, odd = tl.split(four.reshape(C, 2, 2))
    high, since = tl.split(even)
    low, until = tl.split(odd)
    return high, low, since, until


@kernel(do_not_specialize=["T", "segment", "per_sequence", "packed", "carried", "emit", "n_rows"])
def carry_pass(
    # Each row tensor [B, T, heads, width] comes with its strides and the number of our heads that share one of its.
    r, r_b, r_t, r_h, r_share,
    w, w_b, w_t, w_h, w_share,
    x, x_b, x_t, x_h, x_share,
    o,
    # cumulated decay in powers of two [B, H, T, 4] (gates.py); the whole of each segment [n, H]
    gates, total,
    # states before and after each segment [n, H, K, V], or [n, H, V, K] if TRANSPOSED
    s_in, s_out,
    # partner rows of o and where their products go, [blocks, B, T, H]
    p, p_b, p_t, p_h, p_share, term,
    # one more key coordinate (r_more, w_more [B, T, H], None for ones) or value coordinate (normalizer): z, out in den
    r_more, w_more, z_in, z_out, den,
    table, T, segment, per_sequence, packed, carried, emit, n_rows, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr,
    KEY_MORE: tl.constexpr, VALUE_MORE: tl.constexpr, ALIKE: tl.constexpr, FETCH: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ALIKE: rows of readers, writers, values, partners and those written out are as far apart."""
    N_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    block = program % N_BLOCKS
    h = (program // N_BLOCKS) % H
    n = program // (N_BLOCKS * H)
    b, start, end, _chunk = segment_bounds(table, n, T, segment, per_sequence, packed)
    o_t = H * V
    if ALIKE:  # one set of offsets in registers instead of five
        w_t = r_t
        x_t = r_t
        p_t = r_t
        o_t = r_t
    r += b * r_b + (h // r_share) * r_h
    w += b * w_b + (h // w_share) * w_h
    x += b * x_b + (h // x_share) * x_h
    if term is not None:
        p += b * p_b + (h // p_share) * p_h
    row = tl.arange(0, C)
    key = tl.arange(0, BLOCK_K)
    col = block * BLOCK_V + tl.arange(0, BLOCK_V)

    state_at = (n * H + h).to(tl.int64) * K * V
    state_rows = key[:, None] + col[None, :] * K if TRANSPOSED else key[:, None] * V + col[None, :]
    # `carried` and `emit` are 0 or 1, not constants: no state or one makes no other kernel.
    S = tl.load(s_in + state_at + state_rows, mask=(key < K * carried)[:, None] & (col < V)[None, :], other=0.0)
    if KEY_MORE:
        z = tl.load(z_in + (n * H + h) * V + col, mask=col < V * carried, other=0.0)
    if VALUE_MORE:
        z = tl.load(z_in + (n * H + h) * K + key, mask=key < K * carried, other=0.0)
    first_block = (block == 0).to(tl.int32)
    decayed = 0.0
    gate_row = gates
    if DECAY:
        gate_row = gates + (b * H + h) * T * 4

    n_chunks = (end - start + C - 1) // C
    for i in range(n_chunks):
        first = start + (n_chunks - 1 - i if REVERSE else i) * C
        inside = row < end - first
        at = first.to(tl.int64)
        line = (b * T + at) * H + h  # of a contiguous [B, T, H]

        if FETCH and term is None:
            following = tl.maximum(n_chunks - 2 - i, 0) if REVERSE else tl.minimum(i + 1, n_chunks - 1)
            token = tl.minimum(start + following * C + row, end - 1)
            fetch(w, w_t, token, 0, BLOCK_K, K)
            fetch(x, x_t, token, block * BLOCK_V, BLOCK_V, V)
            if o is not None:
                fetch(r, r_t, token, 0, BLOCK_K, K)

        writers = load_tile(w + at * w_t, w_t, row, key, inside, K)
        values = load_tile(x + at * x_t, x_t, row, col, inside, V)
        if DECAY:
            final = tl.minimum(first + C, end) - 1  # rows past the end see its gate, so no difference turns positive
            k_high, k_low, since, until = gate_columns(gate_row, tl.minimum(first + row, final), C)
            if EXCLUSIVE:  # a reader comes before its own decay
                there = tl.minimum(tl.maximum(first + row - 1, first), final)
                q_high, q_low, since, _until = gate_columns(gate_row, there, C)
                q_high = tl.where(row > 0, q_high, 0.0)
                q_low = tl.where(row > 0, q_low, 0.0)
                since = tl.where(row > 0, since, 1.0)
            else:
                q_high, q_low = k_high, k_low
            whole = tl.load(gate_row + 4 * final + 2)
            if total is not None:
                decayed += tl.load(gate_row + 4 * final)

        if o is not None:
            readers = load_tile(r + at * r_t, r_t, row, key, inside, K)
            scores = dot(readers, tl.trans(writers), DOT, PRECISION)
            read = dot(readers, S, DOT, PRECISION)
            if KEY_MORE:
                if r_more is not None:
                    extra = tl.load(r_more + line + row * H, mask=inside, other=0.0)
                    scores += extra[:, None]
                    read += extra[:, None] * z[None, :]
                else:
                    extra = tl.load(w_more + line + row * H, mask=inside, other=0.0)
                    scores += extra[None, :]
                    read += z[None, :]
            if DECAY:
                read *= (until if REVERSE else since)[:, None]
                if REVERSE:
                    gap = (q_high[None, :] - k_high[:, None]) + (q_low[None, :] - k_low[:, None])
                else:
                    gap = (q_high[:, None] - k_high[None, :]) + (q_low[:, None] - k_low[None, :])
            else:
                gap = scores
            scores *= pair_weights(gap, row, DECAY, EXCLUSIVE, REVERSE)
            out = read + dot(scores, values, DOT, PRECISION)
            store_tile(o + line * V, o_t, row, col, inside, out, V)
            if VALUE_MORE:
                seen = tl.sum(readers.to(tl.float32) * z[None, :], 1)
                if DECAY:
                    seen *= since
                tl.store(den + line + row * H, seen + tl.sum(scores, 1), mask=row < (end - first) * first_block)
            if term is not None:
                partner = load_tile(p + at * p_t, p_t, row, col, inside, V)
                products = tl.sum(out * partner.to(tl.float32), 1)
                tl.store(term + block * n_rows.to(tl.int64) * H + line + row * H, products, mask=inside)

        # What the writers add to the state past the chunk (reversed: before it).
        if DECAY:
            gain = since if REVERSE else until
            S *= whole
            S += dot(tl.trans(writers), values * gain[:, None], DOT, PRECISION)
        else:
            gain = tl.where(inside, 1.0, 0.0)
            S += dot(tl.trans(writers), values, DOT, PRECISION)
        if KEY_MORE:
            if DECAY:
                z *= whole
            if r_more is None:
                gain *= tl.load(w_more + line + row * H, mask=inside, other=0.0)
            z += tl.sum(values.to(tl.float32) * gain[:, None], 0)
        if VALUE_MORE:
            if DECAY:
                z *= whole
            z += tl.sum(writers.to(tl.float32) * gain[:, None], 0)

    tl.store(s_out + state_at + state_rows, S, mask=(key < K * emit)[:, None] & (col < V)[None, :])
    if KEY_MORE:
        tl.store(z_out + (n * H + h) * V + col, z, mask=col < V * emit)
    if VALUE_MORE:
        tl.store(z_out + (n * H + h) * K + key, z, mask=key < K * emit * first_block)
    if total is not None:
        tl.store(total + n * H + h, decayed, mask=block == 0)


class States(NamedTuple):
    """Before each segment, and after it where asked for: S [n, H, K, V] and the normaliser's z."""

    S: Tensor | None
    z: Tensor | None
    S_ends: Tensor | None = None
    z_ends: Tensor | None = None


class Pass:
    """The tensors of one pass in their roles. `states` finds what each segment starts from, `run` writes the rows out.

    readers r, writers w [B, T, heads, K] and values x [B, T, heads, V], whose heads divide the H of the widest; gates:
    from `cumulate`. `transposed`: states lie in memory as [V, K]. r_more, w_more [B, T, H]: one more key coordinate of
    readers or writers, with ones on the other side; `normalized`: one more value coordinate, of ones.
    """

    def __init__(
        self, cut: Segments, r: Tensor, w: Tensor, x: Tensor, gates: Tensor | None = None, *, exclusive: bool = False,
        reverse: bool = False, transposed: bool = False, normalized: bool = False, r_more: Tensor | None = None,
        w_more: Tensor | None = None,
    ):  # fmt: skip
        self.cut, self.rows, self.gates, self.reverse = cut, (r, w, x), gates, reverse
        self.B, self.T, self.V = x.shape[0], x.shape[1], x.shape[3]
        self.H, self.K = max(r.shape[2], w.shape[2], x.shape[2]), w.shape[3]
        self.more = r_more, w_more
        self.key_more, self.normalized = r_more is not None or w_more is not None, normalized
        launch = config("carry", device=x.device, K=self.K, V=self.V)
        launch["BLOCK_V"] = columns(self.V, x.dtype, launch["BLOCK_V"])
        self.options = {
            "K": self.K, "V": self.V, "BLOCK_K": columns(self.K, x.dtype), "C": CHUNK, "DECAY": gates is not None,
            "EXCLUSIVE": exclusive, "REVERSE": reverse, "TRANSPOSED": transposed, "KEY_MORE": self.key_more,
            "VALUE_MORE": normalized, "FETCH": not INTERPRETED, **precision(x.dtype), **launch,
        }  # fmt: skip
        self.blocks = -(-self.V // self.options["BLOCK_V"])

    def new_term(self) -> Tensor:
        """Room for the products of output rows with partner rows."""
        return self._float(self.blocks, self.B, self.T, self.H)

    def states(
        self, S: Tensor | None, z: Tensor | None, last: Tensor | None = None, z_last: Tensor | None = None, *,
        ends: bool = False,
    ) -> States:  # fmt: skip
        """What each segment starts from, given what the first (reversed: last) does; the final state goes to `last`."""
        if self.cut.whole:
            return States(S, z, last if ends else None, z_last if ends else None)
        n, H, width = self.cut.count, self.H, self.V if self.key_more else self.K
        alone = self._float(n, H, self.K, self.V)
        z_alone = self._float(n, H, width) if self.key_more or self.normalized else None
        total = None if self.gates is None else self._float(n, H)
        self._launch(States(None, None), None, alone, z_alone, total=total)
        S_found = self._combine(alone, total, S, last, ends)
        z_found = (None, None)
        if z_alone is not None:  # a state one value wide
            z_found = self._combine(z_alone[..., None], total, z, z_last, ends)
            z_found = tuple(None if x is None else x[..., 0] for x in z_found)
        return States(S_found[0], z_found[0], S_found[1], z_found[1])

    def run(
        self, before: States, out: Tensor, *, last: Tensor | None = None, z_last: Tensor | None = None,
        den: Tensor | None = None, partner: Tensor | None = None, term: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write the rows; and the final state, unless `states` has."""
        if not self.cut.whole:
            last = z_last = None
        self._launch(before, out, last, z_last, den=den, partner=partner, term=term)

    def _launch(self, before, out, last, z_last, *, total=None, den=None, partner=None, term=None) -> None:
        if not self.cut.count or not self.H:
            return
        cut, some = self.cut, self.cut.unread
        s_in, s_out, z_in, z_out = (some if t is None else t for t in (before.S, last, before.z, z_last))
        r, w, x = self.rows
        strides = {t.stride(1) for t in (r, w, x, partner) if t is not None}
        carry_pass[(cut.count * self.H * self.blocks,)](
            *shared(r, self.H), *shared(w, self.H), *shared(x, self.H), out, self.gates, total, s_in, s_out,
            *shared(partner, self.H), term, *self.more, z_in, z_out, den,
            cut.table, self.T, cut.size, cut.per_sequence, cut.packed, int(before.S is not None), int(last is not None),
            self.B * self.T, self.H, ALIKE=strides == {self.H * self.V}, **self.options,
        )  # fmt: skip

    def _combine(self, alone, total, initial, last, ends):
        _, H, K, V = alone.shape
        cut, some = self.cut, self.cut.unread
        starts = torch.empty_like(alone)
        after = torch.empty_like(alone) if ends else None
        combine[(cdiv(K * V, 1024), cut.n_seqs * H)](
            alone, total, some if initial is None else initial, starts, after, some if last is None else last,
            cut.first, cut.per_sequence, cut.packed, int(initial is not None), int(last is not None), H,
            K=K, V=V, BLOCK=1024, REVERSE=self.reverse,
        )  # fmt: skip
        return starts, after

    def _float(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.cut.unread.device)
