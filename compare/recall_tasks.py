"""Synthetic tasks that ask a model what it kept: recall, copying and state tracking.

A task's fields are its knobs. `examples(seed, batch, length)` is a pure function of them: tokens [B, T] and targets
[B, T], what to answer after reading tokens[:, : t + 1], -100 where nothing is asked. `length` is that of training, and
examples of any greater one can be had.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, get_type_hints

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from subquad.errors import UserError, nearest
from subquad.layers.build import check_keys, check_type
from subquad.train.rows import IGNORED


class Examples(NamedTuple):
    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]


@dataclass(frozen=True)
class Task(ABC):
    """What all tasks have.

    length: tokens T of a training sequence.
    """

    length: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise UserError(f"{self.name}: {field.name} is {value}; it must be at least 1")
        if self.length < self.shortest:
            raise UserError(
                f"{self.name}: length is {self.length}; with these knobs it must be at least {self.shortest}"
            )

    @property
    def name(self) -> str:
        return next(name for name, task in TASKS.items() if task is type(self))

    @property
    @abstractmethod
    def shortest(self) -> int:
        """The least length that holds the task."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """Tokens are below this."""

    @property
    @abstractmethod
    def chance(self) -> float:
        """The accuracy of a guess: among the values of the sequence for MQAR, else among all possible answers."""

    @abstractmethod
    def fill(self, tokens: Tensor, targets: Tensor, random: Generator) -> None:
        """Write examples into tokens (zeros) and targets (-100)."""

    def examples(self, seed: int, batch: int, length: int | None = None) -> Examples:
        """`batch` sequences of `length` tokens (by default the training length), the same for the same seed."""
        length = self.length if length is None else length
        if length < self.shortest:
            raise UserError(f"{self.name}: length {length} is too short; it must be at least {self.shortest}")
        tokens = torch.zeros(batch, length, dtype=torch.long)
        targets = torch.full_like(tokens, IGNORED)
        self.fill(tokens, targets, torch.Generator().manual_seed(seed))
        return Examples(tokens, targets)


@dataclass(frozen=True)
class MQAR(Task):
    """Multi-query associative recall (Arora et al. 2023, Zoology, arXiv:2312.04927): key, value, key, value, ...;
    then each key once more, in any order and at random places among zeros, and the answer at each is the value
    that followed it. Keys and values are of two halves of the vocabulary and none occurs twice. A state of S
    numbers bounds the pairs that can be kept. A guess among the sequence's values is right once in `pairs`.

    pairs: key/value pairs. vocabulary: keys and values together.
    """

    pairs: int = 8
    vocabulary: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocabulary < 2 * self.pairs:
            raise UserError(
                f"{self.name}: vocabulary is {self.vocabulary}; {self.pairs} pairs need at least {2 * self.pairs}"
            )

    @property
    def shortest(self) -> int:
        return 3 * self.pairs

    @property
    def vocab_size(self) -> int:
        return 1 + 2 * (self.vocabulary // 2)

    @property
    def chance(self) -> float:
        return 1 / self.pairs

    def fill(self, tokens: Tensor, targets: Tensor, random: Generator) -> None:
        (batch, length), n, half = tokens.shape, self.pairs, self.vocabulary // 2
        keys = 1 + _distinct(batch, half, n, random)
        values = 1 + half + _distinct(batch, half, n, random)
        tokens[:, 0 : 2 * n : 2], tokens[:, 1 : 2 * n : 2] = keys, values
        places = 2 * n + _distinct(batch, length - 2 * n, n, random)
        tokens.scatter_(1, places, keys)
        targets.scatter_(1, places, values)


@dataclass(frozen=True)
class Induction(Task):
    """Induction heads (Olsson et al. 2022, arXiv:2209.11895; as in Mamba, Gu and Dao 2023, arXiv:2312.00752): random
    tokens, among which one marker (token 0) stands at a random place; the marker comes again at the end, and the
    answer is the token that followed it the first time. Mamba's paper reports answers that hold at thousands of
    times the training length.

    vocabulary: tokens besides the marker.
    """

    vocabulary: int = 16

    @property
    def shortest(self) -> int:
        return 3

    @property
    def vocab_size(self) -> int:
        return 1 + self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.vocabulary

    def fill(self, tokens: Tensor, targets: Tensor, random: Generator) -> None:
        batch, length = tokens.shape
        tokens.copy_(torch.randint(1, 1 + self.vocabulary, tokens.shape, generator=random))
        place = torch.randint(length - 2, (batch, 1), generator=random)
        tokens.scatter_(1, place, 0)
        tokens[:, -1] = 0
        targets[:, -1] = tokens.gather(1, place + 1)[:, 0]


@dataclass(frozen=True)
class SelectiveCopying(Task):
    """Selective copying (Gu and Dao 2023, arXiv:2312.00752; after Arjovsky et al. 2016): data tokens at random places
    among blanks (token 0), then as many markers (token 1); the answers at the markers are the data in their order.
    What to keep depends on the content, so a layer whose dynamics do not depend on its input (S4, a fixed decay)
    cannot tell data from blanks.

    items: data tokens. vocabulary: of the data.
    """

    items: int = 8
    vocabulary: int = 16

    @property
    def shortest(self) -> int:
        return 2 * self.items

    @property
    def vocab_size(self) -> int:
        return 2 + self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.vocabulary

    def fill(self, tokens: Tensor, targets: Tensor, random: Generator) -> None:
        (batch, length), n = tokens.shape, self.items
        data = torch.randint(2, 2 + self.vocabulary, (batch, n), generator=random)
        tokens.scatter_(1, _distinct(batch, length - n, n, random).sort(1).values, data)
        tokens[:, -n:], targets[:, -n:] = 1, data


@dataclass(frozen=True)
class ModularCounting(Task):
    """Modular counting (Grazzi et al. 2024, arXiv:2411.12537; the cyclic groups of Merrill et al. 2024,
    arXiv:2404.08819): the answer at every token is the sum of all tokens so far, modulo `modulus`. It is state
    tracking: one token changes all later answers. Past the training length, transitions with eigenvalues in [0, 1]
    (Mamba, linear attention) fail at any modulus; real diagonal ones with negative eigenvalues reach 2, and more
    needs rotations.

    modulus: of the count, and the number of tokens.
    """

    modulus: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modulus < 2:
            raise UserError(f"{self.name}: modulus is {self.modulus}; it must be at least 2")

    @property
    def shortest(self) -> int:
        return 1

    @property
    def vocab_size(self) -> int:
        return self.modulus

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def fill(self, tokens: Tensor, targets: Tensor, random: Generator) -> None:
        tokens.copy_(torch.randint(self.modulus, tokens.shape, generator=random))
        targets.copy_(tokens.cumsum(1) % self.modulus)


@dataclass(frozen=True)
class Parity(ModularCounting):
    """Parity of the bits so far (Hahn 2020, arXiv:1906.06755; Grazzi et al. 2024, arXiv:2411.12537): modular counting
    with modulus 2. One channel whose transition is -1 or 1 by the token solves it at every length; softmax
    attention of a fixed depth loses its margin as the length grows.
    """

    modulus: int = 2


@dataclass(frozen=True)
class Needle(Task):
    """Needle in a haystack (Kamradt 2023; RULER, Hsieh et al. 2024, arXiv:2404.06654): a marker (token 0) and a few
    digits, hidden among random other tokens, are asked for at the end: the marker comes again, then the digits,
    each the answer at the token before it. Run at lengths past training, it asks how far back a model still finds
    what it was told.

    digits: tokens of the needle. depth: where it lies, from 0 (the beginning) to 1 (just before the question); or
    distance: how many tokens before the token at which it is asked for each digit lies, at least `digits`; any place
    where neither is given. vocabulary: different digits, and as many tokens of hay.
    """

    digits: int = 4
    depth: float | None = None
    distance: int | None = None
    vocabulary: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise UserError(f"{self.name}: depth is {self.depth}; it must be between 0 and 1")
        if self.distance is not None and self.depth is not None:
            raise UserError(f"{self.name}: give depth or distance, not both")
        if self.distance is not None and self.distance < self.digits:
            raise UserError(
                f"{self.name}: distance is {self.distance}; with {self.digits} digits it must be at least {self.digits}"
            )

    @property
    def shortest(self) -> int:
        return self.digits + 1 + (self.distance or self.digits)

    @property
    def vocab_size(self) -> int:
        return 1 + 2 * self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / self.vocabulary

    def fill(self, tokens: Tensor, targets: Tensor, random: Generator) -> None:
        (batch, length), n, v = tokens.shape, self.digits, self.vocabulary
        tokens.copy_(torch.randint(1 + v, 1 + 2 * v, tokens.shape, generator=random))
        digits = torch.randint(1, 1 + v, (batch, n), generator=random)
        needle = torch.cat([torch.zeros(batch, 1, dtype=torch.long), digits], 1)
        last = length - 2 * n - 1  # place for the needle's marker
        if self.distance is not None:
            place = torch.full((batch, 1), last + n - self.distance)
        elif self.depth is not None:
            place = torch.full((batch, 1), round(self.depth * last))
        else:
            place = torch.randint(last + 1, (batch, 1), generator=random)
        tokens.scatter_(1, place + torch.arange(n + 1), needle)
        tokens[:, -n:], targets[:, -n:] = needle[:, :-1], digits


TASKS: dict[str, type[Task]] = {
    "mqar": MQAR,
    "induction": Induction,
    "selective_copying": SelectiveCopying,
    "parity": Parity,
    "modular_counting": ModularCounting,
    "needle": Needle,
}


def make_task(where: str, spec: str | Mapping[str, Any]) -> Task:
    """The task that a name or a mapping {name: ..., **knobs} stands for; errors name `where` it stands."""
    knobs = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = knobs.pop("name", None)
    if name not in TASKS:
        raise UserError(f"{where}: there is no task {name!r}; {nearest(str(name), TASKS)}")
    hints = get_type_hints(TASKS[name])
    check_keys(f"{where} ({name})", knobs, [field.name for field in fields(TASKS[name])])
    for key, value in knobs.items():
        check_type(f"{where}.{key}", value, hints[key])
    return TASKS[name](**knobs)


def _distinct(batch: int, n: int, k: int, random: Generator) -> Tensor:
    """[B, k] different numbers below n, in random order."""
    return torch.rand(batch, n, generator=random).argsort(1)[:, :k]
