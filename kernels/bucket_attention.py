"""Softmax attention within buckets: each token reads the last tokens of its own bucket."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.backend import pick, register
from subquad.kernels.cache import write_slots
from subquad.kernels.packing import advance, mask_padding
from subquad.kernels.patterns import SparsePattern, Window
from subquad.kernels.sparse_attention import SparseCache, sparse_attention
from subquad.kernels.state import Count, Recurrent, Ring, accumulator_dtype
from subquad.kernels.tiles import Rows, joined, piece
from subquad.kernels.wrapping import by_sequence, full_precision, sequence_op


class BucketCache(NamedTuple):
    """The last W keys and values of every bucket, in slots that are reused in turn, and how many each has seen."""

    k: Ring  # [N, H, buckets, W, K]
    v: Ring  # [N, H, buckets, W, V]
    seen: Recurrent  # [N, H, buckets] int64
    count: Count  # [N]


@sequence_op
def bucket_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    bucket: Int[Tensor, "B T H"],
    *,
    n_buckets: int,
    window: int,
    state: BucketCache | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], BucketCache | None]:
    """o_t = sum_s softmax_s(q_t . k_s) v_s over the last `window` tokens s <= t of t's bucket   (q is not scaled).

    bucket: [B, T, H] in 0 .. n_buckets - 1. Returns (o [B, T, H, V], the new state or None).
    Cost: O(T W H K) and a sort; O(W H K) a decoded token; state 2 H buckets W K.
    """
    if n_buckets < 1 or window < 1:
        raise UserError(f"bucket_attention: n_buckets and window must be at least 1; got {n_buckets} and {window}")
    if cu_seqlens is not None:
        q, k, v = (mask_padding(x, cu_seqlens) for x in (q, k, v))
    form = pick("bucket_attention", _FORMS, q)
    with full_precision(q):
        out, caches = form(q, k, v, bucket, n_buckets, window, state, cu_seqlens)
    if state is None:
        return out, None
    return out, BucketCache(*caches, advance(state.count, q.shape[1], cu_seqlens))


def _naive(q, k, v, bucket, n_buckets, window, state, cu_seqlens):
    B, H = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1, q.shape[2]
    if state is None:
        empty = [x.new_zeros(B, H, n_buckets, window, x.shape[3]) for x in (k, v)]
        before = [*empty, torch.zeros(B, H, n_buckets, dtype=torch.int64, device=q.device)]
    else:
        before = list(state[:3])
    run = lambda q, k, v, b, *s: _naive_batch(q, k, v, b, window, *s)  # noqa: E731
    if cu_seqlens is None:
        out, *new = run(q, k, v, bucket, *before)
    else:
        out, *new = by_sequence(run, [q, k, v, bucket], before, cu_seqlens)
    if state is not None and not torch.is_grad_enabled():
        new = [old.copy_(x) for old, x in zip(before, new, strict=True)]
    return out, new


def _naive_batch(q, k, v, bucket, window, held_k, held_v, seen):
    (B, T, H), n = q.shape[:3], seen.shape[2]
    slots, outs = torch.arange(window, device=q.device), []
    for t in range(T):
        here = F.one_hot(bucket[:, t], n).bool()  # [B, H, n]
        written = here[..., None] & (slots == seen[..., None] % window)
        held_k, held_v = (
            torch.where(written[..., None], x[:, t, :, None, None].to(old.dtype), old)
            for x, old in ((k, held_k), (v, held_v))
        )
        seen = seen + here
        keys, values = (x[here].unflatten(0, (B, H)).to(q.dtype) for x in (held_k, held_v))
        scores = torch.einsum("bhk,bhwk->bhw", q[:, t], keys)
        scores = scores.masked_fill(slots >= seen[here].view(B, H, 1), -torch.inf)
        outs.append(torch.einsum("bhw,bhwv->bhv", scores.softmax(-1), values))
    out = torch.stack(outs, 1) if outs else v.new_zeros(B, T, H, v.shape[3])
    return out, held_k, held_v, seen


def _sorted(q, k, v, bucket, n_buckets, window, state, cu_seqlens):
    """Every bucket of every head and sequence is a sequence of its own, and each reads a window."""
    B, T, H, _ = q.shape
    rows = Rows(B, T, None if state is None else state.count, cu_seqlens, q.device)
    heads, total = torch.arange(H, device=q.device), rows.n_seqs * H * n_buckets
    segment = ((rows.sequence[:, None] * H + heads) * n_buckets + bucket.flatten(0, 1)).flatten()
    if T == 1 and state is not None and cu_seqlens is None:
        return _one_token(q, k, v, segment, window, state)
    if rows.real is not None:
        segment = torch.where(rows.real[:, None].expand(-1, H).flatten(), segment, total)  # padding comes last
    order = segment.argsort(stable=True)
    counts = torch.zeros(total + 1, dtype=torch.int64, device=q.device)
    counts = counts.scatter_add(0, segment, torch.ones_like(segment))
    bounds = F.pad(counts[:-1].cumsum(0), (1, 0)).to(torch.int32)
    inputs = (x.flatten(0, 2).index_select(0, order)[None, :, None] for x in (q, k, v))
    cache = None
    if state is not None:
        near = [x.flatten(0, 2)[:, :, None] for x in state[:2]]
        # The window's cache keeps no first tokens, so its slots are ours.
        cache = SparseCache(*near, near[0][:, :0], near[1][:, :0], state.seen.flatten())
    out, cache = sparse_attention(*inputs, SparsePattern((Window(window),)), state=cache, cu_seqlens=bounds)
    out = mask_padding(out[0, :, 0].index_select(0, order.argsort()).unflatten(0, (B, T, H)), cu_seqlens)
    if state is None:
        return out, None
    if not torch.is_grad_enabled():
        return out, state[:3]  # written through the views above
    return out, [x.reshape(old.shape) for x, old in zip((cache.k, cache.v, cache.count), state, strict=False)]


def _one_token(q, k, v, segment, window, state):
    wide, seen = accumulator_dtype(q.dtype), state.seen.flatten()[segment]
    caches = []
    for x, held in ((k, state.k), (v, state.v)):
        flat = held.flatten(0, 2)[:, :, None]
        caches.append(write_slots(flat, x.flatten(0, 2)[:, None], segment, seen % window, None))
    keys, values = (x.index_select(0, segment)[:, :, 0].to(wide) for x in caches)
    mask = (torch.arange(window, device=q.device) <= seen[:, None])[:, None]
    out = joined([piece(q.flatten(0, 2)[:, None].to(wide), keys, values, mask)]).to(q.dtype)
    grown = state.seen.flatten().index_add(0, segment, torch.ones_like(segment)).reshape(state.seen.shape)
    out = out.reshape(*q.shape[:3], v.shape[3])
    if not torch.is_grad_enabled():
        return out, [state.k, state.v, state.seen.copy_(grown)]
    return out, [caches[0].reshape(state.k.shape), caches[1].reshape(state.v.shape), grown]


_FORMS = register("bucket_attention", naive=_naive, torch=_sorted)
