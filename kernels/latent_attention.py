"""Softmax attention over a low-rank latent: keys and values are products of one short vector a token."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.attention import Pattern, attention, read_cache
from subquad.kernels.backend import pick, register
from subquad.kernels.cache import write_cache
from subquad.kernels.packing import Padded, advance, host_counts, mask_padding, positions
from subquad.kernels.state import Append, Count, KVCache, accumulator_dtype
from subquad.kernels.wrapping import sequence_op

SCORES = 1 << 22  # scores that the absorbed form holds at a time


class LatentCache(NamedTuple):
    """Latents and rotary keys of every token so far, in slots 0..count-1 of max_len."""

    c: Append  # [N, S, R]
    k_rope: Append  # [N, S, P]
    count: Count  # [N]


@sequence_op
def latent_attention(
    q: Float[Tensor, "B T H K"],
    q_rope: Float[Tensor, "B T H P"],
    c: Float[Tensor, "B T R"],
    k_rope: Float[Tensor, "B T P"],
    w_k: Float[Tensor, "H K R"] | None,
    w_v: Float[Tensor, "H V R"] | None,
    *,
    expand: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    state: LatentCache | None = None,
    cu_seqlens: Int[Tensor, "M"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], LatentCache | None]:
    """o_t = sum_{s <= t} softmax_s(q_t . (w_k c_s) + q_rope_t . k_rope_s) w_v c_s   (q is not scaled).

    Arguments
        q, q_rope: H heads, the part without and with rotary positions. c: the latent; k_rope: the rotary key, one for
            all heads. w_k, w_v: from the latent to each head's keys and values.
        expand: what stands for w_k and w_v, which are None then, where they are no plain matrices: latents [.., R] ->
            (keys [.., H, K], values [.., H, V]). Nothing is absorbed, every call expands all latents.
        state: a LatentCache of max_len slots. cu_seqlens: [N+1] boundaries of sequences packed in one row.

    Returns (o [B, T, H, V], the new state or None).
    Many new tokens expand the S cached latents to keys and values, O(S H R (K + V) + T S H (K + P + V)); few against
    many cached ones take w_k into the query and w_v out of the sum, O(T H R (K + V) + T S H (2 R + P)): whichever is
    fewer products. State S (R + P).
    """
    if cu_seqlens is not None:
        q, q_rope, c, k_rope = (mask_padding(x, cu_seqlens) for x in (q, q_rope, c, k_rope))
    form = pick("latent_attention", _FORMS, q)
    if w_k is None or w_v is None:
        assert expand is not None
        out = form(q, q_rope, c, k_rope, None, None, state, cu_seqlens, expand)
    else:
        out = form(q, q_rope, c, k_rope, w_k.to(q.dtype), w_v.to(q.dtype), state, cu_seqlens)
    if state is None:
        return out, None
    return out[0], LatentCache(out[1], out[2], advance(state.count, q.shape[1], cu_seqlens))


def absorbs(time: int, slots: int, R: int, K: int, V: int, P: int) -> bool:
    """Whether taking the projections into queries and outputs costs fewer products than expanding `slots` latents.

    Not where all are new: fused attention then skips the masked half and writes no scores, 3 times as fast at 8,192
    tokens.
    """
    absorbed = time * R * (K + V) + time * slots * (2 * R + P)
    return time < slots and absorbed < slots * R * (K + V) + time * slots * (K + P + V)


# The specification: every sequence and every token on its own.


def _naive(q, q_rope, c, k_rope, w_k, w_v, state, cu_seqlens, expand=None):
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(0, q.shape[1])] * q.shape[0] if cu_seqlens is None else list(pairwise(bounds))
    outs, latents, ropes = [], [], []
    for n, (start, end) in enumerate(spans):
        row = n if cu_seqlens is None else 0
        c_n, rope_n = c[row, start:end], k_rope[row, start:end]
        begin = 0
        if state is not None:
            begin = int(state.count[n])
            if begin + end - start > state.c.shape[1]:
                raise _too_long(begin + end - start, state.c.shape[1])
            filled = [
                torch.cat([old[n, :begin], new.to(old.dtype), old[n, begin + end - start :]])
                for old, new in ((state.c, c_n), (state.k_rope, rope_n))
            ]
            latents.append(filled[0])
            ropes.append(filled[1])
            c_n, rope_n = (x[: begin + end - start].to(q.dtype) for x in filled)
        k, v = (expand or _product(w_k, w_v))(c_n)
        for t in range(start, end):
            seen = begin + t - start + 1
            scores = torch.einsum("hk,shk->hs", q[row, t], k[:seen])
            scores = scores + torch.einsum("hp,sp->hs", q_rope[row, t], rope_n[:seen])
            outs.append(torch.einsum("hs,shv->hv", scores.softmax(-1), v[:seen]))
    if cu_seqlens is None:
        out = torch.stack(outs).unflatten(0, q.shape[:2])
    else:
        out = torch.cat([q.new_zeros(0, q.shape[2], w_v.shape[1]), *(o[None] for o in outs)])
        out = F.pad(out, (0, 0, 0, 0, 0, q.shape[1] - bounds[-1]))[None]
    if state is None:
        return out
    if torch.is_grad_enabled():
        return out, torch.stack(latents), torch.stack(ropes)
    return out, state.c.copy_(torch.stack(latents)), state.k_rope.copy_(torch.stack(ropes))


def _too_long(tokens: int, slots: int) -> UserError:
    return UserError(f"the cache has {slots} slots; {tokens} tokens do not fit (raise max_len)")


# The fast form: whichever of the two products is shorter.


def _shorter(q, q_rope, c, k_rope, w_k, w_v, state, cu_seqlens, expand=None):
    absorbable, expand = expand is None, expand or _product(w_k, w_v)
    if state is None:
        q, k, v, width = _expand(q, q_rope, c, k_rope, expand)
        return attention(q, k, v, cu_seqlens=cu_seqlens)[0][..., :width]
    rows = Padded(q.shape[1], cu_seqlens)
    q, q_rope, c, k_rope = map(rows.split, (q, q_rope, c, k_rope))
    time, slots = q.shape[1], state.c.shape[1]
    before, used = host_counts(state.count), slots
    if before is not None:
        new = [time] * len(before) if rows.filled is None else rows.filled.sum(1).tolist()
        used = max((b + n for b, n in zip(before, new, strict=True)), default=0)
        if used > slots:
            raise _too_long(used, slots)
    at = positions(time, state.count, None)
    heads = KVCache(state.c[:, :, None], state.k_rope[:, :, None], state.count)
    written = write_cache(heads, c[:, :, None], k_rope[:, :, None], at, rows.filled, 0)
    new_c, new_rope = (x.squeeze(2) for x in written)
    c, k_rope = (x[:, :used].to(q.dtype) for x in (new_c, new_rope))
    if absorbable and absorbs(time, used, c.shape[2], w_k.shape[1], w_v.shape[1], k_rope.shape[2]):
        out = _absorbed(q, q_rope, c, k_rope, w_k, w_v, at)
    else:
        q, k, v, width = _expand(q, q_rope, c, k_rope, expand)
        out = read_cache(q, k, v, at, rows.filled, before, Pattern(), None)[..., :width]
    if torch.is_grad_enabled():
        return rows.join(out), new_c, new_rope
    return rows.join(out), state.c, state.k_rope


def _product(w_k, w_v):
    """(keys, values) as products of latents with the two matrices."""

    def expand(c):
        sizes = [w_k.shape[1], w_v.shape[1]]
        return F.linear(c, torch.cat([w_k, w_v], 1).flatten(0, 1)).unflatten(-1, (-1, sum(sizes))).split(sizes, -1)

    return expand


def _expand(q, q_rope, c, k_rope, expand):
    """Queries, keys and values of every head, and the width of the values, which are filled up with zeros to that of
    the keys: torch's fused attention wants one width."""
    k, v = expand(c)
    (H, _), V = k.shape[2:], v.shape[-1]
    k = torch.cat([k, k_rope[:, :, None].expand(-1, -1, H, -1)], -1)
    return torch.cat([q, q_rope], -1), k, F.pad(v, (0, max(0, k.shape[-1] - V))), V


def _absorbed(q, q_rope, c, k_rope, w_k, w_v, at):
    """All heads read one key, the latent itself: heads and tokens are the rows of two products."""
    (N, T, H), S = q.shape[:3], c.shape[1]
    q = torch.einsum("nthk,hkr->nthr", q, w_k)
    slot = torch.arange(S, device=q.device)
    size = max(1, SCORES // max(1, N * H * S))
    outs = []
    for span in (slice(a, a + size) for a in range(0, T, size)):
        scores = q[:, span].flatten(1, 2) @ c.mT + q_rope[:, span].flatten(1, 2) @ k_rope.mT  # [N, T' H, S]
        future = slot > at[:, span, None].repeat_interleave(H, 1)
        p = scores.to(accumulator_dtype(scores.dtype)).masked_fill(future, -torch.inf).softmax(-1)
        outs.append((p.to(c.dtype) @ c).unflatten(1, (-1, H)))
    latent = torch.cat(outs, 1) if len(outs) != 1 else outs[0]
    return torch.einsum("nthr,hvr->nthv", latent, w_v)


_FORMS = register("latent_attention", naive=_naive, torch=_shorter)
