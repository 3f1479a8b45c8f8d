"""The picture of `subquad compare kernels`: a panel a shape and pass, a bar a library, the memory floor as a line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PHASES = {"forward": "forward", "train": "forward + backward"}
# Told apart in grey too; ours is the darkest.
LOOKS = {
    "ours": {"color": "0.2"},
    "fla": {"color": "0.65"},
    "mamba_ssm": {"color": "0.8", "hatch": "///"},
    "causal_conv1d": {"color": "0.8", "hatch": "..."},
    "torch": {"color": "0.93", "hatch": "xxx"},
}
THICK, GAP = 1.0, 0.8  # of a bar, and between two cases


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw rows of {case, shape, library, forward ms, train ms, ... floor ms} as a PNG; what failed has no bar."""
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    tallest = max(_height([row for row in rows if row["shape"] == shape]) for shape in shapes)
    figure = Figure(figsize=(13, len(shapes) * (0.9 + 0.22 * tallest) + 0.6), layout="constrained")
    figure.suptitle(f"{title}\nmilliseconds, and times the memory floor (the vertical line)", fontsize=11)
    grid = figure.subplots(len(shapes), len(PHASES), squeeze=False)
    for line, shape in zip(grid, shapes, strict=True):
        for axes, (phase, name) in zip(line, PHASES.items(), strict=True):
            _panel(axes, [row for row in rows if row["shape"] == shape], phase)
            axes.set_title(f"{name}, {shape}", fontsize=10, loc="left")
    figure.savefig(path, format="png", dpi=150)


def _height(rows: Sequence[Mapping[str, Any]]) -> float:
    return THICK * len(rows) + GAP * len({row["case"] for row in rows})


def _panel(axes: Any, rows: Sequence[Mapping[str, Any]], phase: str) -> None:
    longest = max((row[f"{phase} ms"] or 0 for row in rows), default=0) or 1
    cases, y = list(dict.fromkeys(row["case"] for row in rows)), 0.0
    for case in cases:
        here = [row for row in rows if row["case"] == case]
        top, floor = y, max(row[f"{phase} floor ms"] or 0 for row in here)
        for row in here:
            ms, times = row[f"{phase} ms"], row[f"{phase} / floor"]
            label = f"{row['library']}: failed"
            if ms is not None:
                axes.barh(y, ms, height=0.85 * THICK, edgecolor="0.2", linewidth=0.5, **LOOKS[row["library"]])
                label = f"{row['library']} {ms:.3g} ({times:.1f}x)"
            axes.text(max(ms or 0, floor) + 0.012 * longest, y, label, va="center", fontsize=7)
            y += THICK
        if floor:
            for color, width in (("white", 4.5), ("black", 1.8)):  # seen on a dark bar too
                axes.vlines(floor, top - 0.6 * THICK, y - 0.4 * THICK, color=color, linewidth=width)
        axes.text(-0.012 * longest, (top + y - THICK) / 2, case, ha="right", va="center", fontsize=8)
        y += GAP
    axes.set(xlim=(0, 1.3 * longest), ylim=(y - GAP, -THICK), xlabel="ms")
    axes.set_yticks([])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
