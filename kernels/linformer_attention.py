"""Softmax attention over learned summaries of the keys and values."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.attention import sdpa
from subquad.kernels.backend import pick, register
from subquad.kernels.cache import write_cache, write_slots
from subquad.kernels.packing import Padded, advance, mask_padding, positions
from subquad.kernels.state import Append, Count, Ring, RingCache
from subquad.kernels.wrapping import sequence_op

QUERIES = 256  # whose mask and keys are held at a time


class SummaryCache(NamedTuple):
    """R summaries of every finished block of C tokens, in order, and the last C tokens (position p in slot p % C)."""

    k: Append  # [N, S, H, K]
    v: Append  # [N, S, H, V]
    block_k: Ring  # [N, C, H, K]
    block_v: Ring  # [N, C, H, V]
    count: Count  # [N]


@sequence_op
def linformer_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    e_k: Float[Tensor, "R C"],
    e_v: Float[Tensor, "R C"],
    *,
    causal: bool = True,
    state: SummaryCache | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], SummaryCache | None]:
    """Softmax attention on R linear combinations of the keys (e_k) and values (e_v) of C tokens   (q is not scaled).

    causal=False: o = softmax(q (e_k k)^T) (e_v v), one set of combinations for a whole sequence of up to C tokens; a
    shorter one takes the first columns. Cost O(T R H K); it reads the whole sequence, so there is no state.
    causal: a token reads the R combinations of every finished block of C tokens, and the tokens of its own block up to
    itself. Cost O(T (T R / C + C) H K) to train, O((S + C) H K) a decoded token over S = R t / C cached summaries;
    state 2 (S + C) H K.

    Returns (o [B, T, H, V], the new state or None).
    """
    if state is not None and not causal:
        raise UserError(
            "linformer_attention: causal=False reads the whole sequence at once and cannot go on from a state"
        )
    if cu_seqlens is not None:
        q, k, v = (mask_padding(x, cu_seqlens) for x in (q, k, v))
    _check_length(q, e_k.shape[1], e_k.shape[0], causal, state, cu_seqlens)
    form = pick("linformer_attention", _FORMS, q)
    out = form(q, k, v, e_k.to(k.dtype), e_v.to(v.dtype), causal, state, cu_seqlens)
    if state is None:
        return out, None
    return out[0], SummaryCache(*out[1:], advance(state.count, q.shape[1], cu_seqlens))


def _check_length(q, C, R, causal, state, cu_seqlens) -> None:
    """Lengths are read on a CPU only; elsewhere init_state's max_len stands."""
    if torch.compiler.is_compiling() or (q.device.type != "cpu" and cu_seqlens is not None):
        return
    if not causal:
        time = q.shape[1] if cu_seqlens is None else int(cu_seqlens.diff().max())
        if time > C:
            raise UserError(f"linformer_attention: its projections serve up to {C} tokens; {time} do not fit")
    elif state is not None and q.device.type == "cpu":
        ends = state.count + (q.shape[1] if cu_seqlens is None else cu_seqlens.diff())
        if int(ends.max()) // C * R > state.k.shape[1]:
            blocks = state.k.shape[1] // R
            raise UserError(
                f"the cache has {blocks} blocks of {C}; {int(ends.max())} tokens do not fit (raise max_len)"
            )


# The specification: a loop over time.


def _naive(q, k, v, e_k, e_v, causal, state, cu_seqlens):
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(0, q.shape[1])] * q.shape[0] if cu_seqlens is None else list(pairwise(bounds))
    outs, states = [], []
    for n, (start, end) in enumerate(spans):
        row = (x[n if cu_seqlens is None else 0, start:end] for x in (q, k, v))
        if not causal:
            outs.append(_whole(*row, e_k, e_v))
            continue
        out, after = _step_by_step(*row, e_k, e_v, None if state is None else [x[n] for x in state])
        outs.append(out)
        states.append(after)
    out = torch.stack(outs) if cu_seqlens is None else torch.cat(outs)[None]
    out = F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - out.shape[1]))
    if state is None:
        return out
    new = [torch.stack(parts) for parts in zip(*states, strict=True)]
    if torch.is_grad_enabled():
        return out, *new
    return out, *(old.copy_(x) for old, x in zip(state[:4], new, strict=True))


def _whole(q, k, v, e_k, e_v):
    k, v = (torch.einsum("rt,thk->rhk", e[:, : x.shape[0]], x) for e, x in ((e_k, k), (e_v, v)))
    return torch.einsum("htr,rhv->thv", torch.einsum("thk,rhk->htr", q, k).softmax(-1), v)


def _step_by_step(q, k, v, e_k, e_v, state):
    R, C = e_k.shape
    begin = 0 if state is None else int(state[4])
    held = [[], []] if state is None else [list(x[: begin // C * R].to(k.dtype)) for x in state[:2]]
    block = [[None] * C, [None] * C] if state is None else [list(x) for x in state[2:4]]
    outs = []
    for t in range(q.shape[0]):
        slot = (begin + t) % C
        for side, x in enumerate((k, v)):
            block[side][slot] = x[t]
        keys, values = (torch.stack([*held[i], *(x.to(k.dtype) for x in block[i][: slot + 1])]) for i in (0, 1))
        outs.append(torch.einsum("hs,shv->hv", torch.einsum("hk,shk->hs", q[t], keys).softmax(-1), values))
        if slot == C - 1:
            for side, e in enumerate((e_k, e_v)):
                held[side] += list(torch.einsum("rc,chk->rhk", e, torch.stack([x.to(k.dtype) for x in block[side]])))
    out = torch.stack(outs) if outs else q.new_zeros(0, q.shape[1], v.shape[2])
    if state is None:
        return out, None
    after = [
        torch.stack([*(x.to(old.dtype) for x in new), *old[len(new) :]]) for new, old in zip(held, state, strict=False)
    ]
    return out, [*after, *(torch.stack([x.to(old.dtype) for x in b]) for b, old in zip(block, state[2:4], strict=True))]


# The fast form: tokens aligned to blocks, some blocks of queries at a time.


def _aligned(q, k, v, e_k, e_v, causal, state, cu_seqlens):
    rows = Padded(q.shape[1], cu_seqlens)
    q, k, v = map(rows.split, (q, k, v))
    if not causal:
        most = min(rows.length, e_k.shape[1])
        k, v = (torch.einsum("rt,nthk->nrhk", e[:, :most], x[:, :most]) for e, x in ((e_k, k), (e_v, v)))
        return rows.join(sdpa(q, k, v, None))
    if state is None:
        return rows.join(_fresh(q, k, v, e_k, e_v))
    out, *after = _continued(q, k, v, e_k, e_v, state, rows.filled)
    return rows.join(out), *after


def _fresh(q, k, v, e_k, e_v):
    C, time = e_k.shape[1], q.shape[1]
    missing = -time % C
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (q, k, v))
    summaries = (_summarize(e, x).flatten(1, 2) for e, x in ((e_k, k), (e_v, v)))
    first = torch.zeros(1, dtype=torch.int64, device=q.device)
    return _attend(q, k, v, *summaries, first, 0, *e_k.shape)[:, :time]


def _continued(q, k, v, e_k, e_v, state, filled):
    (N, time), (R, C) = q.shape[:2], e_k.shape
    count = state.count.clone()  # under no_grad the state's moves on in place
    lengths = torch.full_like(count, time) if filled is None else filled.sum(1)
    first, held = count // C, count % C
    on_host = q.device.type == "cpu" and not torch.compiler.is_compiling()
    blocks = -(-int((held + lengths).max()) // C) if on_host else -(-(time + C - 1) // C)
    blocks = max(blocks, 1)
    # Slot s of the aligned rows is position first * C + s: from the state's block below `held`, else a new token.
    slot = torch.arange(blocks * C, device=q.device)
    source = slot - held[:, None]
    new = ((source >= 0) & (source < lengths[:, None]))[..., None, None]
    source = source.clamp(0, max(time - 1, 0))
    sequence = torch.arange(N, device=q.device)[:, None]
    old = (slot < held[:, None])[..., None, None]

    def align(x, before=None):
        rest = 0 if before is None else torch.where(old, F.pad(before.to(x.dtype), (0, 0, 0, 0, 0, len(slot) - C)), 0)
        return torch.where(new, x[sequence, source], rest) if time else rest

    if not time:
        return q.new_zeros(N, 0, q.shape[2], v.shape[3]), *state[:4]
    aligned_k, aligned_v = align(k, state.block_k), align(v, state.block_v)
    finished = (torch.arange(1, blocks + 1, device=q.device) * C) <= (held + lengths)[:, None]  # [N, blocks]
    keys, values = state.k, state.v
    if not on_host or bool(finished.any()):
        at = (first[:, None] + torch.arange(blocks, device=q.device))[..., None] * R + torch.arange(R, device=q.device)
        index = (sequence[..., None].expand_as(at).flatten(), at.flatten())
        keep = finished[..., None].expand_as(at).flatten()
        keys, values = (
            write_slots(target, _summarize(e, x).flatten(0, 2), *index, keep)
            for target, e, x in ((keys, e_k, aligned_k), (values, e_v, aligned_v))
        )
    last = RingCache(state.block_k, state.block_v, count)
    block_k, block_v = write_cache(last, k, v, positions(time, count, None), filled, 0)
    most = int(first.max()) if on_host else keys.shape[1] // R
    summaries = [x.to(q.dtype) for x in (keys, values)]
    if time == 1 and filled is None:
        block = [x.to(q.dtype) for x in (block_k, block_v)]
        return _one_token(q, summaries, block, first, held, most, R, on_host), keys, values, block_k, block_v
    out = _attend(align(q), aligned_k, aligned_v, *summaries, first, most, R, C)
    out = out[sequence, (held[:, None] + torch.arange(time, device=q.device)).clamp(max=blocks * C - 1)]
    return out, keys, values, block_k, block_v


def _one_token(q, summaries, block, first, held, most, R, on_host):
    """A token a sequence, over what it reads and no more where the host knows that all have read as many."""
    used, mask = most * R, None
    if on_host and len(set(zip(first.tolist(), held.tolist(), strict=True))) == 1:
        block = [x[:, : int(held[0]) + 1] for x in block]
    else:
        far = torch.arange(used, device=q.device) < first[:, None] * R
        near = torch.arange(block[0].shape[1], device=q.device) <= held[:, None]
        mask = torch.cat([far, near], 1)[:, None, None]
    return sdpa(q, *(torch.cat([s[:, :used], x], 1) for s, x in zip(summaries, block, strict=True)), mask)


def _summarize(e, x):
    """[N, blocks * C, H, K] -> [N, blocks, R, H, K]."""
    return torch.einsum("rc,nbchk->nbrhk", e, x.unflatten(1, (-1, e.shape[1])))


def _attend(q, k, v, summary_k, summary_v, first, most, R, C):
    """Aligned rows over summaries of the blocks before theirs and their own block. first [N | 1]: the block of row 0.

    most: what bounds `first`.
    """
    time, outs = q.shape[1], []
    size = max(1, QUERIES // C) * C
    for start in range(0, time, size):
        span = slice(start, min(start + size, time))
        row = torch.arange(span.start, span.stop, device=q.device)
        near = (row[:, None] // C == row // C) & (row <= row[:, None])
        used = min((most + (span.stop - 1) // C) * R, summary_k.shape[1])
        before = (first[:, None] + row // C)[..., None] * R
        far = torch.arange(used, device=q.device) < before  # [N | 1, rows, used]
        mask = torch.cat([far, near.expand(far.shape[0], -1, -1)], -1)[:, None]
        keys, values = (torch.cat([s[:, :used], x[:, span]], 1) for s, x in ((summary_k, k), (summary_v, v)))
        outs.append(sdpa(q[:, span], keys, values, mask))
    return torch.cat(outs, 1) if len(outs) != 1 else outs[0]


_FORMS = register("linformer_attention", naive=_naive, torch=_aligned)
