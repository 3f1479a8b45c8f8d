"""Cost curves: one panel a measure, log-log, each line named at its end."""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

PANELS = {
    "train ms": "forward and backward, ms",
    "prefill ms": "prefill, ms",
    "decode ms": "one decoded token, ms",
    "state bytes": "state, bytes",
}
STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw rows of {layer, tokens, one column a panel} as a PNG; a panel that no row has a figure for is left out."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    panels = [key for key in PANELS if any(row[key] for row in rows)]
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    figure = Figure(figsize=(12, 4.2 * -(-len(panels) // 2)), layout="constrained")
    figure.suptitle(title)
    for axes, key in zip(figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flat, panels, strict=False):
        ends = {}
        for i, layer in enumerate(layers):
            points = [(row["tokens"], row[key]) for row in rows if row["layer"] == layer and row[key]]
            if not points:  # a log scale has no zero: a layer without state has no line
                continue
            # Dark to light, so that lines differ in grey as well, besides their dashes and markers.
            colour = colormaps["viridis"](0.8 * i / max(len(layers) - 1, 1))
            style, marker = STYLES[i % len(STYLES)], MARKERS[i % len(MARKERS)]
            axes.plot(*zip(*points, strict=True), linestyle=style, marker=marker, markersize=5, color=colour)
            ends[layer] = (*map(float, points[-1]), colour)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel=PANELS[key])
        axes.set_xticks(sorted({row["tokens"] for row in rows}))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        _name_ends(axes, ends)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    figure.savefig(path, format="png", dpi=150)


def _name_ends(axes: Any, ends: Mapping[str, tuple[float, float, Any]]) -> None:
    """Names right of the lines' ends, moved apart where they would cover each other."""
    low, high = axes.get_ylim()
    spacing = 0.065  # of the panel's height
    names = sorted(ends, key=lambda name: ends[name][1])
    places = [log(ends[name][1] / low) / log(high / low) for name in names]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + spacing)
    limit = 1.0
    for i in reversed(range(len(places))):  # those pushed out at the top come down again
        places[i] = min(places[i], limit)
        limit = places[i] - spacing
    for name, place in zip(names, places, strict=True):
        x, y, colour = ends[name]
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            va="center",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "relpos": (0, 0.5), "color": colour, "linewidth": 0.6},
            annotation_clip=False,
        )
