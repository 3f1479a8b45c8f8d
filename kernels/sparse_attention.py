"""Softmax attention over a declared sparse pattern, with a cache that keeps what the pattern can still read."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.cache import ring_slots, write_slots
from subquad.kernels.packing import advance, mask_padding
from subquad.kernels.patterns import SparsePattern
from subquad.kernels.state import Append, Count, Ring, accumulator_dtype
from subquad.kernels.tiles import BUDGET, EMPTY, Piece, Rows, Source, Tiles, joined, piece
from subquad.kernels.wrapping import full_precision, sequence_op

SHORT = 128  # tokens up to which tiles cost more than a whole mask


class SparseCache(NamedTuple):
    """The first and the last tokens (slots as in a RingCache), and what is read for ever, F slots of max_len."""

    k: Ring  # [N, first + ring, G, K]
    v: Ring  # [N, first + ring, G, V]
    far_k: Append  # [N, F, G, K]; F = 0 where the pattern forgets everything
    far_v: Append  # [N, F, G, V]
    count: Count  # [N]


def empty_cache(
    pattern: SparsePattern, n_seqs: int, max_len: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> SparseCache:
    """The cache before any token: first + ring slots, and far slots in proportion to max_len where there are any."""
    far = 0 if pattern.far is None else -(-max_len // pattern.far.stride) * pattern.far.width
    near_k = torch.zeros(n_seqs, pattern.first + pattern.ring, heads, width, dtype=dtype, device=device)
    far_k = torch.zeros(n_seqs, far, heads, width, dtype=dtype, device=device)
    count = torch.zeros(n_seqs, dtype=torch.int64, device=device)
    return SparseCache(near_k, near_k.clone(), far_k, far_k.clone(), count)


@sequence_op
def sparse_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    pattern: SparsePattern,
    *,
    state: SparseCache | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], SparseCache | None]:
    """o_t = sum_s softmax_s(q_t . k_s) v_s over the s that the pattern lets head h at t read   (q is not scaled).

    Arguments
        q: H heads; k, v: G heads, where G divides H: query heads h read head h // (H / G).
        pattern: subquad.kernels.patterns; each key counts once, whichever parts read it.
        state: from `empty_cache`; causal patterns only.
        cu_seqlens: [N+1] boundaries of sequences packed in one row.

    Returns (o [B, T, H, V], the new state or None).
    Cost: O(edges H K), where the edges are those of the pattern's tiles, and never T^2; a decoded token costs what it
    reads; state 2 (first + ring + far) G K.
    """
    _check(q, k, pattern, state)
    if cu_seqlens is not None:  # whatever stands in padding rows must not reach a product
        q, k, v = (mask_padding(x, cu_seqlens) for x in (q, k, v))
    form = pick("sparse_attention", _FORMS, q)
    with full_precision(q):
        out, caches = form(q, k, v, pattern, state, cu_seqlens)
    if state is None:
        return out, None
    return out, SparseCache(*caches, advance(state.count, q.shape[1], cu_seqlens))


def _check(q, k, pattern, state) -> None:
    if q.shape[2] % k.shape[2]:
        raise UserError(f"sparse_attention: {k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    if state is None:
        return
    if not pattern.causal:
        raise UserError("sparse_attention: causal=False reads the whole sequence at once and has no state")
    if state.k.shape[1] != pattern.first + pattern.ring:
        raise UserError(
            f"sparse_attention: a cache of {state.k.shape[1]} slots is not this pattern's, which keeps {pattern.first} "
            f"first and {pattern.ring} last tokens"
        )


# The specification: every edge asked one by one.


def _naive(q, k, v, pattern, state, cu_seqlens):
    T, H = q.shape[1:3]
    bounds = [0, T] if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(n, 0, T) for n in range(q.shape[0])] if cu_seqlens is None else [(0, a, b) for a, b in pairwise(bounds)]
    head = torch.arange(H, device=q.device)[:, None, None]
    outs, caches = [], []
    for n, (row, start, end) in enumerate(spans):
        q_n, k_n, v_n = (x[row, start:end] for x in (q, k, v))
        begin, near, far, held, kept = 0, (), (), {}, {}
        if state is not None:
            begin = int(state.count[n])
            near = state.k[n].unbind(0), state.v[n].unbind(0)
            far = state.far_k[n].unbind(0), state.far_v[n].unbind(0)
            held, kept = _near_slots(pattern, begin), _far_slots(pattern, begin)
            caches.append(_naive_write(pattern, near, far, begin, k_n, v_n))
        keys, values = (
            torch.cat(
                [
                    new[:0],
                    *(
                        old[i][s][None].to(new.dtype)
                        for old, slots in ((far, kept), (near, held))
                        for s in slots.values()
                    ),
                    new,
                ]
            )
            for i, new in enumerate((k_n, v_n))
        )
        query_at = torch.arange(begin, begin + end - start, device=q.device)
        old_at = torch.tensor([*kept, *held], dtype=torch.int64, device=q.device)
        key_at = torch.cat([old_at, query_at])
        mask = pattern.reads(head, query_at[:, None], key_at)
        from_far = pattern.reads_far(head, query_at[:, None], key_at)  # a token that is in both caches counts once
        mask = torch.cat(
            [from_far[..., : len(kept)], (mask & ~from_far)[..., len(kept) : len(old_at)], mask[..., len(old_at) :]], -1
        )
        keys, values = (x.repeat_interleave(H // k.shape[2], 1) for x in (keys, values))
        scores = torch.einsum("thk,shk->hts", q_n, keys).masked_fill(~mask, -torch.inf)
        outs.append(torch.einsum("hts,shv->thv", scores.softmax(-1), values))
    if cu_seqlens is None:
        out = torch.stack(outs)
    else:
        out = torch.cat([*outs, q.new_zeros(T - bounds[-1], H, v.shape[3])])[None]
    if state is None:
        return out, None
    new = [torch.stack(parts) for parts in zip(*caches, strict=True)]
    if torch.is_grad_enabled():
        return out, new
    return out, [old.copy_(x) for old, x in zip(state[:4], new, strict=True)]


def _near_slots(pattern, end):
    """Position -> slot of the tokens kept among the first and the last, once `end` were seen."""
    last = range(max(end - pattern.ring, 0), end)
    return {p: p for p in range(min(pattern.first, end))} | {
        p: pattern.first + (p - pattern.first) % pattern.ring for p in last if p >= pattern.first
    }


def _far_slots(pattern, end):
    if pattern.far is None:
        return {}
    stride, width = pattern.far
    kept = [p for p in range(end) if p % stride >= stride - width]
    return {p: slot for slot, p in enumerate(kept)}


def _naive_write(pattern, near, far, begin, k, v):
    (near_k, near_v), (far_k, far_v) = (tuple(map(list, part)) for part in (near, far))
    end = begin + len(k)
    for p, slot in _near_slots(pattern, end).items():
        if p >= begin:
            near_k[slot], near_v[slot] = k[p - begin].to(near_k[slot].dtype), v[p - begin].to(near_v[slot].dtype)
    for p, slot in _far_slots(pattern, end).items():
        if p >= begin:
            if slot >= len(far_k):
                raise UserError(f"the cache is full; a token at position {p} does not fit (raise max_len)")
            far_k[slot], far_v[slot] = k[p - begin].to(far_k[slot].dtype), v[p - begin].to(far_v[slot].dtype)
    empty = k.new_zeros(0, *k.shape[1:]), v.new_zeros(0, *v.shape[1:])
    stacks = (near_k, near_v, far_k, far_v)
    return [torch.stack(x) if x else empty[i % 2] for i, x in enumerate(stacks)]


# The fast form: for each part, tiles of queries against the few keys that the part gives them.


def _dense(q, k, v, pattern):
    at = torch.arange(q.shape[1], device=q.device)
    mask = pattern.reads(torch.arange(q.shape[2], device=q.device)[:, None, None], at[:, None], at)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0, enable_gqa=grouped)
    return out.transpose(1, 2)


def _tiled(q, k, v, pattern, state, cu_seqlens):
    B, T, H, _ = q.shape
    if state is None and cu_seqlens is None and T <= SHORT:
        return _dense(q, k, v, pattern), None
    wide = accumulator_dtype(q.dtype)
    rows = Rows(B, T, None if state is None else state.count, cu_seqlens, q.device)
    near, far, end, caches = _sources(rows, q, k, v, pattern, state)
    pieces = []
    if T:
        queries = q.flatten(0, 1).to(wide)
        for i, part in enumerate(pattern.parts):
            groups = part.split(H, pattern.causal)
            source = near if part.far is None or state is None else far
            for sub in {type(g): None for _, g in groups}:  # a global part reads and is read: two pieces
                same = [(heads, g) for heads, g in groups if type(g) is sub]
                found = [
                    part_piece(rows, queries, source, pattern, g, pattern.parts[:i], heads, k.shape[2], end)
                    for heads, g in same
                ]
                order = torch.tensor([h for heads, _ in same for h in heads], device=q.device).argsort()
                pieces.append(
                    found[0]
                    if len(found) == 1
                    else Piece(*(torch.cat(x, 1)[:, order] for x in zip(*found, strict=True)))
                )
    out = joined(pieces).to(q.dtype) if pieces else q.new_zeros(B * T, H, v.shape[3])
    return mask_padding(out.unflatten(0, (B, T)), cu_seqlens), caches


def part_piece(rows, queries, source, pattern, part, earlier, heads, n_kv, end):
    """The piece [R, h, .] of one part: the keys it reads that no earlier part does."""
    H = queries.shape[1]
    size, spacing = (1, 1) if rows.time == 1 else part.tile(rows.time)
    tiles = Tiles(rows, size, spacing, part.limit())
    whole = len(heads) == H and not part.per_head
    head = torch.tensor(heads, device=queries.device)
    kv_heads = None if whole else head // (H // n_kv)
    groups = n_kv if whole else len(heads)
    taken = tiles.take(queries if len(heads) == H else queries[:, heads])  # [M, C, h, K]
    taken = taken.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)  # [M, g, h/g, C, K]
    at = part.keys(head, tiles.first, size, end, pattern.causal)
    found = []
    step = max(1, BUDGET // max(1, len(heads) * size * at.shape[-1]))
    for m in range(0, max(len(at), 1), step):
        span = slice(m, m + step)
        sequence, key = tiles.sequence[span], at[span]
        row = source.row(sequence.view(-1, *[1] * (key.dim() - 1)), key)
        row = row if whole or row.dim() == 3 else row[:, None]
        keys, values = (x.to(queries.dtype) for x in source.take(row, kv_heads))
        key = key.unsqueeze(-2) if key.dim() == 3 else key[:, None, None]  # [M, h | 1, 1, L]
        query = tiles.position[span][:, None, :, None]
        mask = (key >= 0) & (key < rows.end[sequence].view(-1, 1, 1, 1))
        if pattern.causal:
            mask = mask & (key <= query)
        mask = mask & pattern.part_reads(part, head[:, None, None], query, key)
        for other in earlier:
            mask = mask & ~pattern.part_reads(other, head[:, None, None], query, key)
        mask = mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, (groups, -1))
        # Query heads that share keys are rows of one product.
        shape = taken[span].shape
        flat = taken[span].flatten(2, 3)
        mask = mask.expand(-1, -1, shape[2], -1, -1).flatten(2, 3)
        found.append(Piece(*(x.unflatten(2, shape[2:4]) for x in piece(flat, keys, values, mask))))
    whole_piece = (torch.cat(x) if len(found) > 1 else x[0] for x in zip(*found, strict=True))
    turned = [x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in whole_piece]
    return Piece(*(tiles.back(x, fill) for x, fill in zip(turned, (EMPTY, 0.0, 0.0), strict=True)))


def _sources(rows, q, k, v, pattern, state):
    """(near, far, the end of all positions, the caches with the new tokens written)."""
    new = [x.flatten(0, 1) for x in (k, v)]
    if state is None:
        return Source(*new, rows.row), None, rows.time, None
    slots, kept, end = state.k.shape[1], state.far_k.shape[1], 0
    far = pattern.far
    if far is not None:
        end = kept // far.width * far.stride
        if q.device.type == "cpu" and not torch.compiler.is_compiling():  # where reading counts costs nothing
            used = int(rows.end.max()) if rows.n_seqs else 0
            if used > end:
                raise UserError(f"the cache has room for {end} tokens; {used} do not fit (raise max_len)")
            end = used
    old = [x.flatten(0, 1) for x in (state.k, state.v)]
    if rows.time > 1 or rows.packed:  # what the new tokens overwrite may still be read by the first of them
        old = [torch.cat([x, o.to(x.dtype)]) for x, o in zip(new, old, strict=True)]
    position, n = rows.position, rows.sequence
    lasting = (position < pattern.first) | (position >= rows.end[n] - pattern.ring)
    lasting = lasting if rows.real is None else lasting & rows.real
    keep = None if rows.time == 1 and rows.real is None else lasting
    slot = ring_slots(position, pattern.first, slots)
    caches = [write_slots(c, x, n, slot, keep) for c, x in ((state.k, new[0]), (state.v, new[1]))]
    caches += [state.far_k, state.far_v]
    if far is not None:
        keep = far.holds(position) if rows.real is None else far.holds(position) & rows.real
        caches[2:] = [
            write_slots(c, x, n, far.slot(position).clamp(0, max(kept - 1, 0)), keep)
            for c, x in zip(caches[2:], new, strict=True)
        ]
    stored = lambda n, p: n * slots + ring_slots(p.clamp(min=0), pattern.first, slots)  # noqa: E731
    if rows.time == 1 and not rows.packed:
        near = Source(*(x.flatten(0, 1) for x in caches[:2]), stored)
    else:

        def row(n, p):
            fresh = rows.row(n, p)
            new_token = (p >= rows.count[n]) & (p < rows.end[n])
            return torch.where(new_token, fresh, rows.total + stored(n, p))

        near = Source(*old, row)
    far_row = lambda n, p: n * kept + (far.slot(p).clamp(0, kept - 1))  # noqa: E731
    return near, Source(*(x.flatten(0, 1) for x in caches[2:]), far_row), end, caches


_FORMS = register("sparse_attention", naive=_naive, torch=_tiled)
