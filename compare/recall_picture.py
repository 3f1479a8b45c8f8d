"""Accuracy against state bytes: one panel a task, each layer named at its point."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MARKERS = "osD^vPX*"
APART = 0.07  # of a panel's height, between names


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
            names.append((mean, row["state_bytes"], row["layer"], colour))
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
        _name(axes, names)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.savefig(path, format="png", dpi=150)


def _name(axes: Any, names: list[tuple[float, float, str, Any]]) -> None:
    """Names right of the panel, each with a line to its point, moved apart where they would cover each other."""
    names = sorted(names, key=lambda n: (n[0], n[1]))
    low, high = axes.get_ylim()
    places = [(mean - low) / (high - low) for mean, *_ in names]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + APART)
    limit = 1.0
    for i in reversed(range(len(places))):  # those pushed out at the top come down again
        places[i] = min(places[i], limit)
        limit = places[i] - APART
    for (mean, size, name, colour), place in zip(names, places, strict=True):
        axes.annotate(
            name,
            xy=(size, mean),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": colour, "linewidth": 0.6},
            annotation_clip=False,
        )
