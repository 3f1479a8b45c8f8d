"""Accuracy against state bytes: one panel a task, each layer named at its point."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subquad.compare.curves import MARKERS, name_ends


def draw(panels: Sequence[tuple[str, float, Sequence[Mapping[str, Any]]]], path: Path) -> None:
    """Draw panels of (task, chance level, rows of {layer, state_bytes, accuracy}) as a PNG.

    accuracy holds (mean, least, greatest) at the training length first. Layers without a state have no point.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    wide = min(len(panels), 2)
    tall = -(-len(panels) // wide)
    figure = Figure(figsize=(7.2 * wide, 4.4 * tall), layout="constrained")
    for axes, (title, chance, rows) in zip(figure.subplots(tall, wide, squeeze=False).flat, panels, strict=False):
        shown = [row for row in rows if row["state_bytes"]]
        names = []
        for i, row in enumerate(shown):
            mean, least, greatest = (100 * a for a in row["accuracy"][0])
            colour = colormaps["viridis"](0.75 * i / max(len(shown) - 1, 1))
            bar = [[mean - least], [greatest - mean]]
            marker = MARKERS[i % len(MARKERS)]
            axes.errorbar(row["state_bytes"], mean, yerr=bar, marker=marker, markersize=7, color=colour, capsize=3)
            names.append((row["layer"], row["state_bytes"], mean, colour))
        axes.set(title=title, ylabel="right answers at the training length (%)", ylim=(-4, 106))
        axes.set(xscale="log", xlabel="state of one sequence (bytes)")
        if shown:
            sizes = [row["state_bytes"] for row in shown]
            axes.set_xlim(min(sizes) / 1.6, max(sizes) * 1.6)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        axes.axhline(100 * chance, color="0.4", linewidth=1, linestyle=(0, (5, 4)))
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        at = (0.01, 100 * chance)
        axes.annotate("chance", at, (0, 3), ("axes fraction", "data"), "offset points", color="0.3", bbox=behind)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        name_ends(axes, names)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.savefig(path, format="png", dpi=150)
