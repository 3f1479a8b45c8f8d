"""How measured costs grow with length, and from where on a layer costs less than dense attention."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import atan, cos, exp, inf, log, pi, sin, sqrt
from statistics import NormalDist, mean
from typing import Literal

from subquad.compare.results import PHASES, Kind, Measurements, Phase, Point

Quantity = Literal["ms", "flops", "bytes", "peak_bytes", "state_bytes"]
QUANTITIES: tuple[Quantity, ...] = ("ms", "flops", "bytes", "peak_bytes", "state_bytes")
REFERENCE = "Attention"
SHORTEST = 4096  # of the lengths that are fitted: below, what does not grow with the length is much of the time
FEWEST = 3  # points of a fit
DRAWS = 1000
FAR = 64  # times the longest length: how far a crossover is extrapolated


@dataclass(frozen=True)
class Fit:
    """quantity ~ tokens^exponent, by least squares of logarithm on logarithm; low, high: its 95 % interval."""

    subject: str
    kind: Kind
    phase: Phase
    quantity: Quantity
    exponent: float
    low: float
    high: float
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Crossover:
    """The length from which on a subject takes less time than `against`.

    None where there is none: `note` then says "always below", "never up to 32,768" or why there is nothing to compare,
    and with a length "extrapolated" where it lies past those measured. low, high: 95 % of what the spread of the
    repeats allows; low 0 where it may always be below, high None where it may never be.
    """

    subject: str
    phase: Phase
    against: str
    tokens: int | None
    low: int | None
    high: int | None
    note: str
    kind: Kind = "layer"


def fits(measurements: Measurements) -> list[Fit]:
    """Of every subject, kind, phase and quantity that has figures for three lengths or more."""
    found = []
    for kind in ("layer", "op", "model"):
        for phase in PHASES:
            for subject in measurements.subjects(kind):
                points = list(measurements.select(kind, phase, subject))
                found += [f for quantity in QUANTITIES if (f := fit(points, quantity)) is not None]
    return found


def fit(points: Sequence[Point], quantity: Quantity) -> Fit | None:
    """Of the points from 4,096 tokens on, or of the three longest; None where there are not as many.

    A decoded token is fitted over all contexts: what does not grow with them is what there is to see.
    """
    known = [(p.tokens, y) for p in points if (y := getattr(p, quantity))]
    long = [(tokens, y) for tokens, y in known if tokens >= SHORTEST]
    first = points[0] if points else None
    if first is None or len(known) < FEWEST:
        return None
    used = known if first.phase == "decode" else long if len(long) >= FEWEST else known[-FEWEST:]
    exponent, low, high = exponent_of([log(tokens) for tokens, _ in used], [log(y) for _, y in used])
    lengths = tuple(tokens for tokens, _ in used)
    return Fit(first.subject, first.kind, first.phase, quantity, exponent, low, high, lengths)


def exponent_of(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Of the line of least squares, and the ends of its 95 % interval by Student's t."""
    found, offset = line(x, y)
    left = sum((b - offset - found * a) ** 2 for a, b in zip(x, y, strict=True))
    freedom, middle = len(x) - 2, mean(x)
    half = student(freedom) * sqrt(left / freedom / sum((a - middle) ** 2 for a in x))
    return found, found - half, found + half


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and offset of the line of least squares."""
    middle_x, middle_y = mean(x), mean(y)
    slope = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True)) / sum(
        (a - middle_x) ** 2 for a in x
    )
    return slope, middle_y - slope * middle_x


def student(freedom: int, inside: float = 0.95) -> float:
    """The t within +- which so much of Student's distribution lies, by bisection."""
    low, high = 0.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < inside else (low, middle)
    return high


def _within(t: float, freedom: int) -> float:
    """P(|T| < t) (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = atan(t / sqrt(freedom))
    odd = freedom % 2
    term = cos(angle) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for n in range(2 + odd, freedom - 1, 2):
        term *= cos(angle) ** 2 * (n - 1) / n
        total += term
    return 2 / pi * (angle + sin(angle) * total) if odd else sin(angle) * total


def crossovers(measurements: Measurements, kind: Kind = "layer", against: str = REFERENCE) -> list[Crossover]:
    """Of every other subject and every phase; none where `against` was not measured."""
    if against not in measurements.subjects(kind):
        return []
    found = []
    for phase in PHASES:
        reference = list(measurements.select(kind, phase, against))
        for subject in measurements.subjects(kind):
            points = list(measurements.select(kind, phase, subject))
            if subject != against and points:
                found.append(crossover(points, reference))
    return found


def crossover(points: Sequence[Point], reference: Sequence[Point]) -> Crossover:
    """Where the curve of `points` falls below that of `reference` for good, log on log and straight between points."""
    other = {p.tokens: p for p in reference if p.ms}
    pairs = [(p, other[p.tokens]) for p in points if p.ms and p.tokens in other]
    about = points[0].subject, points[0].phase, reference[0].subject
    if len(pairs) < 2:
        return Crossover(*about, None, None, None, "fewer than two lengths to compare", points[0].kind)
    lengths = [p.tokens for p, _ in pairs]
    ratios = [log(p.ms / r.ms) for p, r in pairs]
    found = _falls_below(lengths, ratios)
    draw = random.Random(0)
    spreads = [sqrt(_spread(p) ** 2 + _spread(r) ** 2) for p, r in pairs]
    drawn = sorted(
        _falls_below(lengths, [draw.gauss(y, s) for y, s in zip(ratios, spreads, strict=True)]) for _ in range(DRAWS)
    )
    low, high = drawn[round(0.025 * DRAWS)], drawn[round(0.975 * DRAWS) - 1]
    if found == 0:
        note = "always below"
    elif found == inf:
        note = f"never up to {lengths[-1]:,}"
    else:
        note = "extrapolated" if found > lengths[-1] else ""
    tokens = round(found) if 0 < found < inf else None
    return Crossover(
        *about, tokens, round(low) if low < inf else None, round(high) if high < inf else None, note, points[0].kind
    )


def _spread(point: Point) -> float:
    """The standard deviation of the logarithm of the time, from the quartiles of the repeats."""
    if not (point.low_ms and point.high_ms):
        return 0.0
    return log(point.high_ms / point.low_ms) / (2 * NormalDist().inv_cdf(0.75))


def _falls_below(lengths: Sequence[int], ratios: Sequence[float]) -> float:
    """Where the logarithm of the ratio falls below 0 for good: 0 if it is nowhere above, inf if it does not.

    Past the longest length it goes on along the line of least squares through the last three.
    """
    x = [log(n) for n in lengths]
    if ratios[-1] >= 0:
        falls, _ = line(x[-FEWEST:], ratios[-FEWEST:])
        where = x[-1] - ratios[-1] / falls if falls < 0 else inf
        return exp(where) if where <= x[-1] + log(FAR) else inf
    for (a, above), (b, below) in reversed(list(pairwise(zip(x, ratios, strict=True)))):
        if above >= 0 > below:
            return exp(a + (b - a) * above / (above - below))
    return 0.0
