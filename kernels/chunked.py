"""The algebra that chunked forms share: cumulated decays and decayed pair products."""

import torch
from torch import Tensor


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

    def pairs(self, strict: bool) -> Tensor:
        """exp(G_i - G_j) for j <= i (strict: j < i) and 0 elsewhere: [B, n, H, C, C(, K)]."""
        gap = (self.queries[:, :, :, :, None] - self.keys[:, :, :, None, :]).to(self.dtype)
        hidden = ~lower(gap.shape[4], strict, gap.device)
        return gap.masked_fill(hidden[..., None] if self.vector else hidden, -torch.inf).exp()


def lower(size: int, strict: bool, device: torch.device) -> Tensor:
    """The causal mask [C, C]: True where query i may read key j."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(-1 if strict else 0)


def decayed_scores(q: Tensor, k: Tensor, decay: Decay | None, *, strict: bool, n_heads: int) -> Tensor:
    """q_i . (exp(G_i - G_j) * k_j) for the causal pairs of each chunk, 0 elsewhere: [B, n, H, C, C].

    q, k: [B, n, G, C, K], where heads may share them unless the decay is a vector.
    """
    if decay is not None and decay.vector:
        return (decay.pairs(strict) * k[:, :, :, None] @ q[..., None]).squeeze(-1)
    scores = q @ k.transpose(-1, -2)
    repeat = n_heads // q.shape[2]
    if decay is None:
        scores = scores * lower(q.shape[3], strict, q.device)
        return scores.repeat_interleave(repeat, 2) if repeat > 1 else scores
    pairs = decay.pairs(strict)
    if repeat == 1:
        return scores * pairs
    return (scores.unsqueeze(3) * pairs.unflatten(2, (q.shape[2], repeat))).flatten(2, 3)
