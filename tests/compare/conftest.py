"""Measured costs, made up, for the tests of what is drawn and written from them."""

from collections.abc import Sequence

import pytest

from subquad.compare.results import Measurements, Phase, Point

PHASES: tuple[Phase, ...] = ("train", "prefill", "decode")


@pytest.fixture
def made_up():
    return measurements


def measurements(subjects: Sequence[str], lengths: Sequence[int] = (1024, 4096, 16384)) -> Measurements:
    """Every subject costs a little more than the one before; attention is quadratic and does not fit at the last."""
    points = []
    for i, subject in enumerate(subjects, 1):
        dense = subject == "Attention"
        for phase in PHASES:
            for n in lengths:
                if dense and phase == "train" and n == lengths[-1]:
                    points.append(Point(subject, "layer", phase, n, note="does not fit: needs about 38 GB"))
                    continue
                ms = i * (n / 1000) ** (2 if dense else 1) if phase != "decode" else i * (n / 1000 if dense else 1)
                state = None if phase == "train" else 512 * n if dense else 4096 * i
                peak = 1000 * n * i if phase == "train" else None
                points.append(Point(subject, "layer", phase, n, ms, 0.9 * ms, 1.1 * ms, 1000 * n, 100 * n, peak, state))
    return Measurements(
        command="subquad compare complexity --layers <b>all</b> --html cost.html",
        created="2026-01-31",
        machine={"device": "cpu", "name": "Example & Sons <i>CPU</i>", "threads": 2, "memory_bytes": 24 * 10**9},
        versions={"subquad": "0.1.0", "torch": "2.13.0", "triton": None, "python": "3.11.7"},
        settings={"d_model": 256, "batch": 1, "dtype": "float32", "repeat": 3},
        points=points,
    )
