"""Curves on logarithmic axes, each named at its end; they differ in lightness, dashes and markers, so in grey too."""

from collections.abc import Mapping, Sequence
from math import log10
from typing import Any

STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
Line = Sequence[tuple[float, float]]  # (tokens, figure), shortest first


def plot(axes: Any, lines: Mapping[str, Line], *, reference: str | None = None, size: float = 5) -> None:
    """One line a name, dark to light in their order, the reference's broad and grey behind them all.

    A log scale has no zero: a name without points, such as a layer without state, keeps its place but has no line.
    """
    from matplotlib import colormaps

    names = [name for name in lines if name != reference]
    for i, name in enumerate(names):
        look = {
            "color": colormaps["viridis"](0.8 * i / max(len(names) - 1, 1)),
            "linestyle": STYLES[i % len(STYLES)],
            "marker": MARKERS[i % len(MARKERS)],
            "markersize": size,
            "linewidth": 0.3 * size,
        }
        if lines[name]:
            axes.plot(*zip(*lines[name], strict=True), label=name, **look)
    if reference is not None and lines.get(reference):
        broad = {"color": "0.45", "linewidth": 0.7 * size, "alpha": 0.55, "solid_capstyle": "round", "zorder": 1}
        axes.plot(*zip(*lines[reference], strict=True), label=reference, **broad)


def last(line: Any) -> tuple[float, float]:
    """The end of a plotted line."""
    return float(line.get_xdata()[-1]), float(line.get_ydata()[-1])


def log_axes(axes: Any, tokens: Sequence[int], figures: Sequence[float], *, ticks: int = 8) -> None:
    """Both axes logarithmic, ticks at the lengths measured (at most so many) and at round figures with a prefix."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set(xscale="log", yscale="log")
    lengths = sorted(set(tokens))
    axes.set_xticks(lengths[:: -(-len(lengths) // ticks)])
    decades = log10(max(figures) / min(figures)) if figures else 0
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=12))
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y)))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _tick(value: float) -> str:
    """With a decimal prefix: 0.02, 500, 20 k."""
    prefix = ""
    for larger in "kMGTP":
        if value < 999.5:
            break
        value, prefix = value / 1000, larger
    return f"{value:.3g} {prefix}".rstrip()


def name_ends(axes: Any, ends: Sequence[tuple[str, float, float, Any]], *, size: float = 9) -> None:
    """Names right of the panel, each with a line to its (name, x, y, colour), moved apart where they would overlap.

    The panel's limits and scales are set before.
    """
    spacing = 1.4 * size / (72 * axes.get_window_extent().height / axes.figure.dpi)  # of the panel's height
    to_fraction = axes.transScale + axes.transLimits
    placed = sorted(((*to_fraction.transform((x, y)), name, colour) for name, x, y, colour in ends), key=lambda e: e[1])
    furthest = max((x for x, *_ in placed), default=0)
    places = apart([y for _, y, *_ in placed], spacing)
    for (x, y, name, colour), place in zip(placed, places, strict=True):
        early = x < furthest - 0.01  # its leader crosses others' lines, so it must not look like one
        leader = {"color": colour, "linewidth": 0.8 if early else 0.6, "linestyle": (0, (1, 3)) if early else "-"}
        axes.plot([x, 1.025], [y, place], **leader, clip_on=False, transform=axes.transAxes)
        about = {"va": "center", "fontsize": size, "transform": axes.transAxes, "parse_math": False}
        axes.text(1.03, place, name, color=_dark(colour), **about)


def apart(wanted: Sequence[float], spacing: float) -> list[float]:
    """Places as near as can be to those wanted, which ascend: so far apart, and within 0 and 1 if there is room."""
    pools: list[tuple[float, int]] = []  # neighbours that would overlap stay together: where their first is, how many
    for i, place in enumerate(wanted):
        mean, count = place - i * spacing, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    most = max(1 - (len(wanted) - 1) * spacing, 0)
    firsts = [min(max(mean, 0), most) for mean, count in pools for _ in range(count)]
    return [first + i * spacing for i, first in enumerate(firsts)]


def _dark(colour: Any) -> tuple[float, ...]:
    """Dark enough to be read on white."""
    from matplotlib.colors import to_rgb

    return tuple(0.6 * part for part in to_rgb(colour))
