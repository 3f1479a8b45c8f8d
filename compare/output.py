"""What the comparisons write: rows as CSV or JSON, and figures that fit a table."""

import csv
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from subquad.compare.results import Measurements

OUTPUTS = ("--csv", "--json", "--png", "--svg", "--html", "--picture")  # each with a file
WRITING = ("--overwrite", "--resume")


def csv_writer(rows: Sequence[Mapping[str, Any]]) -> Callable[[Path], None]:
    """A function that writes `rows`, which share their keys, to a path."""

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    return write


def json_writer(about: Measurements, rows: Sequence[Mapping[str, Any]]) -> Callable[[Path], None]:
    """A function that writes `rows` to a path, under the command, date, machine, versions and settings of `about`."""
    header = {key: value for key, value in asdict(about).items() if key != "points"}
    text = json.dumps(header | {"rows": list(rows)}, indent=2, allow_nan=False) + "\n"
    return lambda path: path.write_text(text, encoding="utf-8") and None


def typed(command: str, argv: Sequence[str] | None) -> str:
    """`subquad command` with its arguments, as a shell takes it, without the files that it writes."""
    return " ".join(["subquad", command, shlex.join(without_outputs(argv or ()))]).rstrip()


def without_outputs(words: Sequence[str]) -> list[str]:
    """The words of a command line but for the options that say what is written where, which no figure depends on."""
    kept, skipped = [], False
    for word in words:
        if not skipped and word not in WRITING and word.split("=")[0] not in OUTPUTS:
            kept.append(word)
        skipped = word in OUTPUTS
    return kept


def short(value: float | None, unit: str = "") -> str:
    """Three digits and a decimal prefix: 1.34 G, 102 MB."""
    if value is None:
        return "-"
    prefix = ""
    for larger in "kMGTP":
        if value < 999.5:
            break
        value, prefix = value / 1000, larger
    digits = f"{value:#.3g}".rstrip(".") if prefix else f"{value:.3g}"
    return f"{digits} {prefix}{unit}".rstrip()
