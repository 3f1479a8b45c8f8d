"""`subquad compare pick`: what fits a memory at a length, and how long it would take there, from measured costs.

The measurements are those shipped for --device, or files of `subquad compare complexity` and `subquad compare decode`
given with --from. Of a layer the costs are those of --blocks such layers in a stack, nothing else of a model; of a
configuration those of the model that was measured. Times between measured lengths are read off the line between their
logarithms; beyond them (marked ~) they follow the fitted power of the length, at least 1, which is too low where it was
still rising; a decoded token takes as long as those measured, or longer along a line where the state grows. Another
batch than the measured one is taken to cost in proportion, which for decoding is an upper bound.

Memory: weights and state are counted for just this length; what else is held at the peak is measured and predicted as
times are. Training holds weights, their gradients, two moments of Adam in float32, and every layer's peak at once, so
it is an upper bound; prefill and decoding hold weights, states, and one layer's peak.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from subquad.arguments import Parser
from subquad.compare import shipped
from subquad.compare.fits import fit
from subquad.compare.output import csv_writer, short
from subquad.compare.predict import Prediction, predict, predict_step
from subquad.compare.results import PHASES, Measurements, Phase, load
from subquad.compare.sizes import Sizes, sizes
from subquad.errors import UserError
from subquad.files import check_output, write_atomically
from subquad.infer.device import pick_dtype

UNITS = {unit: 1000**i for i, unit in enumerate(("B", "KB", "MB", "GB", "TB"))}
UNITS |= {unit: 1024**i for i, unit in enumerate(("B", "KIB", "MIB", "GIB", "TIB"))}
Kind = Literal["layer", "model"]


@dataclass
class Choice:
    """One layer or model at the length asked for: what it needs, what it takes, or why it cannot."""

    subject: str
    kind: Kind
    times: dict[Phase, Prediction] = field(default_factory=dict)  # milliseconds
    memory: dict[Phase, float] = field(default_factory=dict)  # bytes at the peak
    state: int | None = None
    weights: int = 0
    powers: dict[Phase, float] = field(default_factory=dict)  # of the length, which the measured times follow
    grows: bool = False
    cannot: dict[Phase, str] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> int:
    """Read the measurements, print a table for layers and one for models, best first."""
    parser = Parser(prog="subquad compare pick", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--length", type=int, required=True, help="tokens trained on or read, the context of decoding")
    parser.add_argument("--batch", type=int, default=1, help="sequences (1)")
    parser.add_argument("--memory", help="such as 24GB or 80GiB; by default that of the machine that was measured")
    parser.add_argument("--device", help=f"one that measurements are shipped for: {', '.join(shipped.devices())}")
    parser.add_argument("--for", dest="phase", default="decode", help=", ".join(PHASES) + " (decode): orders the rows")
    parser.add_argument("--blocks", type=int, default=24, help="layers in a stack (24)")
    parser.add_argument("--from", dest="files", nargs="+", type=Path, metavar="FILE", help="your measurements")
    parser.add_argument("--trust-code", action="store_true", help="let the measurements import classes")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    given = parser.parse_args(argv)
    for name in ("length", "batch", "blocks"):
        parser.at_least(given, name, 1)
    if given.phase not in PHASES:
        raise UserError(f"--for is {given.phase!r}; it must be one of {', '.join(PHASES)}")
    if given.files and given.device:
        raise UserError("--from names the measurements, so --device, which chooses among shipped ones, goes without it")
    if given.csv:
        check_output(given.csv, overwrite=given.overwrite)
    memory = None if given.memory is None else parse_bytes(given.memory)
    files = [load(path) for path in given.files] if given.files else shipped_files(given.device or "cpu")
    names = [str(path) for path in given.files or ()] or [f"shipped for {given.device or 'cpu'}"] * len(files)
    memory = memory or max(measured.machine["memory_bytes"] or 0 for measured in files)
    if not memory:
        raise UserError("the measurements do not say how much memory their machine has; give --memory")

    console, everything = Console(), []
    for measured, name in zip(files, names, strict=True):
        for kind in ("layer", "model"):
            found = choices(measured, kind, given.phase, given.length, given.batch, given.blocks, given.trust_code)
            if found:
                ranked = sorted(found, key=lambda choice: rank(choice, given.phase, memory))
                console.print(_table(ranked, measured, name, kind, given, memory, console.width))
                everything += [row(choice, measured, given, memory) for choice in ranked]
    if not everything:
        raise UserError(f"there is no measurement of {given.phase} of a layer or a model in {', '.join(names)}")
    console.print("~ extrapolated beyond the measured lengths; ! more than the memory", highlight=False)
    if given.csv:
        write_atomically(given.csv, csv_writer(everything), overwrite=given.overwrite)
    return 0


def shipped_files(device: str) -> list[Measurements]:
    """Costs of layers on the device, and those of models decoding where they were measured too."""
    models = [name for name in (f"decode_{device}",) if name in shipped.names()]
    return [shipped.costs(device), *(load(shipped.path(name)) for name in models)]


def parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    unit = (match[2].upper() or "B") if match else ""
    if not match or unit not in UNITS or not float(match[1]):
        raise UserError(f"--memory is {text!r}; write it as 24GB, 80GiB or a number of bytes")
    return round(float(match[1]) * UNITS[unit])


def choices(
    measured: Measurements, kind: Kind, phase: Phase, length: int, batch: int, blocks: int, trust_code: bool = False
) -> list[Choice]:
    """Of every subject of this kind with a point in this phase."""
    return [
        choice(measured, subject, kind, length, batch, blocks if kind == "layer" else 1, trust_code)
        for subject in measured.subjects(kind)
        if any(True for _ in measured.select(kind, phase, subject))
    ]


def choice(
    measured: Measurements, subject: str, kind: Kind, length: int, batch: int, blocks: int, trust_code: bool = False
) -> Choice:
    """What one subject needs and takes, `blocks` times where it is a layer."""
    settings = measured.settings
    dtype = pick_dtype(settings["dtype"])
    assert dtype is not None
    found = Choice(subject, kind)
    try:
        counted = sizes(subject, kind, settings.get("d_model"), length, batch, dtype, trust_code)
    except UserError as error:
        found.cannot = dict.fromkeys(PHASES, str(error))
        return found
    found.weights, found.grows = blocks * counted.weights, counted.grows
    found.state = None if counted.state is None else blocks * counted.state
    more = batch / settings["batch"]
    for phase in PHASES:
        points = list(measured.select(kind, phase, subject))
        if counted.cannot and (phase == "decode" or counted.too_long):
            found.cannot[phase] = counted.cannot
            continue
        time = predict_step(points, length, grows=counted.grows) if phase == "decode" else predict(points, "ms", length)
        peak = predict(points, "peak_bytes", length)
        if (fitted := fit(points, "ms")) is not None:
            found.powers[phase] = fitted.exponent
        if time is None:
            notes = [p.note for p in points if p.note and p.ms is None]
            few = "measured at too few lengths" if any(p.ms for p in points) else "not measured"
            found.cannot[phase] = next(iter(notes), few)
        else:
            found.times[phase] = time.times(blocks * more)
        if peak is None and phase == "decode":  # one token's: next to nothing
            found.memory[phase] = _held(phase, counted, blocks, 0.0)
        elif peak is not None:
            found.memory[phase] = _held(phase, counted, blocks, more * peak.value)
    return found


def _held(phase: Phase, counted: Sizes, blocks: int, peak: float) -> float:
    """Bytes at the peak of a stack, from those above the inputs of one layer."""
    if phase == "train":  # gradients are part of the peak
        return blocks * (counted.weights + 2 * 4 * counted.parameters + peak)
    state = counted.state or 0
    once = max(peak - state, 0) if phase == "prefill" else peak  # prefill makes its state
    return blocks * (counted.weights + state) + once


def rank(choice: Choice, phase: Phase, memory: int) -> tuple[int, float]:
    """What fits first, the fastest of it first; then what does not fit; then what cannot."""
    if phase not in choice.times:
        return 3, 0.0
    if phase not in choice.memory:
        return 1, choice.times[phase].value
    fits = choice.memory[phase] <= memory
    return (0, choice.times[phase].value) if fits else (2, choice.memory[phase])


def why(choice: Choice, phase: Phase, memory: int) -> str:
    """The row's reason, in a few words."""
    return "; ".join(_reasons(choice, phase, memory)) if phase in choice.times else choice.cannot[phase]


def _reasons(choice: Choice, phase: Phase, memory: int) -> Iterator[str]:
    needed, time = choice.memory.get(phase), choice.times[phase]
    if needed is None:
        yield "its memory was not measured"
    elif needed > memory:
        state = 0 if phase == "train" else choice.state or 0
        parts = {"weights": choice.weights, "state": state}
        parts["activations"] = round(needed) - sum(parts.values())
        largest = max(parts, key=lambda name: parts[name])
        more = " and gradients" if phase == "train" and largest == "activations" else ""
        yield f"does not fit: {short(parts[largest], 'B')} of {largest}{more}"
    if phase == "decode" and choice.state is not None:
        size = short(choice.state, "B")
        yield f"reads a {size} cache, which grows" if choice.grows else "state of one size"
    elif phase in choice.powers and not time.extrapolated:
        yield f"grows as T^{choice.powers[phase]:.2f}"
    if time.how != "measured" and (choice.grows or phase != "decode"):
        yield time.how


def row(choice: Choice, measured: Measurements, given: Any, memory: int) -> dict[str, Any]:
    """A row of the CSV file."""
    found: dict[str, Any] = {"subject": choice.subject, "kind": choice.kind, "length": given.length}
    for phase in PHASES:
        time, held = choice.times.get(phase), choice.memory.get(phase)
        for name, figure in zip(("", "low ", "high "), time[:3] if time else [None] * 3, strict=True):
            found[f"{phase} {name}ms"] = figure
        found[f"{phase} from"] = time.how if time else choice.cannot.get(phase)
        found[f"{phase} bytes"] = held and round(held)
        found[f"{phase} fits"] = held and held <= memory
    return found | {"state bytes": choice.state, "weight bytes": choice.weights or None, "measured": measured.created}


def _table(
    ranked: Sequence[Choice], measured: Measurements, name: str, kind: Kind, given: Any, memory: int, width: int
) -> Table:
    """Where there is no room for all columns those of the phase that was asked for."""
    settings, versions = measured.settings, measured.versions
    what = "Models" if kind == "model" else f"Stacks of {given.blocks} layers of width {settings['d_model']}"
    title = (
        f"{what}: {given.length:,} tokens, batch {given.batch}, {short(memory, 'B')}; best for {given.phase} first\n"
        f"{name}, {measured.machine['name']}, {settings['dtype']}, batch {settings['batch']}\n"
        f"measured {measured.created}, torch {versions.get('torch')}, subquad {versions.get('subquad')}"
    )
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    longest = max(len(choice.subject) for choice in ranked)
    table.add_column(kind, overflow="fold", min_width=min(longest, 16), max_width=22)
    timed = [phase for phase in PHASES if any(phase in choice.times for choice in ranked)]
    held = [phase for phase in timed if phase in ("train", "decode", given.phase)]
    if width < 100 + 9 * (len(held) > 2):
        timed = held = [given.phase]
    for heading in (*timed, *(f"memory,\n{phase}" for phase in held), "state"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold", ratio=1)
    for choice in ranked:
        figures = [_time(choice.times.get(phase)) for phase in timed]
        figures += [_memory(choice.memory.get(phase), memory) for phase in held]
        figures.append(short(choice.state, "B"))
        style = None if rank(choice, given.phase, memory)[0] < 2 else "dim"
        table.add_row(escape(choice.subject), *figures, escape(why(choice, given.phase, memory)), style=style)
    return table


def _time(time: Prediction | None) -> str:
    """Three digits with a unit."""
    if time is None:
        return "-"
    value, unit = time.value, "ms"
    for longer, factor in (("s", 1000), ("min", 60), ("h", 60)):
        if value < 1.5 * factor:
            break
        value, unit = value / factor, longer
    return f"{'~' * time.extrapolated}{value:#.3g}".rstrip(".") + f" {unit}"


def _memory(held: float | None, memory: int) -> str:
    if held is None:
        return "-"
    return short(held, "B") + ("!" if held > memory else "")
