"""Known results of recall and state tracking, and what runs of `subquad compare recall` say to them.

A configuration of that command may hold a claim:

    claim:
      says: the claim in a sentence
      paper: where it was made
      x: what the figure's lines run along: "state_bytes", "length" or a knob of the tasks or of the variants
      test: {name: one of TESTS, its arguments}

A line of the figure is a label of the configuration's layers. The verdict is worked out from the runs by the test.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, get_type_hints

from subquad.errors import UserError, nearest
from subquad.layers.build import check_keys, check_type


@dataclass(frozen=True)
class Point:
    """Accuracy of the runs of one line at one x, over the seeds."""

    x: float
    mean: float
    least: float
    greatest: float
    seeds: int


Lines = Mapping[str, Sequence[Point]]  # by label, each in order of x


@dataclass(frozen=True)
class Claim:
    """See the module. `name`: of the configuration."""

    name: str
    says: str
    paper: str
    x: str
    test: Mapping[str, Any]

    @classmethod
    def from_dict(cls, name: str, values: Any, labels: Sequence[str], axes: Sequence[str]) -> "Claim":
        """From a configuration whose layers have these labels and whose runs can be drawn along these axes."""
        where = f"{name}: claim"
        check_type(where, values, dict)
        check_keys(where, values, ["says", "paper", "x", "test"])
        for key, hint in {"says": str, "paper": str, "x": str, "test": dict}.items():
            if key not in values:
                raise UserError(f"{where} has no {key!r}; it needs says, paper, x and test")
            check_type(f"{where}.{key}", values[key], hint)
        if values["x"] not in axes:
            raise UserError(f"{where}.x is {values['x']!r}; {nearest(values['x'], axes)}")
        test = dict(values["test"])
        if test.get("name") not in TESTS:
            raise UserError(f"{where}: there is no test {test.get('name')!r}; {nearest(str(test.get('name')), TESTS)}")
        function = TESTS[test.pop("name")]
        hints = get_type_hints(function)
        wanted = [p for p in inspect.signature(function).parameters if p != "lines"]
        check_keys(f"{where}.test", test, wanted)
        for key in wanted:
            if key not in test:
                raise UserError(f"{where}.test has no {key!r}")
            check_type(f"{where}.test.{key}", test[key], hints[key])
            for label in [test[key]] if isinstance(test[key], str) else test[key]:
                if label not in labels:
                    raise UserError(f"{where}.test.{key}: no layer is labelled {label!r}; {nearest(label, labels)}")
        return cls(name, values["says"], values["paper"], values["x"], values["test"])

    def judge(self, lines: Lines) -> "Verdict":
        arguments = {key: value for key, value in self.test.items() if key != "name"}
        agrees, found = TESTS[self.test["name"]](lines, **arguments)
        seeds = sorted({point.seeds for line in lines.values() for point in line})
        return Verdict(self, agrees, found, seeds)


@dataclass(frozen=True)
class Verdict:
    claim: Claim
    agrees: bool
    found: str  # with numbers
    seeds: Sequence[int]  # runs a point


def gather(rows: Sequence[tuple[str, Mapping[str, Any]]], x: str) -> Lines:
    """The lines of (label, finished run) along x. Runs without a figure there, such as a state, have no point."""
    found: dict[str, dict[float, list[float]]] = {}
    for label, row in rows:
        line = found.setdefault(label, {})
        for at, right in _figures(row, x):
            if at is not None and right is not None:
                line.setdefault(at, []).append(right)
    return {
        label: [Point(at, sum(ys) / len(ys), min(ys), max(ys), len(ys)) for at, ys in sorted(line.items())]
        for label, line in found.items()
    }


def _figures(row: Mapping[str, Any], x: str) -> list[tuple[Any, Any]]:
    if x == "state_bytes":
        return [(row["state_bytes"], row["accuracy"][0])]
    if x == "length":
        return list(zip(row["lengths"], row["accuracy"], strict=True))
    if row["variants"] and x in row["variants"][0]:
        asked = [variant.get(x) for variant in row["variants"]]
        return list(zip(asked, row["accuracy_of_variants"], strict=True))
    return [(row["task"][x], row["accuracy"][0])]


SOLVED = 0.99  # right answers that count as solving a task
SLACK = 0.02  # by which a line that grows may dip
CARRIED = 1  # tokens by which a short convolution may lengthen a window's reach


def solves(lines: Lines, layers: list[str]) -> tuple[bool, str]:
    """Each of `layers` is right (SOLVED) at every point, and no other line at its last."""
    worst = {label: min(lines[label], key=lambda p: p.mean) for label in layers}
    parts = [f"{label}: at least {_percent(p)} on average, at {p.x:,g}" for label, p in worst.items()]
    others = {label: line for label, line in lines.items() if label not in layers}
    parts += [_course(label, line) for label, line in others.items()]
    agrees = all(p.mean >= SOLVED for p in worst.values()) and all(line[-1].mean < SOLVED for line in others.values())
    return agrees, "; ".join(parts)


def grows(lines: Lines, layers: list[str]) -> tuple[bool, str]:
    """Each of `layers` is better the further along x: every run at the end than every run at the beginning, and no
    mean more than SLACK below the one before it."""
    grown = []
    for label in layers:
        line = lines[label]
        steady = all(b.mean >= a.mean - SLACK for a, b in pairwise(line))
        grown.append(steady and line[-1].least > line[0].greatest)
    return all(grown), "; ".join(_course(label, lines[label]) for label in layers)


def beats(lines: Lines, better: str, worse: str) -> tuple[bool, str]:
    """At every x of `worse`, the point of `better` nearest to it has the greater mean, or both are right (SOLVED);
    somewhere every run of `better` is above every run of `worse`."""
    pairs = [(min(lines[better], key=lambda p: abs(p.x - q.x)), q) for q in lines[worse]]
    agrees = all(p.mean > q.mean or min(p.mean, q.mean) >= SOLVED for p, q in pairs)
    agrees &= any(p.least > q.greatest for p, q in pairs)
    told = (f"{_percent(p)} ({p.x:,g}) to {_percent(q)} ({q.x:,g})" for p, q in pairs)
    return agrees, f"{better} to {worse}: " + ", ".join(told)


def extrapolates(lines: Lines, solve: list[str], fail: list[str]) -> tuple[bool, str]:
    """At the last x, each of `solve` is right (SOLVED) on average, and no run of `fail` gets half way there from the
    guess between two answers."""
    agrees = all(lines[label][-1].mean >= SOLVED for label in solve)
    agrees &= all(lines[label][-1].greatest < 0.75 for label in fail)
    return agrees, "; ".join(_course(label, line) for label, line in lines.items())


def windows(lines: Lines, full: list[str], reach: dict[str, int]) -> tuple[bool, str]:
    """Each of `full` is right (SOLVED) at every distance; each of `reach` at distances below that number, and half of
    the time at most more than CARRIED past it."""
    parts, agrees = [], True
    for label in full:
        worst = min(lines[label], key=lambda p: p.mean)
        agrees &= worst.mean >= SOLVED
        parts.append(f"{label}: at least {_percent(worst)}, at {worst.x:,g}")
    for label, width in reach.items():
        inside = min((p for p in lines[label] if p.x < width), key=lambda p: p.mean)
        beyond = max((p for p in lines[label] if p.x > width + CARRIED), key=lambda p: p.mean)
        agrees &= inside.mean >= SOLVED and beyond.mean < 0.5
        parts.append(f"{label}: at least {_percent(inside)} below {width}, at most {_percent(beyond)} past it")
    return agrees, "; ".join(parts)


TESTS: dict[str, Callable[..., tuple[bool, str]]] = {
    "solves": solves,
    "grows": grows,
    "beats": beats,
    "extrapolates": extrapolates,
    "windows": windows,
}


def markdown(verdicts: Sequence[Verdict]) -> str:
    """A table of the claims, and beside each what the runs say."""
    lines = ["| claim | here | found |", "|---|---|---|"]
    for v in verdicts:
        here = "agrees" if v.agrees else "**disagrees**"
        lines.append(f"| {v.claim.says} ({v.claim.paper}) | {here} | {v.found}; {seeds(v)} |")
    return "\n".join(lines) + "\n"


def seeds(verdict: Verdict) -> str:
    return "mean and range of " + " or ".join(map(str, verdict.seeds)) + " seeds"


def _course(label: str, line: Sequence[Point]) -> str:
    first, last = line[0], line[-1]
    return f"{label}: {_percent(first)} at {first.x:,g}, {_percent(last)} at {last.x:,g}"


def _percent(point: Point) -> str:
    """The mean, and the range where it differs from it once rounded."""
    mean, least, greatest = (f"{100 * a:.0f}" for a in (point.mean, point.least, point.greatest))
    return f"{mean} %" if least == greatest else f"{mean} % ({least}-{greatest})"
