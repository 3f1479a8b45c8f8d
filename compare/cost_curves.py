"""Pictures of measured costs against length, log-log, readable in grey, each line named at its end."""

import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from subquad.compare.curves import Line, last, log_axes, name_ends, plot
from subquad.compare.families import REPRESENTATIVE, by_family
from subquad.compare.fits import REFERENCE
from subquad.compare.results import PHASES, Kind, Measurements, Phase
from subquad.errors import UserError
from subquad.files import write_atomically

SUFFIXES = (".png", ".svg")
TOGETHER = 12  # as many subjects share a panel; more are divided into families


@dataclass(frozen=True)
class Measure:
    """What a panel shows: a quantity of the points of some phases, the first of them that has any for a subject."""

    name: str
    title: str
    unit: str
    across: str
    quantity: Literal["ms", "peak_bytes", "state_bytes"]
    phases: tuple[Phase, ...]


MEASURES = (
    Measure("training", "training: forward and backward", "ms", "tokens", "ms", ("train",)),
    Measure("prefill", "prefill", "ms", "tokens", "ms", ("prefill",)),
    Measure("decode", "decoding one token", "ms", "tokens of context", "ms", ("decode",)),
    Measure("memory", "peak memory of training", "bytes", "tokens", "peak_bytes", ("train",)),
    Measure("state", "state", "bytes", "tokens of context", "state_bytes", ("decode", "prefill", "train")),
)


def check_picture(path: str | Path) -> Path:
    """One sentence, before any work, for a name that is neither a PNG's nor an SVG's."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise UserError(f"{path}: pictures are drawn as {' or '.join(SUFFIXES)}, by the name's ending")
    return Path(path)


def draw(measurements: Measurements, path: str | Path, *, overwrite: bool = False) -> None:
    """All measures of all layers, or else models, in one picture; many are divided into a row for each family."""
    path = check_picture(path)
    shown = _kind(measurements)
    measures = [(m, lines) for m in MEASURES if any((lines := _lines(measurements, shown, m)).values())]
    if not measures:
        raise UserError(f"there is nothing to draw in {path}: no measurement has a figure")
    subjects = measurements.subjects(shown)
    figure = _grid(measures) if len(subjects) <= TOGETHER else _families(by_family(subjects), measures)
    figure.suptitle(_title(measurements), fontsize=11, x=0.01, ha="left", parse_math=False)
    _foot(figure, [_missing(measurements, shown, subjects, PHASES)], 8)
    _save(figure, path, overwrite=overwrite)


def figures(
    measurements: Measurements,
    folder: str | Path,
    *,
    subjects: Sequence[str] = REPRESENTATIVE,
    suffix: str = ".png",
    overwrite: bool = False,
) -> list[Path]:
    """A picture each of training, prefill, decoding and state, of a few layers; returns the files written."""
    wanted = {
        name: check_picture(Path(folder) / f"{name}{suffix}") for name in ("training", "prefill", "decode", "state")
    }
    shown = _kind(measurements)
    if not set(subjects) & set(measurements.subjects(shown)):
        raise UserError(f"none of {', '.join(subjects)} was measured")
    written = []
    for measure in MEASURES:
        lines = {name: _lines(measurements, shown, measure).get(name, []) for name in subjects}
        if measure.name in wanted and any(lines.values()):
            figure = _one(measure, lines)
            missing = _missing(measurements, shown, subjects, measure.phases[:1])
            _foot(figure, [_title(measurements), missing], 7)
            _save(figure, wanted[measure.name], overwrite=overwrite, source=fingerprint(measurements))
            written.append(wanted[measure.name])
    return written


def _kind(measurements: Measurements) -> Kind:
    """Whole layers where there are any, else models, else ops alone."""
    kinds = {point.kind for point in measurements.points}
    order: tuple[Kind, ...] = ("layer", "model", "op")
    return next((kind for kind in order if kind in kinds), "layer")


def _lines(measurements: Measurements, kind: str, measure: Measure) -> dict[str, Line]:
    """For each subject its points (tokens, figure); none where there is no figure above zero."""
    lines: dict[str, Line] = {}
    for subject in measurements.subjects(kind):
        found = (
            [
                (p.tokens, value)
                for p in measurements.select(kind, phase, subject)
                if (value := getattr(p, measure.quantity))
            ]
            for phase in measure.phases
        )
        lines[subject] = next(filter(None, found), [])
    return lines


def _one(measure: Measure, lines: Mapping[str, Line]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 4.4), layout="constrained")
    _panel(figure.subplots(), measure, lines, lines, REFERENCE)
    return figure


def _grid(measures: Sequence[tuple[Measure, Mapping[str, Line]]]) -> Any:
    """A panel a measure, two in a row."""
    from matplotlib.figure import Figure

    rows = -(-len(measures) // 2)
    figure = Figure(figsize=(13, 4.4 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False).flat
    for axes, (measure, lines) in zip(panels, measures, strict=False):
        _panel(axes, measure, lines, lines, REFERENCE)
    for axes in figure.axes[len(measures) :]:
        axes.remove()
    return figure


def _families(families: Mapping[str, list[str]], measures: Sequence[tuple[Measure, Mapping[str, Line]]]) -> Any:
    """A row a family, a column a measure with one scale, the reference in every panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(measures), 3.0 * len(families)), layout="constrained")
    grid = figure.subplots(len(families), len(measures), squeeze=False)
    for row, (family, members) in zip(grid, families.items(), strict=True):
        for axes, (measure, lines) in zip(row, measures, strict=True):
            mine = {name: lines[name] for name in dict.fromkeys([*members, REFERENCE]) if name in lines}
            _panel(axes, measure, mine, lines, REFERENCE, small=True)
            if axes is row[0]:
                axes.set_title(family, loc="left", fontweight="bold")
    return figure


def _panel(
    axes: Any,
    measure: Measure,
    lines: Mapping[str, Line],
    scale: Mapping[str, Line],
    reference: str,
    small: bool = False,
) -> None:
    """These lines, on axes that hold all those of `scale`."""
    points = [point for line in scale.values() for point in line]
    plot(axes, lines, reference=reference if len(lines) > 1 else None, size=4 if small else 5.5)
    tokens, values = [x for x, _ in points], [y for _, y in points]
    log_axes(axes, tokens, values, ticks=5 if small else 9)
    axes.set_xlim(min(tokens) / 1.1, max(tokens) * 1.1)
    axes.set_ylim(min(values) / 1.4, max(values) * 1.4)
    axes.set_xlabel(measure.across, fontsize=8 if small else 10)
    axes.set_ylabel(f"{measure.name if small else measure.title} ({measure.unit})", fontsize=8 if small else 10)
    axes.tick_params(labelsize=8 if small else 9)
    ends = [(line.get_label(), *last(line), line.get_color()) for line in axes.lines]
    name_ends(axes, ends, size=8 if small else 10)


def _title(measurements: Measurements) -> str:
    """On what, with what and when."""
    machine, settings = measurements.machine, measurements.settings
    threads = machine.get("threads")
    where = f"{machine.get('name')}"
    if machine.get("device") == "cpu":
        where += f", {threads} thread{'' if threads == 1 else 's'}"
    how = ", ".join(f"{key} {settings[key]}" for key in ("d_model", "batch", "dtype") if key in settings)
    return f"{where}; torch {measurements.versions.get('torch')}; {how}; {measurements.created}"


def _foot(figure: Any, texts: Sequence[str], size: float) -> None:
    """Small print below all panels, in lines that fit."""
    width = int(figure.get_figwidth() * 128 / size)
    text = "\n".join(textwrap.fill(text, width) for text in texts if text)
    figure.supxlabel(text, fontsize=size, x=0.01, ha="left", color="0.3", parse_math=False)


def _missing(measurements: Measurements, kind: str, subjects: Collection[str], phases: Collection[str]) -> str:
    """What has no time and why, from the shortest length on."""
    first = {
        (subject, phase): why
        for (subject, of, phase), why in without_time(measurements).items()
        if of == kind and subject in subjects and phase in phases
    }
    reasons: dict[str, dict[str, list[str]]] = {}
    for (subject, phase), why in first.items():
        reasons.setdefault(why, {}).setdefault(subject, []).append(phase)
    sentences = []
    for why, phases_of in reasons.items():
        alike: dict[str, list[str]] = {}
        for subject, phases in phases_of.items():
            alike.setdefault(", ".join(phases), []).append(subject)
        sentences += [f"{', '.join(subjects)} ({phases}) {why}" for phases, subjects in alike.items()]
    return "No time: " + "; ".join(sentences) if sentences else ""


def without_time(measurements: Measurements) -> dict[tuple[str, Kind, Phase], str]:
    """By subject, kind and phase: from which length on there is no time, and why."""
    first: dict[tuple[str, Kind, Phase], str] = {}
    for p in sorted(measurements.points, key=lambda p: p.tokens):
        if p.ms is None and p.note:
            first.setdefault((p.subject, p.kind, p.phase), f"from {p.tokens:,} tokens: {p.note}")
    return first


def fingerprint(measurements: Measurements) -> str:
    """What `figures` writes into its pictures, to tell which measurements they show."""
    return sha256(repr(measurements).encode()).hexdigest()


def _save(figure: Any, path: Path, *, overwrite: bool, source: str | None = None) -> None:
    from matplotlib import rc_context

    form = path.suffix.lower().lstrip(".")
    # One text for one picture: no date, no ids made of chance.
    about = ({"Date": None} if form == "svg" else {}) | ({"Description": source} if source else {})
    with rc_context({"svg.hashsalt": "subquad"}):
        write_atomically(
            path, lambda partial: figure.savefig(partial, format=form, dpi=140, metadata=about), overwrite=overwrite
        )
