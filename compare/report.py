"""The report of measured costs: one HTML file that opens from disk, holds all figures and needs no network."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

from subquad.compare.claims import rows as claimed
from subquad.compare.cost_curves import TOGETHER, without_time
from subquad.compare.families import REPRESENTATIVE, by_family
from subquad.compare.fits import REFERENCE, Crossover, Fit, crossovers, fits
from subquad.compare.output import short
from subquad.compare.results import Measurements, Point
from subquad.files import write_atomically

KINDS = {"layer": "whole layers", "op": "their ops alone", "model": "models"}
PHASES = (
    {"id": "train", "name": "training", "title": "Training, forward and backward", "across": "tokens"},
    {"id": "prefill", "name": "prefill", "title": "Prefill", "across": "tokens"},
    {"id": "decode", "name": "decoding", "title": "Decoding one token", "across": "tokens of context"},
)
QUANTITIES = (
    {"id": "ms", "name": "time", "title": "time, median", "unit": "milliseconds", "short": "ms"},
    {"id": "peak_bytes", "name": "peak memory", "title": "peak memory", "unit": "bytes", "short": "B"},
    {"id": "state_bytes", "name": "state", "title": "state", "unit": "bytes", "short": "B"},
    {"id": "flops", "name": "FLOPs", "title": "FLOPs, counted", "unit": "FLOPs", "short": "FLOPs"},
    {"id": "bytes", "name": "bytes moved", "title": "bytes to be moved, counted", "unit": "bytes", "short": "B"},
    {"id": "energy_j", "name": "energy", "title": "energy", "unit": "joules", "short": "J"},
)
NEVER = 10**15  # sorts "never" after every length
NONE = "none"  # the class of a cell without a figure, which sorting puts last


@dataclass(frozen=True)
class Cell:
    """What stands in a table: a text, and the number that sorts it where it is one."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as there are columns; the first cell of a row names it."""

    id: str
    title: str
    about: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    long: bool = False  # folded, and with a field to choose rows


def write(measurements: Measurements, path: str | Path, *, overwrite: bool = False) -> None:
    """Write the report of these measurements."""
    text = page(measurements)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"), overwrite=overwrite)


def page(measurements: Measurements) -> str:
    """The report as one HTML document."""
    tables = [table for table in _tables(measurements) if table.rows]
    sections = [
        ("curves", "Curves"),
        *((table.id, table.title) for table in tables),
        ("measured", "How it was measured"),
    ]
    parts = {
        "title": "Cost against length",
        "subtitle": escape(_subtitle(measurements)),
        "contents": " ".join(f'<a href="#{name}">{escape(title)}</a>' for name, title in sections),
        "style": _part("css"),
        "script": _part("js"),
        "sections": "\n".join(map(_section, tables)),
        "measured": _measured(measurements),
        "data": _data(measurements),
    }
    # In one pass, so that nothing in a part is taken for a place to fill.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], _part("html"))


def _part(kind: str) -> str:
    return Path(__file__).with_name(f"report.{kind}").read_text(encoding="utf-8").strip()


def _subtitle(measurements: Measurements) -> str:
    kinds = [f"{KINDS[kind]}: {n}" for kind, n in _counts(measurements).items()]
    return f"Measured on {measurements.machine.get('name')}, {measurements.created} ({', '.join(kinds) or 'nothing'})."


def _counts(measurements: Measurements) -> dict[str, int]:
    return {kind: n for kind in KINDS if (n := len(measurements.subjects(kind)))}


def _measured(measurements: Measurements) -> str:
    """The command, the machine, the versions and the settings."""
    machine = {key.replace("_bytes", ""): value for key, value in measurements.machine.items()}
    if machine.get("memory"):
        machine["memory"] = short(machine["memory"], "B")
    rows = {"command": measurements.command, "date": measurements.created}
    groups = {"machine": machine, "versions": measurements.versions, "settings": measurements.settings}
    told = [
        (key, f"<code>{escape(value)}</code>" if key == "command" else escape(value)) for key, value in rows.items()
    ]
    told += [(key, escape(_listed(values))) for key, values in groups.items()]
    return "<dl>\n" + "\n".join(f"<dt>{key}</dt><dd>{text}</dd>" for key, text in told) + "\n</dl>"


def _listed(values: Mapping[str, Any]) -> str:
    """Without mappings, which the command tells better, and what is empty."""
    said = {key: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for key, v in values.items()}
    return "; ".join(
        f"{key.replace('_', ' ')} {'none' if value is None else value}"
        for key, value in said.items()
        if not isinstance(value, dict) and value != ""
    )


def _data(measurements: Measurements) -> str:
    """What the curves are drawn from, as JSON that no HTML parser takes for markup."""
    models = measurements.subjects("model")
    subjects = [name for name in measurements.subjects() if name not in models]
    families = by_family(subjects) | ({"models": models} if models else {})
    few = [name for name in REPRESENTATIVE if name in subjects] if len(subjects) > TOGETHER else subjects
    data = {
        "kinds": [{"id": kind, "name": KINDS[kind]} for kind in _counts(measurements)],
        "phases": PHASES,
        "quantities": QUANTITIES,
        "families": [{"name": name, "members": members} for name, members in families.items()],
        "reference": REFERENCE,
        "shown": (few or subjects[:TOGETHER]) + models[:TOGETHER],
        "columns": [field.name for field in fields(Point)],
        "points": [astuple(point) for point in measurements.points],
    }
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _tables(measurements: Measurements) -> Iterator[Table]:
    yield _growth(measurements)
    rows = claimed(measurements)
    survey = [row for row in rows if row["table"] == "survey"]
    if any(row["exponent"] is not None for row in survey):
        about = "Costs of representative models as surveys state them, their value at the longest length measured"
        yield _claims("survey", "Representative models", about, survey)
    about = "Costs that each layer's card states"
    yield _claims("claims", "Stated and measured", about, [row for row in rows if row["table"] == "layers"])
    yield _points(measurements)


def _growth(measurements: Measurements) -> Table:
    """Exponents and crossovers: a row for each subject, kind and phase, also for one without a figure."""
    grown = {(f.subject, f.kind, f.phase, f.quantity): f for f in fits(measurements)}
    kinds = list(_counts(measurements))
    crossed = {(c.subject, c.kind, c.phase): c for kind in kinds for c in crossovers(measurements, kind)}
    without = without_time(measurements)
    rows = []
    for key in dict.fromkeys((p.subject, p.kind, p.phase) for p in measurements.points):
        time = grown.get((*key, "ms"))
        others = [_exponent(grown.get((*key, name))) for name in ("flops", "peak_bytes", "state_bytes")]
        fitted = Cell(f"{time.lengths[0]:,} to {time.lengths[-1]:,}", time.lengths[0]) if time else Cell("-")
        below = _crossover(crossed.get(key))
        rows.append(
            [*map(Cell, key), _exponent(time), _interval(time), fitted, *others, *below, Cell(without.get(key, ""))]
        )
    about = (
        "Cost ~ tokens ^ exponent, by least squares of logarithm on logarithm, with 95 % intervals. "
        f"Below {REFERENCE}: the length from which on it takes less time, with 95 % of what the repeats allow."
    )
    columns = [
        "subject",
        "of",
        "phase",
        "exponent of time",
        "95 % interval",
        "fitted over",
        "of FLOPs",
        "of peak memory",
    ]
    columns += ["of state", f"below {REFERENCE} from", "range", "no time"]
    return Table("growth", "Growth and crossovers", about, columns, rows)


def _exponent(fit: Fit | None) -> Cell:
    return Cell(f"{round(fit.exponent, 2) + 0:.2f}", round(fit.exponent, 4)) if fit else Cell("-")


def _interval(fit: Fit | None) -> Cell:
    return Cell(f"{fit.low:.2f} to {fit.high:.2f}", round(fit.low, 4)) if fit else Cell("-")


def _crossover(found: Crossover | None) -> tuple[Cell, Cell]:
    """Where it is and its range; sorted by length, "always below" first and "never" last."""
    if found is None:
        return Cell("-"), Cell("-")
    if found.tokens is None:
        known = found.note.startswith(("always", "never"))
        return Cell(found.note, (0 if found.note.startswith("always") else NEVER) if known else None), Cell("-")
    text = f"{found.tokens:,}" + (f" ({found.note})" if found.note else "")
    low, high = ("never" if end is None else f"{end:,}" for end in (found.low, found.high))
    return Cell(text, found.tokens), Cell(f"{low} to {high}", NEVER if found.low is None else found.low)


def _claims(name: str, title: str, about: str, claims: Sequence[Mapping[str, Any]]) -> Table:
    """What is stated of a cost, what was measured, and the verdict."""
    rows = []
    for row in claims:
        exponent = row["exponent"]
        measured = Cell("-") if exponent is None else Cell(f"{round(exponent, 2) + 0:.2f}", round(exponent, 4))
        interval = (
            Cell("-") if exponent is None else Cell(f"{row['low']:.2f} to {row['high']:.2f}", round(row["low"], 4))
        )
        words = [Cell(row[key] or "") for key in ("claim", "stated", "expected")]
        rows.append([Cell(row["model"] if name == "survey" else row["layer"]), *words, measured, interval])
        rows[-1] += [Cell(row["kind"] or ""), Cell(row["verdict"]), _figure(row["tokens"]), _figure(row["formula"])]
        rows[-1] += [Cell(row["note"]), Cell(row["source"])]
    columns = ["model" if name == "survey" else "layer", "cost", "stated", "exponent stated", "exponent measured"]
    columns += ["95 % interval", "of", "verdict", "longest", "stated value there", "note", "source"]
    kept = [i for i in range(len(columns)) if i < 8 or any(row[i].text not in ("", "-") for row in rows)]
    return Table(
        name,
        title,
        f"{about}; the exponents are those in the length.",
        [columns[i] for i in kept],
        [[row[i] for i in kept] for row in rows],
    )


def _points(measurements: Measurements) -> Table:
    """Every point; a column without any figure is left out."""
    headings = {
        "ms": "median ms",
        "low_ms": "lower quartile",
        "high_ms": "upper quartile",
        "flops": "FLOPs",
        "bytes": "bytes moved",
        "peak_bytes": "peak memory",
        "state_bytes": "state",
        "energy_j": "joules",
    }
    held = {
        key: text for key, text in headings.items() if any(getattr(p, key) is not None for p in measurements.points)
    }
    rows = []
    for p in measurements.points:
        figures = [_figure(getattr(p, key), "B" if key.endswith("bytes") else "") for key in held]
        rows.append([Cell(p.subject), Cell(p.kind), Cell(p.phase), _figure(p.tokens), *figures, Cell(p.note)])
    about = "Times are milliseconds; FLOPs and bytes moved are counted, everything else is measured."
    return Table(
        "points", "All points", about, ["subject", "of", "phase", "tokens", *held.values(), "note"], rows, True
    )


def _figure(value: float | None, unit: str = "") -> Cell:
    """A length in full, any other figure to three or four digits."""
    if value is None:
        return Cell("-")
    if isinstance(value, int) and not unit and value < 10_000_000:
        return Cell(f"{value:,}", value)
    return Cell(short(value, unit) if value >= 1e7 or unit else f"{value:,.4g}", value)


def _section(table: Table) -> str:
    label = f'role="region" aria-label="{escape(table.title)}, scrollable"'
    wide = f'<p class="hint">{escape(table.about)}</p>\n<div class="wide" tabindex="0" {label}>\n{_html(table)}\n</div>'
    heading = f"<h2>{escape(table.title)}</h2>"
    if table.long:
        inside = f"<details>\n<summary>{heading} ({len(table.rows):,})</summary>\n{wide}\n</details>"
    else:
        inside = f"{heading}\n{wide}"
    return f'<section id="{table.id}">\n{inside}\n</section>'


def _html(table: Table) -> str:
    numeric = [any(row[i].value is not None for row in table.rows) for i in range(len(table.columns))]
    heads = "".join(
        f'<th scope="col"{_classes(n)}>{escape(text)}</th>' for text, n in zip(table.columns, numeric, strict=True)
    )
    body = "\n".join(_row(row, numeric) for row in table.rows)
    kind = ' class="long"' if table.long else ""
    return (
        f'<table{kind} aria-label="{escape(table.title)}">\n'
        f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
    )


def _row(row: Sequence[Cell], numeric: Sequence[bool]) -> str:
    cells = []
    for i, (cell, number) in enumerate(zip(row, numeric, strict=True)):
        classes = _classes(number, number and cell.value is None)
        value = "" if cell.value is None else f' data-v="{cell.value!r}"'
        tag = "td" if i else "th"
        scope = "" if i else ' scope="row"'
        cells.append(f"<{tag}{scope}{classes}{value}>{escape(cell.text)}</{tag}>")
    return f"<tr>{''.join(cells)}</tr>"


def _classes(number: bool, none: bool = False) -> str:
    names: Iterable[str] = [name for name, on in (("n", number), (NONE, none)) if on]
    return f' class="{" ".join(names)}"' if names else ""
