"""The algebra that chunked forms share: cumulated decays and decayed pair products."""

from typing import NamedTuple

import torch
from torch import Tensor

from subquad.kernels.operators import operator

CHUNK = 64  # tokens; a power of two


def chunk_size(time: int) -> int:
    """Tokens a chunk for an input of `time` tokens: short inputs are not filled up to a whole one."""
    return min(CHUNK, 1 << max(time - 1, 0).bit_length())


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


def solve_lower(A: Tensor, right: Tensor) -> Tensor:
    """(I + A)^-1 right for a strictly lower triangular A [.., C, C].

    Written as a row system: of row-major operands the solver copies none, and its result is row-major, too.
    """
    return torch.linalg.solve_triangular(A.mT, right.mT, upper=True, left=False, unitriangular=True).mT


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
    """keys: [B, n, H, C, K]; g: None, [B, n, C, H] or [B, n, C, H, K] (C a power of two, no second derivatives)."""
    if g is not None and g.dim() == 5:
        return _by_halves(queries, keys, g.transpose(2, 3).to(keys[0].dtype).exp())
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
    """For a vector decay e = exp(g), [B, n, H, C, K]: one product a level for all pairs of queries and keys."""
    decayed, own = [not q.exclusive for q in queries], [q.own for q in queries]
    rows = (torch.stack(x, 4) for x in ([q.x for q in queries], keys))
    scores, late, early, whole = _pair_by_halves(*rows, e, decayed, own)
    pairs = [list(row.unbind(0)) for row in scores.unbind(0)]
    return Products(pairs, list(late.unbind(4)), list(early.unbind(4)), whole[..., None])


@operator("pair_by_halves")
def _pair_by_halves(
    queries: Tensor, keys: Tensor, e: Tensor, decayed: list[bool], own: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """queries [B, n, H, C, R, K] and keys [.., C, Q, K] -> scores [R, Q, B, n, H, C, C], late and early as queries and
    keys, whole [.., K].

    `decayed`: the queries that read after their own token's decay; `own`: those that read its key, undecayed.

    Blocks of 1, 2, 4, ... tokens hold their queries decayed since the block's start and their keys decayed to its end.
    Two neighbours meet in one product, late queries with early keys, and become one block by multiplying the late
    queries and the early keys with the other's whole decay. So C K log C multiplications stand in for C^2 K
    exponentials, and decays are only ever multiplied: no difference of sums that could cancel, nothing above one.
    """
    at, whole = e.shape[:3], e.flatten(0, 2)
    late, early = _rows(queries), _rows(keys)
    scores = late.new_zeros(late.shape[2], early.shape[2], *whole.shape[:2], whole.shape[1])
    for r in _true(own):
        scores[r].diagonal(dim1=2, dim2=3).copy_((late[:, :, r, None] * early).sum(3).permute(2, 0, 1))
    for r in _true(decayed):
        late[:, :, r] *= whole
    for half in _halves(e):
        q, k = _half(late, half, 1), _half(early, half, 0)
        product = (_matrix(q) @ _matrix(k).mT).view(*q.shape[:4], *k.shape[2:4])
        _crossing(scores, half).copy_(product.permute(3, 5, 0, 2, 4, 1))
        whole = _grow(q, k, whole)
    return scores.unflatten(2, at), late.unflatten(0, at), early.unflatten(0, at), whole[:, 0].clone().unflatten(0, at)


@_pair_by_halves.register_fake
def _(queries, keys, e, decayed, own):
    *at, C, K = e.shape
    late, early = (e.new_empty(x.shape) for x in (queries, keys))
    return e.new_empty(queries.shape[4], keys.shape[4], *at, C, C), late, early, e.new_empty(*at, K)


@operator("pair_by_halves_backward")
def _pair_by_halves_backward(
    queries: Tensor,
    keys: Tensor,
    e: Tensor,
    decayed: list[bool],
    own: list[bool],
    d_scores: Tensor,
    d_late: Tensor,
    d_early: Tensor,
    d_whole: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The levels once more, kept this time, then the chain rule from the last to the first."""
    at, own_decay = e.shape[:3], e.flatten(0, 2)
    late, early, whole, levels = _rows(queries), _rows(keys), own_decay, []
    for r in _true(decayed):
        late[:, :, r] *= own_decay
    for half in _halves(e):
        q, k = _half(late, half, 1), _half(early, half, 0)
        levels.append((half, q.contiguous(), k.contiguous(), whole.unflatten(1, (-1, 2))))
        whole = _grow(q, k, whole)

    d_scores = d_scores.flatten(2, 4)
    d_late, d_early = (d.flatten(0, 2).clone(memory_format=torch.contiguous_format) for d in (d_late, d_early))
    d_e = d_whole.flatten(0, 2)[:, None].clone()
    for half, q, k, pair in reversed(levels):
        d_q, d_k = _half(d_late, half, 1), _half(d_early, half, 0)
        # What one block's whole decay multiplied: the other's rows, and the other's decay.
        d_first, d_second = ((d * x).sum((2, 3)) for d, x in ((d_q, q), (d_k, k)))
        first, second = pair.unbind(2)
        d_e = torch.stack([d_first + d_e * second, d_second + d_e * first], 2).flatten(1, 2)
        d_product = _crossing(d_scores, half).permute(2, 5, 3, 0, 4, 1).flatten(4, 5).flatten(2, 3).flatten(0, 1)
        d_q.mul_(first[:, :, None, None]).add_((d_product @ _matrix(k)).view_as(q))
        d_k.mul_(second[:, :, None, None]).add_((d_product.mT @ _matrix(q)).view_as(k))
    late, early = _rows(queries), _rows(keys)
    for r in _true(decayed):
        d_e = d_e + d_late[:, :, r] * late[:, :, r]
        d_late[:, :, r] *= own_decay
    for r in _true(own):
        d = d_scores[r].diagonal(dim1=2, dim2=3).permute(1, 2, 0)[..., None]
        d_late[:, :, r] += (d * early).sum(2)
        d_early += d * late[:, :, r, None]
    return d_late.unflatten(0, at), d_early.unflatten(0, at), d_e.reshape(e.shape)


@_pair_by_halves_backward.register_fake
def _(queries, keys, e, *rest):
    return *(e.new_empty(x.shape) for x in (queries, keys)), e.new_empty(e.shape)


def _save(ctx, inputs, output):
    queries, keys, e, *ctx.kinds = inputs
    ctx.save_for_backward(queries, keys, e)


def _backward(ctx, *grads):
    return *_pair_by_halves_backward(*ctx.saved_tensors, *ctx.kinds, *grads), None, None


_pair_by_halves.register_autograd(_backward, setup_context=_save)
_pair_by_halves_backward.once_differentiable("the chunked form of a decay for every channel")


def _halves(e: Tensor) -> list[int]:
    return [1 << level for level in range(e.shape[3].bit_length() - 1)]


def _true(flags: list[bool]) -> list[int]:
    return [r for r, flag in enumerate(flags) if flag]


def _rows(x: Tensor) -> Tensor:
    """[B, n, H, C, R, K] -> a copy [B n H, C, R, K], contiguous."""
    return x.flatten(0, 2).clone(memory_format=torch.contiguous_format)


def _half(x: Tensor, half: int, which: int) -> Tensor:
    """The first or second of each two neighbouring blocks: a view [N, M, half, R, K] of [N, C, R, K]."""
    return x.unflatten(1, (-1, 2, half))[:, :, which]


def _matrix(x: Tensor) -> Tensor:
    return x.flatten(2, 3).flatten(0, 1)


def _crossing(scores: Tensor, half: int) -> Tensor:
    """The scores of second blocks with first ones: a view [R, Q, N, half, half, M] of [R, Q, N, C, C]."""
    blocks = scores.unflatten(4, (-1, 2, half)).unflatten(3, (-1, 2, half))
    return blocks[:, :, :, :, 1, :, :, 0].diagonal(dim1=3, dim2=5)


def _grow(q: Tensor, k: Tensor, whole: Tensor) -> Tensor:
    """Two blocks become one, in place: its queries since its start, its keys to its end; returns its whole decay."""
    first, second = whole.unflatten(1, (-1, 2)).unbind(2)
    q.mul_(first[:, :, None, None])
    k.mul_(second[:, :, None, None])
    return first * second
