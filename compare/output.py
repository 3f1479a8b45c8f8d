"""What the comparisons write: rows as CSV, and figures that fit a table."""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def csv_writer(rows: Sequence[Mapping[str, Any]]) -> Callable[[Path], None]:
    """A function that writes `rows`, which share their keys, to a path."""

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    return write


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
