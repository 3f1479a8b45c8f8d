"""From scores to the next token."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subquad.errors import UserError

NO_TOKEN = -1  # where none of a sequence's scores is a number above -infinity
COLDEST = 1e-37  # below it a temperature is zero in float32, and 0 / 0 is NaN


@dataclass
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the most likely token (greedy); above it, a token is drawn.
    top_k, top_p, min_p: draw only from the k likeliest tokens, the smallest set of probability p, those with at least
        min_p of the likeliest one's probability.
    repetition_penalty: above 1, tokens that occurred before, in the prompt too, get less likely (Keskar et al. 2019).
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    penalty: Any = field(init=False, repr=False)
    warpers: list[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0 <= self.temperature < 1000, "at least 0 (greedy) and below 1000")
        _check("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1")
        _check("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("min_p", self.min_p, self.min_p is None or 0 <= self.min_p <= 1, "between 0 and 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0.001 <= penalty < 1000, "at least 0.001 and below 1000")
        if self.greedy:
            for name in ("top_k", "top_p", "min_p"):
                value = getattr(self, name)
                if value is not None:
                    raise UserError(f"{name} {value} has no effect at temperature 0; give a temperature above 0")
        wanted = [
            ("TemperatureLogitsWarper", max(float(self.temperature), COLDEST), self.temperature not in (0, 1)),
            ("TopKLogitsWarper", self.top_k, self.top_k is not None),
            ("TopPLogitsWarper", self.top_p, self.top_p is not None),
            ("MinPLogitsWarper", self.min_p, self.min_p is not None),
        ]
        self.warpers = [_processor(name, value) for name, value, used in wanted if used]
        self.penalty = _processor("RepetitionPenaltyLogitsProcessor", penalty) if penalty != 1 else None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def pick(
        self, scores: Float[Tensor, "N V"], seen: Bool[Tensor, "N V"], generators: Sequence[torch.Generator]
    ) -> Int[Tensor, "N"]:
        """The next token of each sequence; `seen` marks the tokens that occurred in it.

        A score that is NaN counts as -infinity, one of infinity as the largest number. Where a sequence has no other
        score its token is NO_TOKEN.
        """
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        scores = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
        if self.penalty is not None:  # a product that overflows must not leave a sequence without a token
            largest = torch.finfo(scores.dtype).max
            penalized = self.penalty(_ids(seen), scores).clamp(-largest, largest)
            scores = penalized.masked_fill(scores == -torch.inf, -torch.inf)
        best, ids = scores.max(-1)
        if not self.greedy:
            # Differences from the best, so that no temperature makes an infinity of it: it stays 0.
            scores = scores - best.clamp(min=torch.finfo(scores.dtype).min).unsqueeze(-1)
            for warper in self.warpers:
                scores = warper(seen, scores)
            ids = _draw(scores, generators)
        return ids.masked_fill(best == -torch.inf, NO_TOKEN)  # drawn of a softmax of NaN they would be token V


def _processor(name: str, value: Any) -> Any:
    from transformers.generation import logits_process  # takes 1.5 s to import

    return getattr(logits_process, name)(value)


def _draw(scores: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token a sequence, of the scores' softmax."""
    # One uniform number a token and sequence, from the sequence's own generator, so that what a sequence says does
    # not depend on the batch it is in. 1 - u lies in (0, 1], so a token of probability zero is never taken.
    drawn = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators])
    cumulative = scores.softmax(-1).cumsum(-1)
    at = (1 - drawn).to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, at).squeeze(-1)


def seeds_from(seed: int | None, n: int) -> list[int]:
    """One seed a sequence: seed, seed + 1, ...; from the system's randomness where none is given."""
    if seed is not None and not 0 <= seed < 2**62:
        raise UserError(f"seed is {seed}; it must be between 0 and 2**62")
    first = secrets.randbits(31) if seed is None else seed
    return [first + i for i in range(n)]


def generator(seed: int) -> torch.Generator:
    # On the CPU whatever the model's device: the same seed draws the same numbers everywhere.
    return torch.Generator().manual_seed(seed)


def _ids(seen: Tensor) -> Tensor:
    """The tokens that occurred, as rows of equal length: where one did not, the first that did stands again."""
    first = seen.int().argmax(-1, keepdim=True)
    return torch.where(seen, torch.arange(seen.shape[-1], device=seen.device), first)


def _check(name: str, value: Any, allowed: bool, what: str) -> None:
    if not allowed:
        raise UserError(f"{name} is {value}; it must be {what}")
