"""Key/value caches: which position each slot holds, and how new tokens are written in place."""

import torch
from torch import Tensor

from subquad.kernels.state import KVCache, RingCache


def cached_positions(cache: KVCache | RingCache, n_sinks: int, count: Tensor) -> Tensor:
    """The position each slot holds once `count` [N] tokens were written, -1 for none: [N, S]."""
    slots = torch.arange(cache.k.shape[1], device=count.device)
    end = count[:, None]
    if isinstance(cache, KVCache):
        return torch.where(slots < end, slots, -1)
    ring = cache.k.shape[1] - n_sinks
    newest = end - 1 - (end - 1 - slots) % ring  # the latest position that falls on the slot
    held = torch.where(slots < n_sinks, slots, newest)
    return torch.where((held < end) & ((slots < n_sinks) | (held >= n_sinks)), held, -1)


def ring_slots(at: Tensor, n_sinks: int, slots: int) -> Tensor:
    """The slot of each position in a ring cache."""
    return torch.where(at < n_sinks, at, n_sinks + (at - n_sinks) % (slots - n_sinks))


def gather_before(cache: RingCache, n_sinks: int, width: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the `width` positions before the count, in order: [N, width, G, .] each.

    Positions before the first token give whatever their slot holds; the caller's mask hides them.
    """
    at = cache.count[:, None] - width + torch.arange(width, device=cache.count.device)
    slot = ring_slots(at.clamp(min=0), n_sinks, cache.k.shape[1])
    rows = torch.arange(slot.shape[0], device=slot.device)[:, None]
    return cache.k[rows, slot], cache.v[rows, slot]


def write_cache(
    cache: KVCache | RingCache, k: Tensor, v: Tensor, at: Tensor, fresh: Tensor | None, n_sinks: int
) -> tuple[Tensor, Tensor]:
    """The cache's keys and values with the new ones [N, T, G, .] of positions `at` [N, T] written.

    In place under `no_grad`, copies under grad. Tokens that are not `fresh`, and those that later ones push out of a
    ring, are not written.
    """
    slots, time = cache.k.shape[1], at.shape[1]
    slot, keep = at, fresh
    if isinstance(cache, RingCache):
        slot = ring_slots(at, n_sinks, slots)
        if time > slots - n_sinks:
            length = time if fresh is None else fresh.sum(1, keepdim=True)
            lasting = (at < n_sinks) | (at >= cache.count[:, None] + length - (slots - n_sinks))
            keep = lasting if keep is None else keep & lasting
    rows = torch.arange(at.shape[0], device=at.device)[:, None].expand_as(at).flatten()
    slot, keep = slot.flatten(), None if keep is None else keep.flatten()
    return tuple(write_slots(old, x.flatten(0, 1), rows, slot, keep) for old, x in ((cache.k, k), (cache.v, v)))


def write_token(cache: KVCache | RingCache, k: Tensor, v: Tensor, position: int, n_sinks: int) -> tuple[Tensor, Tensor]:
    """`write_cache` of one token [N, 1, G, .] a sequence, all at one position that the host knows."""
    slot = position
    if isinstance(cache, RingCache) and position >= n_sinks:
        slot = n_sinks + (position - n_sinks) % (cache.k.shape[1] - n_sinks)
    if torch.is_grad_enabled():
        return tuple(
            old.slice_scatter(new.to(old.dtype), 1, slot, slot + 1) for old, new in ((cache.k, k), (cache.v, v))
        )
    cache.k.select(1, slot).copy_(k.select(1, 0))  # an index of several dimensions costs twice as much
    cache.v.select(1, slot).copy_(v.select(1, 0))
    return cache.k, cache.v


def write_slots(target: Tensor, new: Tensor, rows: Tensor, slot: Tensor, keep: Tensor | None) -> Tensor:
    """target [N, S, G, .] with new [R, G, .] written at (rows, slot) [R], where `keep` is True.

    In place under `no_grad`, a copy under grad.
    """
    if not slot.numel():
        return target
    new = new.to(target.dtype)
    if keep is not None:
        # Rows that must not be written repeat the write of one that must, so that shapes stay static and no slot gets
        # two values; where there is none, they write back what is there. A value's gradient flows through one row only.
        index = torch.arange(len(keep), device=keep.device)
        chosen = keep.int().argmax()
        source = torch.where(keep, index, chosen)
        rows, slot = rows[source], slot[source].clamp(max=target.shape[1] - 1)
        held = target[rows, slot]
        wide = (slice(None), None, None)
        held = torch.where((index == chosen)[wide], held, held.detach())
        new = torch.where(keep[wide], new, torch.where(keep.any(), new.index_select(0, chosen[None]).detach(), held))
    if torch.is_grad_enabled():
        return target.index_put((rows, slot), new)
    return target.index_put_((rows, slot), new)
