"""Softmax attention over a declared pattern, with a cache that is written in place."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.cache import cached_positions, gather_before, write_cache, write_token
from subquad.kernels.packing import (
    Chunks,
    Padded,
    advance,
    host_counts,
    mask_padding,
    positions,
    sequence_ids,
)
from subquad.kernels.state import KVCache, RingCache
from subquad.kernels.wrapping import sequence_op

QUERY_BLOCK = 256  # queries whose mask is held at a time where SDPA needs an explicit one


class Pattern(NamedTuple):
    """Which keys a query at position i reads: j <= i if causal, |i - j| < window, and always j < n_sinks."""

    causal: bool = True
    window: int | None = None
    n_sinks: int = 0

    def reads(self, query: Tensor, key: Tensor) -> Tensor:
        """The mask [..., T, S] of query positions [..., T] and key positions [..., S]."""
        query, key = query[..., :, None], key[..., None, :]
        past = key <= query
        if self.window is None:
            return past if self.causal else torch.ones_like(past)
        near = key > query - self.window
        if not self.causal:
            near = near & (key < query + self.window)
        seen = near | (key < self.n_sinks) if self.n_sinks else near
        return seen & past if self.causal else seen


Cache = KVCache | RingCache


@sequence_op
def attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T G K"],
    v: Float[Tensor, "B T G V"],
    *,
    causal: bool = True,
    window: int | None = None,
    n_sinks: int = 0,
    sink_logits: Float[Tensor, "H"] | None = None,
    state: Cache | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Cache | None]:
    """o_t = sum_s softmax_s(q_t . k_s) v_s over the keys s that the pattern lets t read   (q is not scaled).

    Arguments
        q: H heads; k, v: G heads, where G divides H: query heads h read head h // (H / G).
        causal, window, n_sinks: s <= t; |t - s| < window; the first n_sinks tokens stay visible (Xiao et al. 2023).
        sink_logits: [H], one more column of the softmax whose weight is dropped (gpt-oss).
        state: a KVCache of max_len slots, or with a window a RingCache of n_sinks + window or more; causal only.
        cu_seqlens: [N+1] boundaries of sequences packed in one row.

    Returns (o [B, T, H, V], the new state or None).
    Cost: O(T^2 H K) to train, O(T W H K) with a window W; O(S H K) a decoded token over S cached slots; state 2 S G K.
    """
    _check(q, k, causal, window, n_sinks, state)
    pattern = Pattern(causal, window, n_sinks)
    if cu_seqlens is not None:  # whatever stands in padding rows must not reach a product
        q, k, v = (mask_padding(x, cu_seqlens) for x in (q, k, v))
    form = pick("attention", _FORMS, q)
    out = form(q, k, v, pattern, sink_logits, state, cu_seqlens)
    if state is None:
        return out, None
    ends = advance(state.count, q.shape[1], cu_seqlens)
    return out[0], type(state)(out[1], out[2], ends)


def _check(q, k, causal, window, n_sinks, state) -> None:
    if q.shape[2] % k.shape[2]:
        raise UserError(f"attention: {k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    if (window is not None and window < 1) or n_sinks < 0:
        raise UserError(f"attention: window must be at least 1 and n_sinks at least 0; got {window} and {n_sinks}")
    if state is None:
        return
    if not causal:
        raise UserError("attention: causal=False reads the whole sequence at once and cannot go on from a state")
    slots = state.k.shape[1]
    if isinstance(state, RingCache) and (window is None or slots < n_sinks + window):
        raise UserError(f"attention: a ring of {slots} slots cannot hold a window of {window} and {n_sinks} sinks")


# The specification: every mask and every slot written out.


def _naive(q, k, v, pattern, sink_logits, state, cu_seqlens):
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    rows = range(q.shape[0]) if cu_seqlens is None else [0] * (len(bounds) - 1)
    spans = [(0, q.shape[1])] * q.shape[0] if cu_seqlens is None else list(pairwise(bounds))
    outs, keys, values = [], [], []
    for n, (row, (start, end)) in enumerate(zip(rows, spans, strict=True)):
        q_n, k_n, v_n = (x[row, start:end] for x in (q, k, v))
        begin, all_k, all_v, key_at = 0, k_n, v_n, torch.arange(end - start, device=q.device)
        if state is not None:
            begin = int(state.count[n])
            held = cached_positions(state, pattern.n_sinks, state.count)[n]
            slot = torch.nonzero(held >= 0).flatten()
            all_k = torch.cat([state.k[n, slot].to(k.dtype), k_n])
            all_v = torch.cat([state.v[n, slot].to(v.dtype), v_n])
            key_at = torch.cat([held[slot], begin + key_at])
            new_k, new_v = _naive_write(state, n, begin, k_n, v_n, pattern.n_sinks)
            keys.append(new_k)
            values.append(new_v)
        mask = pattern.reads(begin + torch.arange(end - start, device=q.device), key_at)
        outs.append(_softmax_product(q_n, all_k, all_v, mask, sink_logits))
    if cu_seqlens is None:
        out = torch.stack(outs)
    else:
        out = torch.cat([*outs, q.new_zeros(q.shape[1] - bounds[-1], q.shape[2], v.shape[3])])[None]
    if state is None:
        return out
    if torch.is_grad_enabled():
        return out, torch.stack(keys), torch.stack(values)
    return out, state.k.copy_(torch.stack(keys)), state.v.copy_(torch.stack(values))


def _naive_write(state, n, begin, k, v, n_sinks):
    new_k, new_v = list(state.k[n].unbind(0)), list(state.v[n].unbind(0))
    for i in range(k.shape[0]):
        p = begin + i
        if isinstance(state, RingCache) and p >= n_sinks:
            p = n_sinks + (p - n_sinks) % (len(new_k) - n_sinks)
        if p >= len(new_k):
            raise UserError(f"the cache has {len(new_k)} slots; a token at position {p} does not fit (raise max_len)")
        new_k[p], new_v[p] = k[i].to(state.k.dtype), v[i].to(state.v.dtype)
    return torch.stack(new_k), torch.stack(new_v)


def _softmax_product(q, k, v, mask, sink_logits):
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = torch.einsum("thk,shk->hts", q, k).masked_fill(~mask, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
        return torch.einsum("hts,shv->thv", torch.cat([scores, column], -1).softmax(-1)[..., :-1], v)
    return torch.einsum("hts,shv->thv", scores.softmax(-1), v)


# The fast form: torch's scaled_dot_product_attention on blocks that follow the pattern.


def _blockwise(q, k, v, pattern, sink_logits, state, cu_seqlens):
    if state is None:
        return _fresh(q, k, v, pattern, sink_logits, cu_seqlens)
    rows = Padded(q.shape[1], cu_seqlens)
    out, new_k, new_v = _continued(*map(rows.split, (q, k, v)), pattern, sink_logits, state, rows.filled)
    return rows.join(out), new_k, new_v


def _fresh(q, k, v, pattern, sink_logits, cu_seqlens):
    """No cache: sequences from position 0."""
    if cu_seqlens is not None and (pattern.window is None or pattern.n_sinks or not pattern.causal):
        return _each_sequence(q, k, v, pattern, sink_logits, cu_seqlens)
    if pattern.window is not None and pattern.window < q.shape[1]:
        if cu_seqlens is not None:
            return _banded_rows(q, k, v, pattern.window, sink_logits, cu_seqlens)
        at = positions(q.shape[1], None, None, q.device)
        if pattern.causal:
            return _banded(q, k, v, at, pattern, sink_logits)
        return _masked_blocks(q, k, v, at, at, pattern, sink_logits)
    if cu_seqlens is not None:
        return _each_sequence(q, k, v, pattern._replace(window=None), sink_logits, cu_seqlens)
    if sink_logits is not None:
        at = positions(q.shape[1], None, None, q.device)
        return _masked_blocks(q, k, v, at, at, pattern, sink_logits, offset=0 if pattern.causal else None)
    return sdpa(q, k, v, None, is_causal=pattern.causal)


def _each_sequence(q, k, v, pattern, sink_logits, cu_seqlens):
    if q.device.type == "cuda" and pattern == Pattern(pattern.causal) and sink_logits is None and q.dtype.itemsize == 2:
        from torch.nn.attention.varlen import varlen_attn

        repeat = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(repeat, 2), v.repeat_interleave(repeat, 2)
        cu, most = cu_seqlens.int(), q.shape[1]
        window = (-1, 0) if pattern.causal else (-1, -1)
        out = varlen_attn(q[0], k[0], v[0], cu, cu, most, most, scale=1.0, window_size=window)
        return mask_padding(out[None], cu_seqlens)  # it leaves padding rows unwritten
    if torch.compiler.is_compiling() or q.device.type != "cpu":  # no host reads: one mask over the row
        at = positions(q.shape[1], None, cu_seqlens)
        ids, valid = sequence_ids(q.shape[1], cu_seqlens)
        ids = torch.where(valid, ids, -1)[None]
        offset = 0 if pattern.causal else None
        return mask_padding(_masked_blocks(q, k, v, at, at, pattern, sink_logits, ids, offset), cu_seqlens)
    bounds = cu_seqlens.tolist()
    outs = [_fresh(q[:, a:b], k[:, a:b], v[:, a:b], pattern, sink_logits, None) for a, b in pairwise(bounds) if b > a]
    outs.append(q.new_zeros(1, q.shape[1] - bounds[-1], q.shape[2], v.shape[3]))
    return torch.cat(outs, 1)


def _continued(q, k, v, pattern, sink_logits, state, fresh):
    """New tokens after a cache: (o, keys, values). `fresh` [N, T] is False for padding among the new tokens."""
    time, slots = q.shape[1], state.k.shape[1]
    spare = slots if isinstance(state, KVCache) else slots - pattern.n_sinks - pattern.window
    before, used = host_counts(state.count), slots
    if before is not None:
        new = [time] * len(before) if fresh is None else fresh.sum(1).tolist()
        used = max((b + n for b, n in zip(before, new, strict=True)), default=0)
    if isinstance(state, KVCache) and used > slots:
        raise UserError(f"the cache has {slots} slots; {used} tokens do not fit (raise max_len)")
    if time == 1 and fresh is None and (pattern.window is None or spare == 0):
        return _one_token(q, k, v, pattern, sink_logits, state, before)
    at = positions(time, state.count, None)
    if isinstance(state, KVCache):
        keys, values = write_cache(state, k, v, at, fresh, 0)
        held = (x[:, :used].to(q.dtype) for x in (keys, values))
        return read_cache(q, *held, at, fresh, before, pattern, sink_logits), keys, values
    if time <= spare + 1:  # what the new tokens overwrite is out of every query's window
        keys, values = write_cache(state, k, v, at, fresh, pattern.n_sinks)
        ends = state.count + (time if fresh is None else fresh.sum(1))
        key_at = cached_positions(RingCache(keys, values, ends), pattern.n_sinks, ends)
        return _masked_blocks(q, keys, values, at, key_at, pattern, sink_logits), keys, values
    before = gather_before(state, pattern.n_sinks, pattern.window - 1)
    keys, values = write_cache(state, k, v, at, fresh, pattern.n_sinks)
    sinks = (keys[:, : pattern.n_sinks], values[:, : pattern.n_sinks]) if pattern.n_sinks else None
    return _banded(q, k, v, at, pattern, sink_logits, before, sinks), keys, values


def read_cache(q, k, v, at, fresh, before, pattern, sink_logits):
    """New tokens at positions `at` [N, T] over keys 0, 1, ... of a cache that holds theirs as well.

    before: the counts of tokens before the new ones where the host knows them, else None.
    """
    if fresh is None and before is not None and not any(before):
        return _fresh(q, k, v, pattern, sink_logits, None)
    key_at = torch.arange(k.shape[1], device=q.device)[None]
    offset = None if before is None else max(before, default=0)
    return _masked_blocks(q, k, v, at, key_at, pattern, sink_logits, offset=offset)


def _one_token(q, k, v, pattern, sink_logits, state, before):
    """One token a sequence that reads every slot in use. `before`: the counts, where the host knows them."""
    used, mask = state.k.shape[1], None
    if before and min(before) == max(before):
        keys, values = write_token(state, k, v, before[0], pattern.n_sinks)
        used = min(used, before[0] + 1)
    else:
        at = state.count[:, None]
        keys, values = write_cache(state, k, v, at, None, pattern.n_sinks)
        mask = (torch.arange(used, device=q.device) <= at)[:, None, None]
    held = (x.narrow(1, 0, used).to(q.dtype) for x in (keys, values))
    return sdpa(q, *held, mask, sink_logits=sink_logits), keys, values


def _banded(q, k, v, at, pattern, sink_logits, before=None, sinks=None):
    """Causal window: a block of queries reads its own keys and the W-1 before them, so the cost is T W and not T^2.

    `before`: the W-1 keys and values that precede the new ones, where there are any. at: positions [N | 1, T].
    """
    (batch, time), W = q.shape[:2], pattern.window
    size = min(max(32, W), 128)
    count = -(-time // size)
    tail = count * size - time
    if before is None:
        k, v = (F.pad(x, (0, 0, 0, 0, W - 1, tail)) for x in (k, v))
    else:
        k, v = (
            F.pad(torch.cat([b.to(x.dtype), x], 1), (0, 0, 0, 0, 0, tail)) for b, x in zip(before, (k, v), strict=True)
        )
    width = W - 1 + size
    blocks = lambda x: x.unfold(1, width, size).movedim(-1, 2).flatten(0, 1)  # noqa: E731
    keys, values = blocks(k), blocks(v)  # [N n, W-1+size, G, .]
    queries = F.pad(q, (0, 0, 0, 0, 0, tail)).unflatten(1, (count, size)).flatten(0, 1)
    limit = F.pad(at, (0, tail)).unflatten(1, (count, size))  # a query at position p has p tokens before it
    gap = torch.arange(size, device=q.device)[:, None] + W - 1 - torch.arange(width, device=q.device)
    mask = (gap >= 0) & (gap < W) & (gap <= limit[..., None])  # [N | 1, n, size, width]
    if pattern.n_sinks:
        sink_k, sink_v = sinks if sinks is not None else (x[:, W - 1 :][:, : pattern.n_sinks] for x in (k, v))
        first = torch.arange(sink_k.shape[1], device=q.device)
        far = (limit[..., None] - first) >= W  # nearer ones are in the band
        mask = torch.cat([mask, far], -1)
        keys = torch.cat([keys, sink_k.to(keys.dtype).repeat_interleave(count, 0)], 1)
        values = torch.cat([values, sink_v.to(values.dtype).repeat_interleave(count, 0)], 1)
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)
    out = sdpa(queries, keys, values, mask[:, None], sink_logits=sink_logits)
    return out.unflatten(0, (batch, count)).flatten(1, 2)[:, :time]


def _banded_rows(q, k, v, W, sink_logits, cu_seqlens):
    """`_banded` for packed rows: blocks of one sequence each, whose keys are filled up with its own, so that no product
    holds two sequences."""
    time, n_seqs = q.shape[1], cu_seqlens.numel() - 1
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        W = min(W, int(cu_seqlens.diff().max()))
    mean = 1 << (time // n_seqs - 1).bit_length()  # short sequences leave longer blocks half empty
    size = min(max(32, W), 128, max(32, mean))
    chunks = Chunks(q, size, cu_seqlens)
    cu, sequence = cu_seqlens.long(), chunks.sequence[:, None]
    band = torch.arange(1 - W, size, device=q.device)
    rows = (chunks.start[:, None] + band).minimum(cu[sequence + 1] - 1).maximum(cu[sequence]).clamp(max=time - 1)
    keys, values = (x[0].index_select(0, rows.flatten()).unflatten(0, rows.shape) for x in (k, v))
    inner = torch.arange(size, device=q.device)
    gap = inner[:, None] - band
    before = chunks.start[:, None] - cu[sequence] + inner  # tokens before the query in its sequence
    mask = (gap >= 0) & (gap < W) & (gap <= before[..., None])
    return chunks.join(sdpa(chunks.split(q)[0], keys, values, mask[:, None], sink_logits=sink_logits)[None])


def _masked_blocks(q, k, v, at, key_at, pattern, sink_logits, ids=None, offset=None):
    """Explicit masks, a block of queries at a time. Slots that hold nothing have key position -1.

    `offset`: where it is given, query row i reads no key past row offset + i.
    """
    k, v = k.to(q.dtype), v.to(q.dtype)
    if pattern.causal:
        key_at = torch.where(key_at < 0, torch.iinfo(key_at.dtype).max, key_at)  # after every query
    if ids is not None:
        # One product holds all sequences, and zero times another's NaN is NaN: what is not finite is taken out, and
        # rows that read it are NaN.
        broken = [~x.isfinite().all(-1).all(-1) for x in (q, k, v)]
        q, k, v = (torch.where(bad[..., None, None], 0, x) for bad, x in zip(broken, (q, k, v), strict=True))
    outs = []
    for start in range(0, q.shape[1], QUERY_BLOCK):
        span = slice(start, start + QUERY_BLOCK)
        seen = slice(None) if offset is None else slice(offset + start + QUERY_BLOCK)
        mask = pattern.reads(at[:, span], key_at[:, seen])
        if ids is not None:
            mask = mask & (ids[:, span, None] == ids[:, None, seen])
        out = sdpa(q[:, span], k[:, seen], v[:, seen], mask[:, None], sink_logits=sink_logits)
        if ids is not None:
            bad = broken[0][:, span] | (mask & (broken[1] | broken[2])[:, None, seen]).any(-1)
            out = torch.where(bad[..., None, None], torch.nan, out)
        outs.append(out)
    return torch.cat(outs, 1) if len(outs) != 1 else outs[0]


def sdpa(q, k, v, mask, *, is_causal=False, sink_logits=None):
    """torch's attention on [N, T, H, .] tensors. mask: True where read, [N | 1, 1, T, S]; None reads everything."""
    (N, T, H), G = q.shape[:3], k.shape[2]
    if sink_logits is not None:  # one more key of zeros whose score is the sink's logit
        bias = q.new_zeros(1, 1, 1, k.shape[1])
        bias = (bias if mask is None else torch.where(mask, bias, -torch.inf)).expand(N, H, T, -1)
        mask = torch.cat([bias, sink_logits.to(q.dtype)[:, None, None].expand(N, H, T, 1)], -1)
        k, v = F.pad(k, (0, 0, 0, 0, 0, 1)), F.pad(v, (0, 0, 0, 0, 0, 1))
    if T == 1 and H != G:  # query heads that share a key head are rows of one product: each key is read once
        q = q.reshape(N, G, H // G, -1)
        if mask is not None and mask.shape[1] == H:
            mask = mask.reshape(N, G, H // G, -1)
        o = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=1.0)
        return o.reshape(N, 1, H, -1)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=1.0, enable_gqa=H != G)
    return o.transpose(1, 2)


_FORMS = register("attention", naive=_naive, torch=_blockwise)
