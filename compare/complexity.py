"""`subquad compare complexity`: what layers and models cost against length, measured, and how it grows.

For each layer and length: training (forward and backward), prefill (all tokens read without gradients, with a state)
and decoding a token; time, peak memory, state, energy where a GPU reports it, and counted FLOPs and bytes. A layer's
mixing op is measured alone too, on the very tensors the layer gives it, since projections lower the layer's exponent.

FLOPs are those that `subquad compare models` counts; attention to a cache counts all of its slots. Bytes are the input,
the output and the parameters, each once, and the state that is read and written; in training the first three and their
gradients.

Times are medians of the repeats on the wall clock. Exponents are fitted from 4,096 tokens on, those of decoding over
all contexts, with 95 % intervals. A crossover is the length from which on a layer takes less time than Attention.
Where Attention, S4, Mamba, Hyena, Retention and RWKV4 are all measured, their costs and those of all layers as stated,
O(.), stand beside the measured exponents, with a verdict.
Ctrl-C leaves what was measured in the --json file; the same command with --resume goes on from there.
"""

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from subquad.arguments import Parser
from subquad.compare import claims, cost_curves, report
from subquad.compare.fits import REFERENCE, Crossover, Fit, crossovers, fits
from subquad.compare.measuring import WARM_UP, Limit, Setting, measure
from subquad.compare.meters import freed_memory_kept
from subquad.compare.output import csv_writer, typed
from subquad.compare.results import PHASES, Measurements, begin, load
from subquad.compare.subjects import (
    Subject,
    label,
    layer_subject,
    long_enough,
    mixers,
    model_subject,
    specification,
)
from subquad.errors import UserError, nearest
from subquad.files import check_output, write_atomically
from subquad.infer.device import DTYPES, pick_device, pick_dtype

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is missing, print the table, write the files asked for."""
    given = arguments(argv)
    device, dtype = pick_device(given.device), pick_dtype(given.dtype)
    assert dtype is not None
    lengths, phases = sorted(set(given.lengths)), [phase for phase in PHASES if phase in given.phases]
    longest = lengths[-1] + 2 * (given.new_tokens + WARM_UP + 2)
    words = given.layers if given.layers or given.configs else mixers()
    specs = {label(spec): long_enough(spec, longest) for spec in (specification("--layers", word) for word in words)}
    for path in filter(None, (given.csv, given.png, given.svg, given.html)):
        check_output(path, overwrite=given.overwrite)
    for path in filter(None, (given.png, given.svg)):
        cost_curves.check_picture(path)
    kept = ("d_model", "batch", "dtype", "repeat", "new_tokens", "budget")
    settings = {name: getattr(given, name) for name in kept}
    settings |= {"lengths": lengths, "phases": phases, "layers": specs, "configs": given.configs}
    measured = begin(typed("compare complexity", argv), device, settings)
    if given.json:
        measured = _resumed(measured, given)
    subjects = [layer_subject(name, spec, given.d_model, device, dtype) for name, spec in specs.items()]
    subjects += [model_subject(name, device, dtype, trust_code=given.trust_code) for name in given.configs]

    run(measured, subjects, Setting(given.batch, given.new_tokens, given.repeat, device), given.json)

    console = Console()
    console.print(_table(measured))
    for note in notes(measured):
        console.print(f"- {note}", markup=False, highlight=False)
    if claims.complete(measured):
        console.print(claims.table(measured))
    if given.csv:
        rows = [asdict(point) for point in measured.points]
        write_atomically(given.csv, csv_writer(rows), overwrite=given.overwrite)
    for path in filter(None, (given.png, given.svg)):
        cost_curves.draw(measured, path, overwrite=given.overwrite)
    if given.html:
        report.write(measured, given.html, overwrite=given.overwrite)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="subquad compare complexity", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--layers", nargs="+", default=[], metavar="LAYER", help=LAYERS_HELP)
    parser.add_argument("--configs", nargs="+", default=[], metavar="CONFIG", help=CONFIGS_HELP)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="tokens (1024, doubled up to 32768)")
    parser.add_argument("--phases", nargs="+", default=list(PHASES), help=f"some of {' '.join(PHASES)} (all)")
    parser.add_argument("--d-model", type=int, default=128, help="width of layers (128)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (1)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens decoded after each context (64)")
    parser.add_argument("--repeat", type=int, default=5, help="runs at most; none is begun after a second (5)")
    parser.add_argument("--budget", type=float, default=1080, help=BUDGET_HELP)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else cpu")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES) + " (float32)")
    parser.add_argument("--trust-code", action="store_true", help="let what lies in a model's folder import classes")
    parser.add_argument("--csv", type=Path, help="write the points here")
    parser.add_argument("--json", type=Path, help="keep the measurements here, with all that they depend on")
    parser.add_argument("--png", type=Path, help="draw the curves here")
    parser.add_argument("--svg", type=Path, help="draw the curves here")
    parser.add_argument("--html", type=Path, help="write a report here that opens from disk")
    parser.add_argument("--resume", action="store_true", help="measure only what the --json file does not have yet")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    given = parser.parse_args(argv)
    for name in ("d_model", "batch", "new_tokens", "repeat"):
        parser.at_least(given, name, 1)
    if min(given.lengths) < 1:
        raise UserError(f"--lengths has {min(given.lengths)}; a length is at least 1")
    for phase in given.phases:
        if phase not in PHASES:
            raise UserError(f"--phases: there is no phase {phase!r}; {nearest(phase, PHASES)}")
    if not given.budget > 0:
        raise UserError(f"--budget is {given.budget}; it must be above 0 seconds")
    if given.resume and (given.json is None or given.overwrite):
        raise UserError("--resume goes on with the measurements of a --json file, so it needs one and no --overwrite")
    return given


LAYERS_HELP = (
    "names, or mappings with arguments such as '{name: Attention, window: 64}'; by default every mixer, or none where "
    "--configs are given; a name alone serves the longest of the lengths"
)
CONFIGS_HELP = "whole models: shipped names, files, folders of saved models, as `compare models` takes them"
BUDGET_HELP = (
    "seconds (1080) after which no other layer is begun; a measurement that would take more than its share of what is "
    "left is left out"
)


CAPTION = f"Below {REFERENCE}: the length from which on it takes less time, with a 95 % range; * extrapolated"


def _resumed(measured: Measurements, given: argparse.Namespace) -> Measurements:
    """With the points of the --json file, if it has some and they were measured alike."""
    if not given.resume or not given.json.exists():
        check_output(given.json, overwrite=given.overwrite)
        return measured
    found = load(given.json)
    for what in ("settings", "machine", "versions"):
        old, new = getattr(found, what), getattr(measured, what)
        for name in sorted({*old, *new}):
            if old.get(name) != new.get(name):
                raise UserError(
                    f"--resume: {given.json} was measured with {name} {old.get(name)!r}, which is {new.get(name)!r} now"
                )
    return found


def run(measured: Measurements, subjects: Sequence[Subject], setting: Setting, path: Path | None) -> None:
    """Measure the subjects that are not whole yet, which begin anew, and keep the points in the file."""
    lengths, phases, budget = (measured.settings[name] for name in ("lengths", "phases", "budget"))
    last = [(phase, tokens) for phase in phases for tokens in lengths][-1]
    whole = {p.subject for p in measured.points if p.kind != "op" and (p.phase, p.tokens) == last}
    missing = [subject for subject in subjects if subject.name not in whole]
    measured.points[:] = [p for p in measured.points if p.subject in whole]
    limit = Limit(setting.device, budget, len(missing))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(stderr=True)
    keeping = freed_memory_kept() if setting.device.type == "cpu" else nullcontext()
    try:
        with keeping, Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(missing))
            begun = len(missing)
            while missing and (len(missing) == begun or not limit.spent):
                subject = missing.pop(0)
                progress.update(task, description=subject.name)
                for point in measure(subject, lengths, phases, setting, limit):
                    measured.points.append(point)
                    progress.update(task, description=f"{subject.name}, {point.phase}, {point.tokens:,}")
                limit.subjects -= 1
                progress.advance(task)
                if path:
                    measured.save(path, overwrite=True)
        if missing:
            names = ", ".join(subject.name for subject in missing)
            console.print(f"not measured, the {budget:g} s of --budget are spent: {names}", markup=False)
            if path:
                console.print("the same command with --resume goes on")
    except KeyboardInterrupt:
        if path:
            measured.save(path, overwrite=True)
            console.print(f"{path} has what was measured; the same command with --resume goes on")
        raise


def notes(measured: Measurements) -> list[str]:
    """A sentence for what has no figure: of each subject and phase, the lengths and why."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for point in measured.points:
        if point.note and point.kind != "op":
            found.setdefault((point.subject, point.phase, point.note), []).append(point.tokens)
    return [
        f"{subject}, {phase}, {', '.join(f'{n:,}' for n in tokens)}: {note}"
        for (subject, phase, note), tokens in found.items()
    ]


def _table(measured: Measurements) -> Table:
    lengths = measured.settings["lengths"]
    grown = {(f.subject, f.kind, f.phase): f for f in fits(measured) if f.quantity == "ms"}
    crossed = {(c.subject, c.kind, c.phase): c for c in crossovers(measured)}
    table = Table(
        title=_title(measured), caption=CAPTION, title_justify="left", caption_justify="left", box=SIMPLE_HEAD
    )
    table.padding = (0, 1, 0, 0)
    table.add_column("", overflow="fold", min_width=12)
    table.add_column("phase", no_wrap=True)
    headings = [f"ms at\n{lengths[0]:,}", f"ms at\n{lengths[-1]:,}", "exponent", "of its op\nalone"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"below {REFERENCE}\nfrom", justify="right")
    for subject in measured.subjects():
        kind = "layer" if subject in measured.subjects("layer") else "model"
        rows = [phase for phase in PHASES if any(measured.select(kind, phase, subject))]
        for phase in rows:
            ms = {p.tokens: p.ms for p in measured.select(kind, phase, subject)}
            table.add_row(
                escape(subject) if phase == rows[0] else "",
                phase,
                *("-" if ms.get(n) is None else f"{ms[n]:,.3g}" for n in (lengths[0], lengths[-1])),
                _exponent(grown.get((subject, kind, phase))),
                _exponent(grown.get((subject, "op", phase))),
                _crossover(crossed.get((subject, kind, phase))),
                end_section=phase == rows[-1],
            )
    return table


def _title(measured: Measurements) -> str:
    about, machine = measured.settings, measured.machine
    threads = f", {machine['threads']} thread{'s' * (machine['threads'] > 1)}" if machine["device"] == "cpu" else ""
    setting = f"Width {about['d_model']}, batch {about['batch']}, {about['dtype']}"
    return f"{setting}, {machine['name']}{threads}, torch {measured.versions['torch']}"


def _exponent(fit: Fit | None) -> str:
    """The exponent and half of its interval."""
    if fit is None:
        return "-"
    half = (fit.high - fit.low) / 2
    return f"{fit.exponent:.2f} ±{half:.2f}" if half < 10 else f"{fit.exponent:.2f} ±>10"


def _crossover(found: Crossover | None) -> str:
    if found is None:
        return "-"
    if found.tokens is None:
        word = found.note.split()[0]
        return word if word in ("always", "never") else "-"
    star = "*" if found.note else ""
    return f"{_thousands(found.tokens)}{star} ({_thousands(found.low)}-{_thousands(found.high)})"


def _thousands(tokens: int | None) -> str:
    """Two digits: 950, 1.2k, 34k; a crossover is not known to more."""
    if tokens is None:
        return "never"
    rounded: Any = float(f"{tokens:.2g}")
    return f"{rounded:.0f}" if rounded < 1000 else f"{rounded / 1000:g}k"
