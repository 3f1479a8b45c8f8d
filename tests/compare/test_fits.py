"""Exponents and crossovers of points made up, whose true values are known."""

import random
from math import exp, inf, log

import pytest
from scipy import stats

from subquad.compare.fits import crossover, crossovers, exponent_of, fit, fits, student
from subquad.compare.results import Measurements, Point

LENGTHS = [1024, 2048, 4096, 8192, 16384, 32768]


def points(ms, subject="Ours", phase="prefill", kind="layer", lengths=LENGTHS, spread=1.0):
    """ms: of a length; the quartiles are `spread` times less and more."""
    return [Point(subject, kind, phase, n, ms(n), ms(n) / spread, ms(n) * spread) for n in lengths]


def measured(*groups):
    return Measurements("subquad", "2026-01-31", {}, {}, {}, [p for group in groups for p in group])


def dense(spread=1.0):
    return points(lambda n: 1e-6 * n**2, "Attention", spread=spread)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 9, 30])
def test_students_t(freedom):
    assert student(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-6)


def test_the_interval_holds_the_exponent_as_often_as_it_says():
    """And agrees with scipy's line."""
    draw = random.Random(1)
    x = [log(n) for n in LENGTHS]
    inside = 0
    for _ in range(600):
        true, noise = draw.uniform(0, 2), draw.uniform(0.01, 0.2)
        y = [true * a + draw.gauss(0, noise) for a in x]
        found, low, high = exponent_of(x, y)
        inside += low <= true <= high
    assert 0.92 <= inside / 600 <= 0.98
    expected = stats.linregress(x, y)
    assert found == pytest.approx(expected.slope)
    assert high - found == pytest.approx(stats.t.ppf(0.975, 4) * expected.stderr)


def test_short_lengths_are_left_out_where_there_are_enough():
    """A constant cost that hides the square in the short ones."""
    found = fit(points(lambda n: max(4e6, n**2 / 4)), "ms")
    assert found.lengths == (4096, 8192, 16384, 32768)
    assert found.exponent == pytest.approx(2, abs=1e-9)
    assert found.low <= 2 <= found.high
    few = fit(points(lambda n: 3 * n, lengths=[16, 32, 64, 128]), "ms")
    assert (few.lengths, round(few.exponent, 6)) == ((32, 64, 128), 1.0)


def test_decoding_is_fitted_over_all_contexts():
    found = fit(points(lambda n: 0.5, phase="decode"), "ms")
    assert found.lengths == tuple(LENGTHS)
    assert found.low == found.exponent == found.high == 0


def test_without_three_figures_there_is_no_fit():
    some = points(lambda n: n)
    nothing = [Point("Ours", "layer", "prefill", n, note="does not fit") for n in LENGTHS]
    assert fit([*some[:2], *nothing[2:]], "ms") is None
    assert fit([*some[:3], *nothing[3:]], "ms").lengths == (1024, 2048, 4096)
    assert fit([], "ms") is None
    assert fit(some, "state_bytes") is None


def test_fits_of_measurements():
    found = fits(measured(points(lambda n: n, kind="op"), dense(), points(lambda n: 1, "Ours", "decode")))
    assert [(f.subject, f.kind, f.phase, f.quantity, round(f.exponent, 6)) for f in found] == [
        ("Attention", "layer", "prefill", "ms", 2.0),
        ("Ours", "layer", "decode", "ms", 0.0),
        ("Ours", "op", "prefill", "ms", 1.0),
    ]


def test_a_crossover_is_found_where_the_curves_cross():
    found = crossover(points(lambda n: 5e-3 * n, spread=1.1), dense(1.1))
    assert (found.subject, found.phase, found.against) == ("Ours", "prefill", "Attention")
    assert found.tokens == pytest.approx(5000, rel=1e-3)
    assert found.low < 5000 < found.high
    assert found.note == ""
    exact = crossover(points(lambda n: 5e-3 * n), dense())
    assert exact.low == exact.high == exact.tokens
    assert found.high / found.low < crossover(points(lambda n: 5e-3 * n, spread=1.3), dense(1.3)).high / found.low


def test_the_interval_of_a_crossover_holds_it_as_often_as_it_says():
    draw = random.Random(2)
    noise, inside = 0.1, 0
    quartile = exp(noise * stats.norm.ppf(0.75))
    for _ in range(60):
        ours = points(lambda n: 5e-3 * n * exp(draw.gauss(0, noise)))
        theirs = [Point("Attention", "layer", "prefill", n, 1e-6 * n**2 * exp(draw.gauss(0, noise))) for n in LENGTHS]
        both = [
            [Point(p.subject, p.kind, p.phase, p.tokens, p.ms, p.ms / quartile, p.ms * quartile) for p in group]
            for group in (ours, theirs)
        ]
        found = crossover(*both)
        inside += found.low <= 5000 <= (inf if found.high is None else found.high)
    assert inside >= 0.85 * 60


def test_always_and_never():
    below = crossover(points(lambda n: 1e-7 * n**2, spread=1.1), dense(1.1))
    assert (below.tokens, below.note) == (None, "always below")
    above = crossover(points(lambda n: 2e-6 * n**2), dense())
    assert (above.tokens, above.low, above.high, above.note) == (None, None, None, "never up to 32,768")
    far = crossover(points(lambda n: 3e7 * n), dense())
    assert (far.tokens, far.note) == (None, "never up to 32,768")


def test_past_the_longest_length_it_is_extrapolated_and_said_so():
    found = crossover(points(lambda n: 0.1 * n, spread=1.1), dense(1.1))
    assert found.tokens == pytest.approx(100_000, rel=1e-3)
    assert found.low < 100_000 < found.high
    assert found.note == "extrapolated"


def test_the_last_of_several_crossings_counts():
    ours = points(lambda n: 1e-6 * n**2 * {1024: 0.5, 2048: 2, 4096: 0.5, 8192: 2}.get(n, 0.5))
    assert 8192 < crossover(ours, dense()).tokens < 16384


def test_only_lengths_that_both_have_are_compared():
    ours = points(lambda n: 5e-3 * n)
    found = crossover(ours, dense()[:2])
    assert found.note == "extrapolated"
    assert crossover(ours, dense()[:1]).note == "fewer than two lengths to compare"


def test_crossovers_of_measurements():
    found = crossovers(measured(points(lambda n: 5e-3 * n), dense(), points(lambda n: 1, kind="op")))
    assert [(c.subject, c.phase) for c in found] == [("Ours", "prefill")]
    assert crossovers(measured(points(lambda n: n))) == []
