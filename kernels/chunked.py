"""The algebra that chunked forms share: cumulated decays and decayed pair products."""

import torch
from torch import Tensor

CHUNK = 64  # tokens; a power of two


class Decay:
    """A log decay g, cumulated within each chunk.

    Sums run in float64: a float32 cumulative sum over gates that mix -0.01 and -1e4 is off by 4e-4. Every exponential
    is of a difference whose reference lies at or before the query, so none exceeds one.
    """

    def __init__(self, g: Tensor, exclusive: bool, dtype: torch.dtype):
        """g: [B, n, C, H] or [B, n, C, H, K]. `exclusive`: queries read the state before their own token's decay."""
        g = g.transpose(2, 3).double()  # [B, n, H, C(, K)]
        self.vector = g.dim() == 5
        self.dtype = dtype
        self.keys = g.cumsum(3)
        self.queries = self.keys - g if exclusive else self.keys
        total = self.keys[:, :, :, -1:]
        self.from_start = self.queries.to(dtype).exp()
        self.to_end = (total - self.keys).to(dtype).exp()
        whole = total.to(dtype).exp()
        self.whole = whole.transpose(-1, -2) if self.vector else whole[..., None]  # [B, n, H, K | 1, 1]
        self._halves: list[tuple[Tensor, Tensor]] | None = None

    def pairs(self, strict: bool) -> Tensor:
        """Of a scalar decay: exp(G_i - G_j) for j <= i (strict: j < i) and 0 elsewhere: [B, n, H, C, C]."""
        gap = (self.queries[..., :, None] - self.keys[..., None, :]).to(self.dtype)
        return gap.masked_fill(~lower(gap.shape[-1], strict, gap.device), -torch.inf).exp()

    def halves(self) -> list[tuple[Tensor, Tensor]]:
        """Of a vector decay: for blocks of 2, 4, ..., C tokens the decay from the middle to the queries of the second
        half, and from the keys of the first half to the middle: [B, n, H, blocks, half, K] each."""
        if self._halves is None:
            self._halves = []
            half = 1
            while 2 * half <= self.keys.shape[3]:
                (_, queries), (keys, _) = _halved(self.queries, half), _halved(self.keys, half)
                middle = keys[..., -1:, :]
                after, before = (gap.to(self.dtype).exp() for gap in (queries - middle, middle - keys))
                self._halves.append((after, before))
                half *= 2
        return self._halves


def lower(size: int, strict: bool, device: torch.device) -> Tensor:
    """The causal mask [C, C]: True where query i may read key j."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(-1 if strict else 0)


def decayed_scores(q: Tensor, k: Tensor, decay: Decay | None, *, strict: bool, n_heads: int) -> Tensor:
    """q_i . (exp(G_i - G_j) * k_j) for the causal pairs of each chunk, 0 elsewhere: [B, n, H, C, C].

    q, k: [B, n, G, C, K], where heads may share them unless the decay is a vector; C is a power of two then. An
    exclusive decay goes with `strict`.
    """
    if decay is not None and decay.vector:
        return _vector_scores(q, k, decay, strict)
    scores = q @ k.transpose(-1, -2)
    repeat = n_heads // q.shape[2]
    if decay is None:
        scores = scores * lower(q.shape[3], strict, q.device)
        return scores.repeat_interleave(repeat, 2) if repeat > 1 else scores
    pairs = decay.pairs(strict)
    if repeat == 1:
        return scores * pairs
    return (scores.unsqueeze(3) * pairs.unflatten(2, (q.shape[2], repeat))).flatten(2, 3)


def _vector_scores(q: Tensor, k: Tensor, decay: Decay, strict: bool) -> Tensor:
    """Every pair i > j is split by the middle of exactly one block of 2, 4, ..., C tokens, where its decay is the
    product of one factor of i and one of j: log C factors a token in place of C, and all the rest is products."""
    B, n, H, C, _ = q.shape
    scores = q.new_zeros(B, n, H, C, 1, 1) if strict else (q * k).sum(-1)[..., None, None]
    half = 1
    for after, before in decay.halves():
        (_, late), (early, _) = _halved(q, half), _halved(k, half)
        crossing = (late * after) @ (early * before).transpose(-1, -2)
        first, second = scores.unflatten(3, (-1, 2)).unbind(4)
        top = torch.cat([first, torch.zeros_like(crossing)], -1)
        scores = torch.cat([top, torch.cat([crossing, second], -1)], -2)
        half *= 2
    return scores.squeeze(3)


def _halved(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """[B, n, H, C, K] as blocks of two halves: two of [B, n, H, blocks, half, K]."""
    first, second = x.unflatten(3, (-1, 2, half)).unbind(4)
    return first, second
