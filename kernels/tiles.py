"""Softmax in pieces: rows of queries cut into tiles that each read a few keys, and the pieces joined again.

A batch [B, T] is handled as B sequences packed in one row, so one set of index arithmetic serves both.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from subquad.kernels.packing import positions, sequence_ids

BUDGET = 1 << 25  # scores held at a time


class Rows:
    """The new tokens as rows 0 .. B T - 1: whose they are and where they stand."""

    def __init__(self, batch: int, time: int, count: Tensor | None, cu_seqlens: Tensor | None, device: torch.device):
        self.packed, self.time, self.total = cu_seqlens is not None, time, batch * time
        if cu_seqlens is None:
            self.n_seqs = batch
            self.begin = torch.arange(batch, device=device) * time
            self.length = torch.full((batch,), time, device=device)
            self.sequence = torch.arange(batch, device=device).repeat_interleave(time)
            self.real = None
        else:
            self.n_seqs = cu_seqlens.numel() - 1
            self.begin, self.length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
            self.sequence, self.real = sequence_ids(time, cu_seqlens)
        self.carried = count is not None
        # A copy: under no_grad the state's count moves on in place.
        self.count = torch.zeros_like(self.begin) if count is None else count.clone()
        self.position = positions(time, count, cu_seqlens, device).expand(batch, -1).reshape(-1)
        self.end = self.count + self.length

    def row(self, sequence: Tensor, position: Tensor) -> Tensor:
        """The row of a sequence's new token at `position`; outside of its new tokens the nearest of them, so that what
        fills a tile up is never another sequence's."""
        last = (self.length - 1)[sequence]
        local = (position - self.count[sequence]).minimum(last).clamp(min=0)
        return (self.begin[sequence] + local).clamp(max=max(self.total - 1, 0))


class Tiles:
    """Tiles of `size` queries of one sequence, `spacing` positions apart.

    They cover blocks of size * spacing positions that start at multiples of that. limit: only positions below it.
    """

    def __init__(self, rows: Rows, size: int, spacing: int = 1, limit: int | None = None):
        self.size, self.spacing, self.rows = size, spacing, rows
        span = size * spacing
        device = rows.begin.device
        start = rows.count // span * span
        length = rows.end if limit is None else rows.end.clamp(max=limit)
        most = rows.time if limit is None else min(rows.time, limit)
        blocks = ((length - start).clamp(min=0) + span - 1) // span
        if rows.packed:
            each = rows.time // span + (2 if rows.carried else 1) * rows.n_seqs
            block = torch.arange(each, device=device)
            ends = blocks.cumsum(0)
            begins = F.pad(ends, (1, 0))[:-1]
            sequence = torch.searchsorted(ends, block, right=True).clamp(max=rows.n_seqs - 1)
        else:
            each = -(-most // span) if not rows.carried or span == 1 else (most + span - 2) // span + 1
            begins = torch.arange(rows.n_seqs, device=device) * each
            sequence = torch.arange(rows.n_seqs, device=device).repeat_interleave(each)
            block = torch.arange(rows.n_seqs * each, device=device)
        self.begins = begins  # of each sequence's tiles in the list
        first = start[sequence] + (block - begins[sequence]) * span
        self.sequence = sequence.repeat_interleave(spacing)
        self.first = (first[:, None] + torch.arange(spacing, device=device)).flatten()
        self.position = self.first[:, None] + torch.arange(size, device=device) * spacing
        self.source = rows.row(self.sequence[:, None], self.position).flatten()
        self.filled = None
        if rows.packed or rows.carried or rows.time % span or limit is not None:
            before, end = rows.count[self.sequence, None], rows.end[self.sequence, None]
            self.filled = (self.position >= before) & (self.position < end)
        # Where each row's query stands: in which block, at which multiple of the spacing, at which offset.
        local = rows.position - start[rows.sequence]
        at = begins[rows.sequence] + local // span
        self.target = ((at * spacing + local % spacing) * size + local % span // spacing).clamp(
            max=max(self.position.numel() - 1, 0)
        )
        self.covered = None if limit is None else rows.position < limit

    def take(self, x: Tensor) -> Tensor:
        """[R, ...] -> [M, size, ...], zero where a tile has no token."""
        taken = x.index_select(0, self.source).unflatten(0, (-1, self.size))
        if self.filled is None:
            return taken
        return torch.where(self.filled.view(*self.filled.shape, *[1] * (x.dim() - 1)), taken, 0)

    def back(self, x: Tensor, fill: float) -> Tensor:
        """[M, size, ...] -> [R, ...]; rows that no tile covers get `fill`."""
        if not self.position.numel():
            return x.new_full((self.rows.total, *x.shape[2:]), fill)
        found = x.flatten(0, 1).index_select(0, self.target)
        if self.covered is None:
            return found
        return torch.where(self.covered.view(-1, *[1] * (found.dim() - 1)), found, fill)


class Source:
    """Keys and values [R, G, .] by the row of a flat buffer: `row(sequence, position)` says where a position lies."""

    def __init__(self, k: Tensor, v: Tensor, row: Callable[[Tensor, Tensor], Tensor]):
        self.k, self.v, self.row = k, v, row

    def take(self, row: Tensor, kv_heads: Tensor | None) -> tuple[Tensor, Tensor]:
        """row [M, L] for all heads, or [M, h, L] of the heads `kv_heads` [h]: [M, h, L, .] of keys and of values."""
        if kv_heads is None:
            return tuple(
                x.index_select(0, row.flatten()).unflatten(0, row.shape).transpose(1, 2) for x in (self.k, self.v)
            )
        flat = (row * self.k.shape[1] + kv_heads[:, None]).flatten()
        shape = (row.shape[0], len(kv_heads), row.shape[-1])
        return tuple(x.flatten(0, 1).index_select(0, flat).unflatten(0, shape) for x in (self.k, self.v))


class Piece(NamedTuple):
    """A part of a softmax: the largest score, the sum of exp(score - largest), and that of exp(...) v."""

    top: Tensor  # [..., 1]
    total: Tensor  # [..., 1]
    product: Tensor  # [..., V]


EMPTY = -1e30  # the largest score where nothing is read; finite, so that it can be subtracted


def piece(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, bias: Tensor | None = None) -> Piece:
    """Queries [..., C, K] over keys [..., L, K] where the mask [..., C, L] allows."""
    scores = q @ k.mT
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, -torch.inf)
    top = (
        scores.detach().amax(-1, keepdim=True).clamp(min=EMPTY)
        if scores.shape[-1]
        else scores.new_full((*scores.shape[:-1], 1), EMPTY)
    )
    weight = (scores - top).exp()
    return Piece(top, weight.sum(-1, keepdim=True), weight @ v)


def joined(pieces: list[Piece]) -> Tensor:
    """The softmax over all pieces' keys; zero where there are none."""
    if len(pieces) == 1:
        return pieces[0].product / torch.where(pieces[0].total > 0, pieces[0].total, 1)
    top = torch.stack([p.top for p in pieces]).amax(0)
    scale = [(p.top - top).exp() for p in pieces]
    total = sum(s * p.total for s, p in zip(scale, pieces, strict=True))
    product = sum(s * p.product for s, p in zip(scale, pieces, strict=True))
    return product / torch.where(total > 0, total, 1)
