"""Tokens a second and state against context, one line a model."""

from collections.abc import Callable
from pathlib import Path

from subquad.compare.curves import last, log_axes, name_ends, plot
from subquad.compare.results import Measurements, Point


def draw(measured: Measurements, path: Path) -> None:
    """Two panels as a PNG; a model with nothing to show in a panel has no line there."""
    from matplotlib.figure import Figure

    batch = measured.settings["batch"]
    panels = {
        "tokens a second": lambda point: point.ms and 1e3 * batch / point.ms,
        "state (bytes)": lambda point: point.state_bytes,
    }
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    figure.suptitle(heading(measured), fontsize=11)
    for axes, (label, figure_of) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        lines = {name: _line(measured, name, figure_of) for name in measured.subjects("model")}
        shown = [point for line in lines.values() for point in line]
        axes.set(xlabel="context (tokens)", ylabel=label)
        if shown:
            plot(axes, lines)
            log_axes(axes, [x for x, _ in shown], [y for _, y in shown])
            name_ends(axes, [(line.get_label(), *last(line), line.get_color()) for line in axes.lines])
    figure.savefig(path, format="png", dpi=150)


def heading(measured: Measurements) -> str:
    settings = measured.settings
    return f"Decoding, batch {settings['batch']}, {settings['dtype']}, {measured.machine['name']}"


def _line(measured: Measurements, name: str, figure_of: Callable[[Point], float | None]) -> list[tuple[float, float]]:
    points: list[Point] = list(measured.select("model", "decode", name))
    return [(point.tokens, value) for point in points if (value := figure_of(point))]
