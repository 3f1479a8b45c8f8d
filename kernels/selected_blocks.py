"""What attention to chosen blocks shares: means of complete blocks, a cache with them, and the blocks' softmax pieces.

Block b of a sequence is its positions b * size .. b * size + size - 1. It is complete once all of them were seen; its
mean is written then, and never changes.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.errors import UserError
from subquad.kernels.cache import write_slots
from subquad.kernels.state import accumulator_dtype
from subquad.kernels.tiles import EMPTY, Piece, Rows, Source, Tiles, piece

DIRECT = 16  # new tokens up to which every query fetches its own blocks; beyond, queries are sorted by block


def held_tokens(rows: Rows, k: Tensor, v: Tensor, caches: tuple[Tensor, Tensor] | None) -> tuple[Source, list[Tensor]]:
    """Where keys and values of all positions lie, and the caches with the new tokens written."""
    new = [x.flatten(0, 1) for x in (k, v)]
    if caches is None:
        return Source(*new, rows.row), []
    slots = caches[0].shape[1]
    if k.device.type == "cpu" and not torch.compiler.is_compiling() and int(rows.end.max()) > slots:
        raise UserError(f"the cache has {slots} slots; {int(rows.end.max())} tokens do not fit (raise max_len)")
    slot = rows.position.clamp(max=slots - 1)
    written = [write_slots(c, x, rows.sequence, slot, rows.real) for c, x in zip(caches, new, strict=True)]
    return Source(*(x.flatten(0, 1) for x in written), lambda n, p: n * slots + p.clamp(0, slots - 1)), written


class Blocks:
    """All blocks of all sequences in one list: whose and which; `means` of any [R, G, .] tensor."""

    def __init__(self, rows: Rows, size: int, source: Source, slots: int | None):
        self.rows, self.size, self.source, self.slots = rows, size, source, slots
        self.tiles = Tiles(rows, size)
        device = rows.begin.device
        if slots is None:
            self.sequence, self.index = self.tiles.sequence, self.tiles.first // size
        else:
            self.sequence = torch.arange(rows.n_seqs, device=device).repeat_interleave(slots)
            self.index = torch.arange(slots, device=device).repeat(rows.n_seqs)
        self.begins = self.tiles.begins if slots is None else torch.arange(rows.n_seqs, device=device) * slots
        self.most = -(-rows.time // size) if slots is None else slots  # blocks that one sequence can have
        if rows.packed and device.type == "cpu" and rows.n_seqs and not torch.compiler.is_compiling():
            self.most = min(self.most, -(-int(rows.end.max()) // size))

    def means(self, x: Tensor, held: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(means [blocks, G, .], zero where a block is not complete; the cache of means with the new ones)."""
        tiles = self.tiles
        row = self.source.row(tiles.sequence[:, None], tiles.position)
        wide = accumulator_dtype(x.dtype)
        mean = x.index_select(0, row.flatten()).unflatten(0, row.shape).to(wide).mean(1)
        last, end = tiles.position[:, -1], self.rows.end[tiles.sequence]
        done = (last < end) & (last >= self.rows.count[tiles.sequence])
        mean = torch.where(done[:, None, None], mean, 0)
        if held is None:
            return mean, None
        slot = (tiles.first // self.size).clamp(0, max(held.shape[1] - 1, 0))
        written = write_slots(held, mean, tiles.sequence, slot, done)
        return written.flatten(0, 1), written

    def by_row(self, x: Tensor, batch: int) -> Tensor:
        """A list over blocks as [B, n], the blocks that row b of the batch may see (packed: all)."""
        return x.unflatten(0, (batch, -1))

    def visible(self, batch: int) -> tuple[Tensor, Tensor]:
        """(own [B, T, n]: the block is of the token's sequence; before [B, T, n]: blocks from it to the token's)."""
        sequence, position = (x.unflatten(0, (batch, -1))[..., None] for x in (self.rows.sequence, self.rows.position))
        own = self.by_row(self.sequence, batch)[:, None] == sequence
        return own, position // self.size - self.by_row(self.index, batch)[:, None]

    def flat(self, chosen: Tensor) -> Tensor:
        """Indices [B, ..., T, n] into `by_row` as indices into the list."""
        each = len(self.sequence) // chosen.shape[0]
        return chosen + (torch.arange(chosen.shape[0], device=chosen.device) * each).view(-1, *[1] * (chosen.dim() - 1))


def chosen_pieces(queries: Tensor, chosen: Tensor, blocks: Blocks, kv_heads: Tensor) -> list[Piece]:
    """The softmax pieces [R, H, .] of each query over each of its blocks.

    queries: [R, g, h, K], g groups of h heads that choose together; chosen: [R, g, n] in the list of blocks, -1 for
    none; kv_heads [g]: the key head each group reads.
    """
    (R, g, h, _), n = queries.shape, chosen.shape[2]
    if not n or not R:
        return []
    source, size, rows = blocks.source, blocks.size, blocks.rows
    inner = torch.arange(size, device=queries.device)

    def fetch(block: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = blocks.index[block][..., None] * size + inner
        row = source.row(blocks.sequence[block][..., None], at) * source.k.shape[1] + head[..., None]
        keys, values = (
            x.flatten(0, 1).index_select(0, row.flatten()).unflatten(0, row.shape).to(queries.dtype)
            for x in (source.k, source.v)
        )
        return at, keys, values

    if rows.time <= DIRECT:
        own = blocks.begins[rows.sequence].view(R, 1, 1)  # what none is chosen for fetches a block of its sequence
        at, keys, values = fetch(torch.where(chosen >= 0, chosen, own), kv_heads[:, None].expand(R, g, n))
        mask = (chosen >= 0)[..., None] & (at <= rows.position.view(-1, 1, 1, 1))
        found = piece(queries[:, :, None], keys, values, mask[..., None, :].expand(-1, -1, -1, h, -1))
        return [Piece(*parts) for parts in zip(*(x.movedim(2, 0).flatten(2, 3) for x in found), strict=True)]

    # Pairs of a query and a block, sorted by block, so that a tile of queries shares the keys it fetches.
    none = g * len(blocks.sequence)
    group = torch.arange(g, device=queries.device)[:, None]
    segment = torch.where(chosen >= 0, group * len(blocks.sequence) + chosen, none).flatten()
    order = segment.argsort(stable=True)
    counts = torch.zeros(none + 1, dtype=torch.int64, device=queries.device)
    bounds = F.pad(counts.scatter_add(0, segment, torch.ones_like(segment)).cumsum(0), (1, 0))
    tiles = Tiles(Rows(1, len(segment), None, bounds, queries.device), min(64, max(16, R * n // len(blocks.sequence))))
    pair = order[tiles.source].unflatten(0, (-1, tiles.size))  # [m, C]
    tile_group = (tiles.sequence // len(blocks.sequence)).clamp(max=g - 1)
    at, keys, values = fetch(tiles.sequence % len(blocks.sequence), kv_heads[tile_group])
    real = tiles.filled & (tiles.sequence < none)[:, None]
    mask = (at[:, None] <= rows.position[pair // (g * n)][..., None]) & real[..., None]
    taken = queries.flatten(0, 1).index_select(0, pair.flatten() // n).unflatten(0, pair.shape)
    taken = torch.where(real[..., None, None], taken, 0).flatten(1, 2)  # the keys may be another sequence's
    found = piece(taken, keys, values, mask.repeat_interleave(h, 1))
    back = order.argsort()
    parts = []
    for x, fill in zip(found, (EMPTY, 0.0, 0.0), strict=True):
        sorted_x = tiles.back(torch.where(real[..., None, None], x.unflatten(1, (-1, h)), fill), fill)
        parts.append(sorted_x.index_select(0, back).unflatten(0, (R, g, n)).movedim(2, 0).flatten(2, 3))
    return [Piece(*each) for each in zip(*parts, strict=True)]


# The specification's frame: one sequence after the other, all its keys written out.


def each_sequence(
    inputs: list[Tensor], state: tuple | None, n_means: int, size: int, cu_seqlens: Tensor | None, attend: Callable
) -> tuple[Tensor, list[Tensor]]:
    """attend(inputs of the sequence..., all keys, all values, means, begin) -> o for every sequence.

    inputs: q, k, v and what else there is by token. state: (k, v, n_means means of k and then of v, count).
    """
    q, _, v = inputs[:3]
    bounds = [0, q.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    spans = [(n, *bounds) for n in range(q.shape[0])] if cu_seqlens is None else [(0, *s) for s in pairwise(bounds)]
    outs, caches = [], []
    for n, (row, start, end) in enumerate(spans):
        here = [x[row, start:end] for x in inputs]
        begin = 0 if state is None else int(state.count[n])
        total = begin + end - start
        if state is not None and total > state.k.shape[1]:
            raise UserError(f"the cache has {state.k.shape[1]} slots; {total} tokens do not fit (raise max_len)")
        every = [
            new if state is None else torch.cat([old[n, :begin].to(new.dtype), new])
            for new, old in zip(here[1:3], (None, None) if state is None else state[:2], strict=True)
        ]
        means = []
        for i in range(n_means):
            known = [] if state is None else list(state[2 + i][n, : begin // size])
            wide = accumulator_dtype(every[i].dtype)
            known += [every[i][b * size : (b + 1) * size].to(wide).mean(0) for b in range(len(known), total // size)]
            means.append(torch.stack(known) if known else every[i].new_zeros(0, *every[i].shape[1:]))
        outs.append(attend(*here, *every, means, begin))
        if state is not None:
            new = [*every, *means]
            caches.append(
                [
                    torch.cat([x.to(old.dtype), old[n, len(x) :]])
                    for x, old in zip(new, state[: 2 + n_means], strict=True)
                ]
            )
    if cu_seqlens is None:
        out = torch.stack(outs)
    else:
        out = torch.cat([*outs, q.new_zeros(q.shape[1] - bounds[-1], q.shape[2], v.shape[3])])[None]
    stacked = [torch.stack(parts) for parts in zip(*caches, strict=True)]
    if torch.is_grad_enabled() or state is None:
        return out, stacked
    return out, [old.copy_(x) for old, x in zip(state, stacked, strict=False)]


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """softmax over the allowed entries, zero where there are none."""
    scores = scores.masked_fill(~mask, -torch.inf)
    return torch.where(mask.any(-1, keepdim=True), scores, 0).softmax(-1) * mask
