"""What a measured cost is at a length that was not measured."""

from collections.abc import Sequence
from math import log
from statistics import median
from typing import Literal, NamedTuple

from subquad.compare.fits import FEWEST, exponent_of, fit, line
from subquad.compare.results import Point

Known = Sequence[tuple[int, float]]  # (length, figure), shortest first


class Prediction(NamedTuple):
    """A figure, its range where an exponent's interval gives one, and how it comes from what was measured."""

    value: float
    low: float
    high: float
    how: str  # "measured", "between 1,024 and 2,048", "extrapolated from 8,192 as T^1.93"

    @property
    def extrapolated(self) -> bool:
        return self.how.startswith("extrapolated")

    def times(self, factor: float) -> "Prediction":
        return Prediction(factor * self.value, factor * self.low, factor * self.high, self.how)


def predict(points: Sequence[Point], quantity: Literal["ms", "peak_bytes"], tokens: int) -> Prediction | None:
    """The figure at `tokens` from one subject's points in one phase; None where too few lengths have one.

    Between two lengths on the straight line between their logarithms; past them from the longest one as the power of
    the length that `subquad.compare.fits` finds, of at least 1 where all tokens are read; below them as that of the
    three shortest, of at least 0.
    """
    known = [(p.tokens, float(y)) for p in points if (y := getattr(p, quantity))]
    if (within := interpolate(known, tokens)) is not None or len(known) < FEWEST:
        return within
    if tokens > known[-1][0]:
        (origin, figure), fitted = known[-1], fit(points, quantity)
        assert fitted is not None
        powers = fitted.exponent, fitted.low, fitted.high
        least = 0.0 if points[0].phase == "decode" else 1.0
    else:
        (origin, figure), near, least = known[0], known[:FEWEST], 0.0
        powers = exponent_of([log(n) for n, _ in near], [log(y) for _, y in near])
    value, *ends = (figure * (tokens / origin) ** max(power, least) for power in powers)
    return Prediction(value, min(ends), max(ends), f"extrapolated from {origin:,} as T^{max(powers[0], least):.2f}")


def predict_step(points: Sequence[Point], tokens: int, *, grows: bool) -> Prediction | None:
    """The time of a decoded token, which beyond the measured contexts follows the line through the nearest three.

    Where the state does not grow with the context the time does not either: it is the median of all that were measured.
    """
    known = [(p.tokens, p.ms) for p in points if p.ms]
    if (within := interpolate(known, tokens)) is not None or not known:
        return within
    if not grows:
        times = [ms for _, ms in known]
        return Prediction(median(times), min(times), max(times), "extrapolated: its state does not grow")
    if len(known) < FEWEST:
        return None
    near, (origin, ms) = (known[-FEWEST:], known[-1]) if tokens > known[-1][0] else (known[:FEWEST], known[0])
    slope = max(line(*zip(*near, strict=True))[0], 0.0)
    value = ms + (slope if tokens > origin else min(slope, ms / origin)) * (tokens - origin)
    return Prediction(value, value, value, f"extrapolated from {origin:,} along a line")


def interpolate(known: Known, tokens: int) -> Prediction | None:
    """At a measured length or between two, else None."""
    figures = dict(known)
    if tokens in figures:
        return Prediction(figures[tokens], figures[tokens], figures[tokens], "measured")
    after = sum(length < tokens for length, _ in known)
    if not 0 < after < len(known):
        return None
    (a, low), (b, high) = known[after - 1], known[after]
    value = low * (high / low) ** (log(tokens / a) / log(b / a))
    return Prediction(value, value, value, f"between {a:,} and {b:,}")
