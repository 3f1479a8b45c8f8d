"""The report of measured costs: one HTML file that opens from disk, holds all figures and needs no network."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from html import escape
from pathlib import Path
from typing import Any

from subquad.compare.cost_curves import TOGETHER
from subquad.compare.families import REFERENCE, REPRESENTATIVE, by_family
from subquad.compare.output import short
from subquad.compare.results import Measurements, Point
from subquad.infer.output import write_atomically

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
    said = {"layer": "{} layers", "op": "{} ops alone", "model": "{} models"}
    kinds = [said[kind].format(n) for kind, n in _counts(measurements).items()]
    return f"{', '.join(kinds) or 'Nothing'}, measured on {measurements.machine.get('name')}, {measurements.created}."


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
    said = {key: ", ".join(map(str, v)) if isinstance(v, list | tuple) else v for key, v in values.items()}
    return "; ".join(f"{key.replace('_', ' ')} {'none' if value is None else value}" for key, value in said.items())


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
    yield _points(measurements)


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
    return Cell(short(value, unit) if isinstance(value, int) else f"{value:,.4g}", value)


def _section(table: Table) -> str:
    wide = f'<div class="wide" tabindex="0" role="region" aria-label="{escape(table.title)}">\n{_html(table)}\n</div>'
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
        f"<table{kind}>\n<caption>{escape(table.about)}</caption>\n"
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
