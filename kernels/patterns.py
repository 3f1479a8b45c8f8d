"""Declared sparse patterns: which keys a query reads, known from positions alone.

A pattern is a tuple of parts whose edges are united. Each part says the same thing twice: `reads`, a mask of query and
key positions that is the specification, and `keys`, the few key positions that a tile of queries may need, by which the
fast form finds them. From its parts a causal pattern also knows what a cache must keep.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from inspect import signature
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.errors import UserError, nearest


class Far(NamedTuple):
    """The positions a cache keeps for ever: the last `width` of every `stride`."""

    stride: int
    width: int

    def holds(self, at: Tensor) -> Tensor:
        return at % self.stride >= self.stride - self.width

    def slot(self, at: Tensor) -> Tensor:
        """The slot of a position that it holds."""
        return at // self.stride * self.width + at % self.stride - (self.stride - self.width)

    def positions(self, end: int, device: torch.device) -> Tensor:
        """Those below `end` or just past it, in order."""
        groups = torch.arange(-(-end // self.stride), device=device)[:, None] * self.stride
        return (groups + torch.arange(self.stride - self.width, self.stride, device=device)).flatten()


@dataclass(frozen=True)
class Part:
    """Some of a pattern's edges. Masks and positions broadcast: head, query and key are integer tensors.

    A tile is `size` queries `spacing` tokens apart; `keys` gives what those from position `first` on may read.
    """

    per_head = False  # heads read different keys, so each gathers its own

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            low = 0 if name in ("n_before", "beyond", "seed") else 1
            for number in value if isinstance(value, tuple) else (value,):
                if type(number) is not int or number < low:
                    raise UserError(f"{type(self).__name__}: {name} is {value!r}; it must be an integer from {low} on")

    @property
    def reach(self) -> int:
        """How many of the last tokens a causal query can read, itself included."""
        return 0

    @property
    def first(self) -> int:
        """How many of the first tokens every query can read."""
        return 0

    @property
    def far(self) -> Far | None:
        """What stays readable for ever, where that is more than the first tokens."""
        return None

    def split(self, n_heads: int, causal: bool) -> list[tuple[list[int], "Part"]]:
        """The part as pieces in which all the given heads read alike."""
        return [(list(range(n_heads)), self)]

    def tile(self, time: int) -> tuple[int, int]:
        """(size, spacing) of the tiles that suit `time` queries."""
        return 64, 1

    def limit(self) -> int | None:
        """The queries from this position on read nothing."""
        return None

    def reads(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        raise NotImplementedError

    def keys(self, head: Tensor, first: Tensor, size: int, end: int, causal: bool) -> Tensor:
        """Key positions [M, L] (per head: [M, H, L]) for tiles that start at `first` [M]; negative ones are none.

        end: no position is beyond it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Window(Part):
    """|query - key| < window (Longformer: Beltagy et al. 2020, arXiv:2004.05150)."""

    window: int

    @property
    def reach(self) -> int:
        return self.window

    def tile(self, time: int) -> tuple[int, int]:
        return min(max(32, self.window), 128), 1

    def reads(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() < self.window

    def keys(self, head: Tensor, first: Tensor, size: int, end: int, causal: bool) -> Tensor:
        last = size if causal else size + self.window - 1
        return first[:, None] + torch.arange(1 - self.window, last, device=first.device)


@dataclass(frozen=True)
class DilatedWindow(Part):
    """`window` tokens, `dilation` apart; one dilation for all heads or one for each (Longformer, section 3.1)."""

    window: int
    dilation: int | tuple[int, ...]

    @property
    def reach(self) -> int:
        largest = self.dilation if isinstance(self.dilation, int) else max(self.dilation)
        return (self.window - 1) * largest + 1

    def split(self, n_heads: int, causal: bool) -> list[tuple[list[int], Part]]:
        if isinstance(self.dilation, int):
            return super().split(n_heads, causal)
        if len(self.dilation) != n_heads:
            raise UserError(f"DilatedWindow: {len(self.dilation)} dilations for {n_heads} heads; give one a head")
        return [
            ([h for h in range(n_heads) if self.dilation[h] == d], replace(self, dilation=d))
            for d in sorted(set(self.dilation))
        ]

    def tile(self, time: int) -> tuple[int, int]:
        return min(max(16, self.window), 64, -(-time // self.dilation)), self.dilation

    def reads(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        d = self.dilation if isinstance(self.dilation, int) else torch.tensor(self.dilation, device=key.device)[head]
        gap = (query - key).abs()
        return (gap % d == 0) & (gap < self.window * d)

    def keys(self, head: Tensor, first: Tensor, size: int, end: int, causal: bool) -> Tensor:
        last = size if causal else size + self.window - 1
        return first[:, None] + torch.arange(1 - self.window, last, device=first.device) * self.dilation


@dataclass(frozen=True)
class LocalBlocks(Part):
    """The query's own block and the `n_before` before it; without causality as many after it."""

    block: int
    n_before: int = 0

    @property
    def reach(self) -> int:
        return (self.n_before + 1) * self.block

    def tile(self, time: int) -> tuple[int, int]:
        return self.block, 1

    def reads(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query // self.block - key // self.block).abs() <= self.n_before

    def keys(self, head: Tensor, first: Tensor, size: int, end: int, causal: bool) -> Tensor:
        start = (first // self.block - self.n_before) * self.block
        length = (self.n_before + 1 + (0 if causal else self.n_before)) * self.block
        return start[:, None] + torch.arange(length, device=first.device)


@dataclass(frozen=True)
class GlobalTokens(Part):
    """The first `n` tokens are read by all; without causality they also read everything."""

    n: int

    @property
    def first(self) -> int:
        return self.n

    def split(self, n_heads: int, causal: bool) -> list[tuple[list[int], Part]]:
        heads = list(range(n_heads))
        return [(heads, self)] if causal else [(heads, self), (heads, GlobalQueries(self.n))]

    def tile(self, time: int) -> tuple[int, int]:
        return 128, 1

    def reads(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key < self.n) | (query < self.n)

    def keys(self, head: Tensor, first: Tensor, size: int, end: int, causal: bool) -> Tensor:
        return torch.arange(self.n, device=first.device).expand(len(first), -1)


@dataclass(frozen=True)
class GlobalQueries(Part):
    """What the first `n` tokens read of a whole sequence."""

    n: int

    def tile(self, time: int) -> tuple[int, int]:
        return min(self.n, 128), 1

    def limit(self) -> int | None:
        return self.n

    def reads(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query < self.n) & (key >= self.n)

    def keys(self, head: Tensor, first: Tensor, size: int, end: int, causal: bool) -> Tensor:
        return torch.arange(min(self.n, end), end, device=first.device).expand(len(first), -1)


@dataclass(frozen=True)
class RandomBlocks(Part):
    """`n_blocks` random blocks of the `span` before the query's block, the nearest `beyond` of them left out.

    BigBird (Zaheer et al. 2020, arXiv:2007.14062) draws from the whole sequence; here the draw is a pure function of
    (seed, head, query block) and from a bounded neighbourhood, so a prefix never depends on the length and a cache can
    drop what lies behind the span. Without causality the blocks after the query's own may be drawn too.
    """

    block: int
    n_blocks: int = 3
    span: int = 32
    beyond: int = 0
    seed: int = 0

    per_head = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_blocks > self.span - self.beyond:
            raise UserError(
                f"RandomBlocks: n_blocks is {self.n_blocks}; at most span - beyond = {self.span - self.beyond} differ"
            )

    @property
    def reach(self) -> int:
        return (self.span + 1) * self.block

    def tile(self, time: int) -> tuple[int, int]:
        return self.block, 1

    def draw(self, head: Tensor, query_block: Tensor, causal: bool) -> Tensor:
        """The blocks drawn, [..., n_blocks]; negative ones are none."""
        offset = torch.arange(self.beyond + 1, self.span + 1, device=query_block.device)
        offset = -offset if causal else torch.cat([-offset, offset])
        candidate = query_block[..., None] + offset
        score = _hash(self.seed, head[..., None], query_block[..., None], offset)
        score = torch.where(candidate < 0, -1, score)
        best, index = score.topk(self.n_blocks, -1)
        return torch.where(best < 0, -1, candidate.gather(-1, index))

    def reads_blocks(self, head: Tensor, query: Tensor, key: Tensor, causal: bool) -> Tensor:
        head, block = torch.broadcast_tensors(head, query // self.block)
        drawn = self.draw(head, block, causal)
        key = key // self.block
        found = (drawn[..., 0] == key) & (key >= 0)
        for i in range(1, self.n_blocks):
            found = found | ((drawn[..., i] == key) & (key >= 0))
        return found

    def reads(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        raise TypeError("RandomBlocks draws by causality; ask its pattern")

    def keys(self, head: Tensor, first: Tensor, size: int, end: int, causal: bool) -> Tensor:
        head, block = torch.broadcast_tensors(head, first[:, None] // self.block)
        inner = torch.arange(self.block, device=first.device)
        return (self.draw(head, block, causal)[..., None] * self.block + inner).flatten(-2)


def _hash(seed: int, *keys: Tensor) -> Tensor:
    """Well-mixed integers in [0, 2^31), the same on every device (xorshift-multiply rounds within 63 bits)."""
    x = torch.full((), 0x2545F491 + seed * 7919 & 0x7FFFFFFF, dtype=torch.int64, device=keys[0].device)
    for key in keys:
        x = (x ^ (key & 0x7FFFFFFF)) * 0x45D9F3B & 0x7FFFFFFF
        x = (x ^ (x >> 15)) * 0x2C1B3C6D & 0x7FFFFFFF
        x = x ^ (x >> 13)
    return x


@dataclass(frozen=True)
class Strided(Part):
    """Every `stride`-th token counted from the query (Sparse Transformer: Child et al. 2019, arXiv:1904.10509).

    Each token is read again by some later one, so a cache keeps them all; `Summaries` keeps a fixed share.
    """

    stride: int

    @property
    def far(self) -> Far | None:
        return Far(1, 1)

    def tile(self, time: int) -> tuple[int, int]:
        return min(64, -(-time // self.stride)), self.stride

    def reads(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key) % self.stride == 0

    def keys(self, head: Tensor, first: Tensor, size: int, end: int, causal: bool) -> Tensor:
        return first[:, None] % self.stride + torch.arange(0, end, self.stride, device=first.device)


@dataclass(frozen=True)
class Summaries(Part):
    """The last `width` tokens of every `stride` ("fixed" in the Sparse Transformer): a cache keeps that share."""

    stride: int
    width: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width > self.stride:
            raise UserError(f"Summaries: width is {self.width}; it must be at most stride = {self.stride}")

    @property
    def far(self) -> Far | None:
        return Far(self.stride, self.width)

    def reads(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key % self.stride >= self.stride - self.width

    def keys(self, head: Tensor, first: Tensor, size: int, end: int, causal: bool) -> Tensor:
        return Far(self.stride, self.width).positions(end, first.device).expand(len(first), -1)


@dataclass(frozen=True)
class SparsePattern:
    """The union of some parts, of what is not after the query if causal.

    An edge belongs to the first part that reads it; parts that read what is kept for ever come last.
    """

    parts: tuple[Part, ...]
    causal: bool = True

    def __post_init__(self) -> None:
        if not any(isinstance(p, Window | DilatedWindow | LocalBlocks | Strided) for p in self.parts):
            raise UserError(
                "a sparse pattern needs a part in which every token reads itself: window, dilated_window, local_blocks "
                "or strided"
            )
        object.__setattr__(self, "parts", tuple(sorted(self.parts, key=lambda part: part.far is not None)))

    @property
    def first(self) -> int:
        return max(p.first for p in self.parts)

    @property
    def ring(self) -> int:
        """How many of the last tokens a cache keeps."""
        return max(1, *(p.reach for p in self.parts))

    @property
    def far(self) -> Far | None:
        kept = {p.far for p in self.parts} - {None}
        return kept.pop() if len(kept) == 1 else Far(1, 1) if kept else None

    def part_reads(self, part: Part, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if isinstance(part, RandomBlocks):
            return part.reads_blocks(head, query, key, self.causal)
        return part.reads(head, query, key)

    def reads(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """The specification: whether `head` at position `query` reads position `key`; the tensors broadcast."""
        return self._united(self.parts, head, query, key)

    def reads_far(self, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Which of these edges belong to a part that reads what is kept for ever."""
        near = self._united([p for p in self.parts if p.far is None], head, query, key)
        return self.reads(head, query, key) & ~near

    def _united(self, parts: Sequence[Part], head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        found = key <= query if self.causal else torch.ones_like(key <= query)
        return found & reduce(or_, [self.part_reads(p, head, query, key) for p in parts], torch.zeros_like(found))

    def edges(self, time: int, n_heads: int) -> int:
        """How many (head, query, key) are read in a sequence of `time` tokens."""
        head, at = torch.arange(n_heads)[:, None, None], torch.arange(time)
        return sum(
            int(self.reads(head, rows[:, None], at).expand(n_heads, len(rows), time).sum()) for rows in at.split(256)
        )


def longformer(*, window: int = 128, n_global: int = 4) -> tuple[Part, ...]:
    """A window and global tokens (Beltagy et al. 2020, arXiv:2004.05150)."""
    return Window(window), GlobalTokens(n_global)


def bigbird(
    *, block: int = 32, n_before: int = 1, n_random: int = 3, span: int = 32, n_global: int = 32, seed: int = 0
) -> tuple[Part, ...]:
    """Neighbouring blocks, global tokens and random blocks (Zaheer et al. 2020, arXiv:2007.14062)."""
    return (
        LocalBlocks(block, n_before),
        GlobalTokens(n_global),
        RandomBlocks(block, n_random, span, beyond=n_before, seed=seed),
    )


def sparse_transformer(*, stride: int = 64, width: int = 4) -> tuple[Part, ...]:
    """The own block of `stride` tokens and the last `width` of every block ("fixed", Child et al. 2019)."""
    return LocalBlocks(stride), Summaries(stride, width)


def sparse_transformer_strided(*, stride: int = 64) -> tuple[Part, ...]:
    """The last `stride` tokens and every `stride`-th ("strided", Child et al. 2019)."""
    return Window(stride), Strided(stride)


_NAMED: dict[str, Callable[..., Any]] = {
    "window": Window,
    "dilated_window": DilatedWindow,
    "local_blocks": LocalBlocks,
    "global_tokens": GlobalTokens,
    "random_blocks": RandomBlocks,
    "strided": Strided,
    "summaries": Summaries,
    "longformer": longformer,
    "bigbird": bigbird,
    "sparse_transformer": sparse_transformer,
    "sparse_transformer_strided": sparse_transformer_strided,
}


def make_pattern(spec: str | Mapping[str, Any] | Sequence[Any], causal: bool) -> SparsePattern:
    """A pattern from a name, a mapping {name: ..., **arguments}, a part, or a list of those."""
    parts: list[Part] = []
    for item in [spec] if isinstance(spec, str | Mapping) else spec:
        if isinstance(item, Part):
            parts.append(item)
            continue
        arguments = {"name": item} if isinstance(item, str) else dict(item)
        name = arguments.pop("name", None)
        if name not in _NAMED:
            raise UserError(f"there is no sparse pattern {name!r}; {nearest(str(name), _NAMED)}")
        known = signature(_NAMED[name]).parameters
        for key in arguments:
            if key not in known:
                raise UserError(f"the sparse pattern {name} has no argument {key!r}; {nearest(str(key), known)}")
        missing = [key for key, p in known.items() if p.default is p.empty and key not in arguments]
        if missing:
            raise UserError(f"the sparse pattern {name} needs {', '.join(missing)}")
        made = _NAMED[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()})
        parts += made if isinstance(made, tuple) else [made]
    return SparsePattern(tuple(parts), causal)
