"""The algebra that chunked forms share: cumulated decays and decayed pair products."""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 64  # tokens; a power of two


class Decay:
    """A scalar log decay g, cumulated within each chunk.

    Sums run in float64: a float32 cumulative sum over gates that mix -0.01 and -1e4 is off by 4e-4. Every exponential
    is of a difference whose reference lies at or before the query, so none exceeds one.
    """

    def __init__(self, g: Tensor, exclusive: bool, dtype: torch.dtype):
        """g: [B, n, C, H]. `exclusive`: queries read the state before their own token's decay."""
        g = g.transpose(2, 3).double()  # [B, n, H, C]
        self.dtype = dtype
        self.keys = g.cumsum(3)
        self.queries = self.keys - g if exclusive else self.keys
        total = self.keys[:, :, :, -1:]
        self.from_start = self.queries.to(dtype).exp()
        self.to_end = (total - self.keys).to(dtype).exp()
        self.whole = total.to(dtype).exp()[..., None]  # [B, n, H, 1, 1]

    def pairs(self, strict: bool) -> Tensor:
        """exp(G_i - G_j) for j <= i (strict: j < i) and 0 elsewhere: [B, n, H, C, C]."""
        gap = (self.queries[..., :, None] - self.keys[..., None, :]).to(self.dtype)
        return gap.masked_fill(~lower(gap.shape[-1], strict, gap.device), -torch.inf).exp()


def lower(size: int, strict: bool, device: torch.device) -> Tensor:
    """The causal mask [C, C]: True where query i may read key j."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(-1 if strict else 0)


def decayed_scores(q: Tensor, k: Tensor, decay: Decay | None, *, strict: bool, n_heads: int) -> Tensor:
    """q_i . k_j exp(G_i - G_j) for the causal pairs of each chunk, 0 elsewhere: [B, n, H, C, C].

    q, k: [B, n, G, C, K], where heads may share them.
    """
    scores = q @ k.transpose(-1, -2)
    repeat = n_heads // q.shape[2]
    if decay is None:
        scores = scores * lower(q.shape[3], strict, q.device)
        return scores.repeat_interleave(repeat, 2) if repeat > 1 else scores
    pairs = decay.pairs(strict)
    if repeat == 1:
        return scores * pairs
    return (scores.unsqueeze(3) * pairs.unflatten(2, (q.shape[2], repeat))).flatten(2, 3)


class Query(NamedTuple):
    """Rows that read the state: after their own token's decay or before (`exclusive`), and with its key or without."""

    x: Tensor  # [B, n, H, C, K]
    exclusive: bool = False
    own: bool = False


class Products(NamedTuple):
    """What a chunk's queries and keys have to do with each other and with the states at its ends."""

    scores: list[list[Tensor]]  # by query and key: q_i . (exp(G_i - G_j) * k_j) for j < i, or j <= i; [B, n, H, C, C]
    queries: list[Tensor]  # exp(G_i) * q_i, for the state before the chunk; [B, n, H, C, K]
    keys: list[Tensor]  # exp(G_end - G_j) * k_j, for the state after it
    whole: Tensor | None  # exp(G_end), [B, n, H, K | 1, 1]


def decayed_products(queries: list[Query], keys: list[Tensor], g: Tensor | None) -> Products:
    """g: None, [B, n, C, H] or [B, n, C, H, K] (C is a power of two then); keys: [B, n, H, C, K]."""
    if g is not None and g.dim() == 5:
        return _by_halves(queries, keys, g.transpose(2, 3).to(keys[0].dtype).exp().contiguous())
    scores = [[q.x @ k.transpose(-1, -2) for k in keys] for q in queries]
    if g is None:
        scores = [[s.tril(0 if q.own else -1) for s in row] for q, row in zip(queries, scores, strict=True)]
        return Products(scores, [q.x for q in queries], keys, None)
    decays = {kind: Decay(g, kind, keys[0].dtype) for kind in sorted({q.exclusive for q in queries})}
    pairs = {kind: decay.pairs(strict=kind) for kind, decay in decays.items()}
    for i, q in enumerate(queries):
        weight = pairs[q.exclusive] if q.own or q.exclusive else pairs[False].tril(-1)
        scores[i] = [s * weight for s in scores[i]]
    starts = [q.x * decays[q.exclusive].from_start[..., None] for q in queries]
    (decay, *_) = decays.values()
    return Products(scores, starts, [k * decay.to_end[..., None] for k in keys], decay.whole)


def _by_halves(queries: list[Query], keys: list[Tensor], e: Tensor) -> Products:
    """For a vector decay e = exp(g), [B, n, H, C, K].

    Blocks of 1, 2, 4, ... tokens hold their queries decayed since the block's start and their keys decayed to its end.
    Two neighbours meet in one product, late queries with early keys, and become one block by multiplying the late
    queries and the early keys with the other's whole decay. So C K log C multiplications stand in for C^2 K
    exponentials, and decays are only ever multiplied: no difference of sums that could cancel, nothing above one.
    """
    # Contiguous first: a product takes its layout from its operands, and a transposed one makes all that follows slow.
    late, early = [q.x.contiguous() for q in queries], [k.contiguous() for k in keys]
    scores = [
        [((x * k).sum(-1) if q.own else torch.zeros_like(k[..., 0]))[..., None, None] for k in early]
        for q, x in zip(queries, late, strict=True)
    ]
    late = [x if q.exclusive else x * e for q, x in zip(queries, late, strict=True)]
    whole, half = e, 1
    while half < e.shape[3]:
        late, early = ([x.unflatten(3, (-1, 2, half)) for x in group] for group in (late, early))
        scores = [
            [_join(s, q, k) for s, k in zip(row, early, strict=True)] for row, q in zip(scores, late, strict=True)
        ]
        first, second = whole.unflatten(3, (-1, 2)).unbind(4)
        one = torch.ones_like(first)
        since, until = (torch.stack(x, 4)[..., None, :] for x in ((one, first), (second, one)))
        late, early = [(x * since).flatten(3, 5) for x in late], [(x * until).flatten(3, 5) for x in early]
        whole, half = first * second, 2 * half
    return Products([[s.squeeze(3) for s in row] for row in scores], late, early, whole.transpose(-1, -2))


def _join(scores: Tensor, late: Tensor, early: Tensor) -> Tensor:
    """Neighbours and their crossing products: [.., 2 blocks, half, half] -> [.., blocks, 2 half, 2 half]."""
    crossing = late[:, :, :, :, 1] @ early[:, :, :, :, 0].transpose(-1, -2)
    first, second = scores.unflatten(3, (-1, 2)).unbind(4)
    top = torch.cat([first, torch.zeros_like(crossing)], -1)
    return torch.cat([top, torch.cat([crossing, second], -1)], -2)
