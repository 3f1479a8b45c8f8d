"""What the comparisons write: rows as CSV."""

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
