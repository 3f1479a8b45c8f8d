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

from subquad.kernels.triton.segments import CHUNK, Segments, combine, segment_bounds, segments
from subquad.kernels.triton.tiles import cumulated, dot, load_tile, padded, precision, store_tile


@triton.jit
def pair_weights(q_high, q_low, k_high, k_low, row, DECAY: tl.constexpr, STRICT: tl.constexpr, REVERSE: tl.constexpr):
    """exp(G_query - G_key) where the pair counts, else 0. Rows are the readers, which REVERSE makes the keys."""
    if REVERSE:
        counts = row[None, :] > row[:, None] if STRICT else row[None, :] >= row[:, None]
    else:
        counts = row[:, None] > row[None, :] if STRICT else row[:, None] >= row[None, :]
    if not DECAY:
        return tl.where(counts, 1.0, 0.0)
    if REVERSE:
        gap = (q_high[None, :] - k_high[:, None]) + (q_low[None, :] - k_low[:, None])
    else:
        gap = (q_high[:, None] - k_high[None, :]) + (q_low[:, None] - k_low[None, :])
    return tl.exp(tl.where(counts, gap, float("-inf")))


@triton.jit(do_not_specialize=["T", "segment", "per_sequence", "packed", "carried", "emit", "n_rows"])
def carry_pass(
    # Each row tensor [B, T, heads, width] comes with its strides and the number of our heads that share one of its.
    r, r_b, r_t, r_h, r_share,
    w, w_b, w_t, w_h, w_share,
    x, x_b, x_t, x_h, x_share,
    o,
    # log decay [B, T, H]
    g, g_b, g_t, g_h,
    # states before and after each segment [n, H, K, V], with the strides of K and V; log decay of each segment
    s_in, s_out, s_k, s_v, total,
    # partner rows of o and where their products go, [blocks, B, T, H]
    p, p_b, p_t, p_h, p_share, term,
    # one more key coordinate (r_more, w_more [B, T, H], None for ones) or value coordinate (normalizer): z, out in den
    r_more, w_more, z_in, z_out, den,
    # a second reader or writer of the delta rule, strictly before (reversed: after) its token
    r2, r2_b, r2_t, r2_h, o2,
    w2, w2_b, w2_t, w2_h, x2, x2_b, x2_t, x2_h, x2_share,
    table, T, segment, per_sequence, packed, carried, emit, n_rows, H,
    K: tl.constexpr, V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr,
    KEY_MORE: tl.constexpr, VALUE_MORE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    N_BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    program = tl.program_id(0)
    block = program % N_BLOCKS
    h = (program // N_BLOCKS) % H
    n = program // (N_BLOCKS * H)
    b, start, end, _ = segment_bounds(table, n, T, segment, per_sequence, packed)
    row = tl.arange(0, C)
    key = tl.arange(0, BLOCK_K)
    col = block * BLOCK_V + tl.arange(0, BLOCK_V)

    state_at = (n * H + h).to(tl.int64) * K * V
    state_rows = key[:, None] * s_k + col[None, :] * s_v
    # `carried` and `emit` are 0 or 1, not constants: no state or one makes no other kernel.
    S = tl.load(s_in + state_at + state_rows, mask=(key < K * carried)[:, None] & (col < V)[None, :], other=0.0)
    if KEY_MORE:
        z = tl.load(z_in + (n * H + h) * V + col, mask=col < V * carried, other=0.0)
    if VALUE_MORE:
        z = tl.load(z_in + (n * H + h) * K + key, mask=key < K * carried, other=0.0)
    first_block = (block == 0).to(tl.int32)
    if total is not None:
        decayed = 0.0

    n_chunks = (end - start + C - 1) // C
    for i in range(n_chunks):
        first = start + (n_chunks - 1 - i if REVERSE else i) * C
        inside = row < end - first
        at = first.to(tl.int64)
        line = ((b * T + at) * H + h).to(tl.int64)  # of a contiguous [B, T, H]

        writers = load_tile(w + b * w_b + at * w_t + (h // w_share) * w_h, w_t, row, key, inside, K)
        values = load_tile(x + b * x_b + at * x_t + (h // x_share) * x_h, x_t, row, col, inside, V)
        if DECAY:
            gate = tl.load(g + b * g_b + at * g_t + h * g_h + row * g_t, mask=inside, other=0.0)
            q_high, q_low, k_high, k_low, since, until, whole = cumulated(gate, EXCLUSIVE)
            if total is not None:
                decayed += whole
        else:
            q_high, q_low, k_high, k_low = 0.0, 0.0, 0.0, 0.0

        if o is not None:
            readers = load_tile(r + b * r_b + at * r_t + (h // r_share) * r_h, r_t, row, key, inside, K)
            weights = pair_weights(q_high, q_low, k_high, k_low, row, DECAY, EXCLUSIVE, REVERSE)
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
            scores *= weights
            out = read + dot(scores, values, DOT, PRECISION)
            if w2 is not None:
                writers2 = load_tile(w2 + b * w2_b + at * w2_t + h * w2_h, w2_t, row, key, inside, K)
                values2 = load_tile(x2 + b * x2_b + at * x2_t + (h // x2_share) * x2_h, x2_t, row, col, inside, V)
                later = tl.where(row[None, :] > row[:, None], weights, 0.0)
                scores2 = dot(readers, tl.trans(writers2), DOT, PRECISION) * later
                out += dot(scores2, values2, DOT, PRECISION)
            store_tile(o + line * V, H * V, row, col, inside, out, V)
            if VALUE_MORE:
                seen = tl.sum(readers.to(tl.float32) * z[None, :], 1)
                if DECAY:
                    seen *= since
                tl.store(den + line + row * H, seen + tl.sum(scores, 1), mask=row < (end - first) * first_block)
            if r2 is not None:
                readers2 = load_tile(r2 + b * r2_b + at * r2_t + h * r2_h, r2_t, row, key, inside, K)
                read2 = dot(readers2, S, DOT, PRECISION)
                if DECAY:
                    read2 *= since[:, None]
                before = tl.where(row[:, None] > row[None, :], weights, 0.0)
                scores2 = dot(readers2, tl.trans(writers), DOT, PRECISION) * before
                out2 = read2 + dot(scores2, values, DOT, PRECISION)
                store_tile(o2 + line * V, H * V, row, col, inside, out2, V)
                if term is not None:
                    out2 = out2 * values.to(tl.float32)
            if term is not None:
                partner = load_tile(p + b * p_b + at * p_t + (h // p_share) * p_h, p_t, row, col, inside, V)
                products = out * partner.to(tl.float32)
                if r2 is not None:
                    products += out2
                tl.store(term + block * n_rows.to(tl.int64) * H + line + row * H, tl.sum(products, 1), mask=inside)

        # A reversed pass carries what its writers add to the state before the chunk.
        if DECAY:
            gain = since if REVERSE else until
            S *= tl.exp(whole)
            added = values * gain[:, None]
        else:
            gain = tl.where(inside, 1.0, 0.0)
            added = values
        S += dot(tl.trans(writers), added, DOT, PRECISION)
        if w2 is not None:
            if DECAY:
                S += dot(tl.trans(writers2), values2 * gain[:, None], DOT, PRECISION)
            else:
                S += dot(tl.trans(writers2), values2, DOT, PRECISION)
        if KEY_MORE:
            if DECAY:
                z *= tl.exp(whole)
            if r_more is None:
                more = tl.load(w_more + line + row * H, mask=inside, other=0.0)
                z += tl.sum(values.to(tl.float32) * (gain * more)[:, None], 0)
            else:
                z += tl.sum(values.to(tl.float32) * gain[:, None], 0)
        if VALUE_MORE:
            if DECAY:
                z *= tl.exp(whole)
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

    readers r, writers w [B, T, heads, K] and values x [B, T, heads, V], whose heads divide the H of the widest; g:
    log decay [B, T, H]. `transposed`: states lie in memory as [V, K]. r2: second readers, w2 and x2: second writers and
    their values, strictly apart from their token. r_more, w_more [B, T, H]: one more key coordinate of readers or writers,
    with ones on the other side; `normalized`: one more value coordinate, of ones.
    """

    def __init__(
        self, r: Tensor, w: Tensor, x: Tensor, g: Tensor | None = None, cu_seqlens: Tensor | None = None, *,
        reverse: bool = False, exclusive: bool = False, transposed: bool = False, normalized: bool = False,
        r_more: Tensor | None = None, w_more: Tensor | None = None,
        r2: Tensor | None = None, w2: Tensor | None = None, x2: Tensor | None = None,
    ):  # fmt: skip
        self.x, self.g = x, g
        self.B, self.T, self.H = x.shape[0], x.shape[1], max(t.shape[2] for t in (r, w, x))
        self.K, self.V, self.reverse = w.shape[3], x.shape[3], reverse
        self.config = _config(self.K, self.V)
        self.blocks = -(-self.V // self.config["BLOCK_V"])
        self.cut: Segments = segments(x, cu_seqlens, self.B * self.H * self.blocks)
        self.state_strides = (1, self.K) if transposed else (self.V, 1)
        self.key_more, self.normalized = r_more is not None or w_more is not None, normalized
        self.more = tuple(None if m is None else m.contiguous() for m in (r_more, w_more))
        self.rows = [*self._row(r), *self._row(w), *self._row(x)]
        self.second = [*self._row(r2)[:4]], [*self._row(w2)[:4], *self._row(x2)]
        self.options = {
            "K": self.K, "V": self.V, "BLOCK_K": padded(self.K), "C": CHUNK, "DECAY": g is not None,
            "EXCLUSIVE": exclusive, "REVERSE": reverse, "KEY_MORE": self.key_more, "VALUE_MORE": normalized,
            **precision(x), **self.config,
        }  # fmt: skip

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
        total = None if self.g is None else self._float(n, H)
        self._launch(States(None, None), None, alone, z_alone, total=total)
        S_found = self._combine(alone, total, S, last, ends)
        z_found = (None, None) if z_alone is None else self._combine(z_alone[..., None], total, z, z_last, ends)
        return States(S_found[0], z_found[0], S_found[1], z_found[1])

    def run(
        self, before: States, out: Tensor, *, last: Tensor | None = None, z_last: Tensor | None = None,
        den: Tensor | None = None, out2: Tensor | None = None, partner: Tensor | None = None,
        term: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Write the rows; and the final state, unless `states` has."""
        if not self.cut.whole:
            last = z_last = None
        self._launch(before, out, last, z_last, den=den, out2=out2, partner=partner, term=term)

    def _launch(self, before, out, last, z_last, *, total=None, den=None, out2=None, partner=None, term=None) -> None:
        if not self.cut.count or not self.H:
            return
        some = self.x.new_empty(0, dtype=torch.float32)  # stands for a pointer that is never followed
        given = [some if t is None else t for t in (before.S, last, before.z, z_last)]
        g = [None, 0, 0, 0] if self.g is None else [self.g, *self.g.stride()]
        carry_pass[(self.cut.count * self.H * self.blocks,)](
            *self.rows, out, *g, given[0], given[1], *self.state_strides, total,
            *self._row(partner), term, *self.more, given[2], given[3], den,
            *self.second[0], out2, *self.second[1],
            self.cut.table, self.T, self.cut.size, self.cut.per_sequence, int(self.cut.packed),
            int(before.S is not None), int(last is not None), self.B * self.T, self.H, **self.options,
        )  # fmt: skip

    def _combine(self, alone, total, initial, last, ends):
        _, H, K, V = alone.shape
        some = alone.new_empty(0)
        starts = torch.empty_like(alone)
        after = torch.empty_like(alone) if ends else None
        lanes = K * V
        combine[(triton.cdiv(lanes, 1024), self.cut.n_seqs * H)](
            alone, total, some if initial is None else initial, starts, after, some if last is None else last,
            self.cut.first, self.cut.per_sequence, int(self.cut.packed), int(initial is not None),
            int(last is not None), H,
            K=K, V=V, BLOCK=1024, REVERSE=self.reverse,
        )  # fmt: skip
        return starts, after

    def _row(self, x: Tensor | None):
        return (None, 0, 0, 0, 1) if x is None else (x, *x.stride()[:3], self.H // x.shape[2])

    def _float(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)


def _config(K: int, V: int) -> dict[str, int]:
    return {"BLOCK_V": min(64 if K <= 128 else 32, padded(V)), "num_warps": 4, "num_stages": 2}
