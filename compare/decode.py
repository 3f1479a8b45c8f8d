"""`subquad compare decode`: how fast whole models decode, and the state they carry, against their context.

A CONFIG is what `subquad compare models` takes; its weights are random. Each context is read and then followed by
--new-tokens tokens through the loop of `subquad infer`, one token a sequence and step, greedily, in turn at every
context; the time of a step is the median of them all. Of a context longer than --read only the first --read tokens
are read: the caches then hold these tokens' entries again and again, and the count says the context's length, so that
a step reads as many bytes as it would. A state that differs by more than its caches' lengths is read to the end.

State: bytes as allocated for the context and the new tokens. What a step must move at the least: the weights that a
token reads and the state, each once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from subquad.arguments import Parser
from subquad.compare import results
from subquad.compare.decode_picture import draw
from subquad.compare.meters import free_bytes
from subquad.compare.models import active_parameters, find_config
from subquad.compare.output import csv_writer, short, typed
from subquad.compare.results import Point
from subquad.errors import UserError, one_line
from subquad.files import check_output, write_atomically
from subquad.infer.device import DTYPES, pick_device, pick_dtype
from subquad.infer.generate import Context, decode
from subquad.infer.sampling import Sampling
from subquad.infer.state import nbytes
from subquad.kernels.state import leaves
from subquad.models.config import LMConfig
from subquad.models.lm import LM

WARM_UP = 3  # decoded tokens that do not count
FILLED = "{:,} tokens read, the caches filled with their entries again and again"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the files asked for."""
    parser = Parser(prog="subquad compare decode", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="shipped names, files, folders of saved models")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 4096, 16384], help="tokens (1024 4096 16384)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (1)")
    parser.add_argument("--new-tokens", type=int, default=64, help="decoded after each context (64)")
    parser.add_argument("--read", type=int, default=8192, help="tokens read of a longer context (8192)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else cpu")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES) + " (float32), of weights and caches")
    parser.add_argument("--trust-code", action="store_true", help="let what lies in a model's folder import classes")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--json", type=Path, help="write the measurements here, for compare pick --from")
    parser.add_argument("--png", type=Path, help="draw tokens a second and state bytes here")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    given = parser.parse_args(argv)
    for name in ("batch", "read"):
        parser.at_least(given, name, 1)
    parser.at_least(given, "new_tokens", 2)  # quartiles
    if min(given.contexts) < 1:
        raise UserError(f"--contexts has {min(given.contexts)}; a context is at least 1")
    device, dtype = pick_device(given.device), pick_dtype(given.dtype)
    assert dtype is not None
    for path in filter(None, (given.csv, given.json, given.png)):
        check_output(path, overwrite=given.overwrite)
    found = {name: find_config(name, trust_code=given.trust_code) for name in given.configs}
    sketches = {name: sketch_of(name, config) for name, config in found.items()}
    contexts = sorted(set(given.contexts))
    settings = {name: getattr(given, name) for name in ("batch", "dtype", "new_tokens", "read")}
    setting = Setting(given.batch, given.new_tokens, given.read, device, dtype)
    measured = results.begin(typed("compare decode", argv), device, settings)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(found) * len(contexts))
        for name, config in found.items():
            progress.update(task, description=name)
            points = []
            for point in measure(name, config, sketches[name], contexts, setting):
                points.append(point)
                progress.advance(task)
            measured.points.extend(sorted(points, key=lambda point: point.tokens))

    console = Console()
    console.print(_table(measured))
    for note in _notes(measured):
        console.print(f"- {note}", markup=False, highlight=False)
    if given.csv:
        write_atomically(given.csv, csv_writer(rows(measured)), overwrite=given.overwrite)
    if given.json:
        measured.save(given.json, overwrite=given.overwrite)
    if given.png:
        write_atomically(given.png, lambda path: draw(measured, path), overwrite=given.overwrite)
    return 0


def sketch_of(name: str, config: LMConfig) -> LM:
    """The model without its values."""
    try:
        with torch.device("meta"):
            return LM(config).eval()
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


class Setting(NamedTuple):
    batch: int
    new_tokens: int
    read: int
    device: torch.device
    dtype: torch.dtype


def measure(name: str, config: LMConfig, sketch: LM, contexts: Sequence[int], setting: Setting) -> Iterator[Point]:
    """One model's points, with a note in the place of what it cannot do or has no room for.

    The contexts whose states fit side by side take turns, so that what else the machine does falls on all alike.
    """
    dtype = setting.dtype
    weights = sum(p.numel() for p in sketch.parameters()) * dtype.itemsize
    table = 0 if config.tie_embeddings else sketch.embedding.weight.numel() - config.d_model
    read_a_token = (active_parameters(sketch) - table) * dtype.itemsize
    room = free_bytes(setting.device) - weights
    together: list[Point] = []
    model: LM | None = None
    for context in contexts:
        point = Point(name, "model", "decode", context)
        try:
            state = state_bytes(sketch, setting.batch, context + WARM_UP + setting.new_tokens, dtype)
        except UserError as error:
            yield replace(point, note=one_line(error))
            continue
        point = replace(point, state_bytes=state, bytes=read_a_token + state)
        if state > room:
            yield replace(point, note=f"does not fit: needs about {short(weights + state, 'B')}")
            continue
        model = model or _made(config, setting)
        if sum(p.state_bytes or 0 for p in (*together, point)) > room:
            yield from _in_turn(model, together, setting)
            together = []
        together.append(point)
    if model is not None:
        yield from _in_turn(model, together, setting)


def _made(config: LMConfig, setting: Setting) -> LM:
    with torch.device(setting.device):
        torch.manual_seed(0)
        return LM(config).to(setting.dtype).eval()


def _in_turn(model: LM, points: Sequence[Point], setting: Setting) -> Iterator[Point]:
    """The points with their times, or with a note where memory ran out all the same."""
    loops: dict[Point, Iterator[Any]] = {}
    found: dict[Point, list[float]] = {}
    notes: dict[Point, str] = {}
    for point in points:
        try:
            start, filled = begin(model, setting.batch, point.tokens, setting.new_tokens, setting.read)
        except (torch.OutOfMemoryError, MemoryError):
            notes[point] = f"does not fit beside the weights: the state and reading {point.tokens:,} tokens"
            continue
        notes[point] = FILLED.format(setting.read) if filled else ""
        loops[point], found[point] = decode(start, Sampling(), WARM_UP + setting.new_tokens), []
    for turn in range(WARM_UP + setting.new_tokens):
        for point in loops if turn % 2 else reversed(loops):
            _wait(setting.device)
            before = perf_counter()
            next(loops[point])
            _wait(setting.device)
            found[point].append(1e3 * (perf_counter() - before))
    for point in points:
        low = middle = high = None
        if point in found:
            low, middle, high = quantiles(found[point][WARM_UP:], n=4, method="inclusive")
        yield replace(point, ms=middle, low_ms=low, high_ms=high, note=notes[point])


def state_bytes(sketch: LM, batch: int, max_len: int, dtype: torch.dtype) -> int:
    with torch.device("meta"), torch.no_grad():
        return nbytes(sketch.init_state(batch, max_len, dtype))


def begin(model: LM, batch: int, context: int, new_tokens: int, read: int) -> tuple[Context, bool]:
    """Sequences of which `context` tokens will have been read when the first is decoded; were caches filled for it?"""
    vocabulary = model.config.vocab_size
    prompts = [torch.randint(vocabulary, (context,), dtype=torch.int32) for _ in range(batch)]
    more = WARM_UP + new_tokens
    if context <= read:
        return _read(Context.start(model, prompts, list(range(batch)), more)), False
    # One more than is read: the last token of a prompt is left for the first step.
    short_start = Context.start(model, [p[: read + 1] for p in prompts], list(range(batch)), 0)
    full = model.init_state(batch, context + more)
    if not fillable(short_start.state, full):
        return _read(Context.start(model, prompts, list(range(batch)), more)), False
    start = _read(short_start)
    start.state = fill(start.state, full, read, context - 1)
    start.lengths = [context - 1] * batch
    return start, True


def _read(context: Context) -> Context:
    for _ in context.read():
        pass
    return context


def fillable(source: Any, target: Any) -> bool:
    """Do the two differ by the length of their caches alone?"""
    pairs = zip(leaves(source), leaves(target), strict=True)
    return all(a.shape == b.shape or (kind == "append" and a.shape[1] > 0) for (_, kind, a), (_, _, b) in pairs)


@torch.no_grad()
def fill(source: Any, target: Any, read: int, context: int) -> Any:
    """`target` as if `context` tokens had been read: the values of `source` after `read` of them, its caches' entries
    again and again."""
    for (_, kind, old), (_, _, new) in zip(leaves(source), leaves(target), strict=True):
        if kind == "count":
            new.copy_(old + (context - read))
        elif kind == "append":
            rows = max(old.shape[1] * read // (read + 1), 1)  # those that are filled
            for begin in range(0, new.shape[1], rows):
                part = new[:, begin : begin + rows]
                part.copy_(old[:, : part.shape[1]])
        else:
            new.copy_(old)
    return target


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def tokens_per_second(point: Point, batch: int) -> float | None:
    return None if point.ms is None else 1e3 * batch / point.ms


def rows(measured: results.Measurements) -> list[dict[str, Any]]:
    """The rows of the CSV file."""
    return [
        {
            "model": point.subject,
            "context": point.tokens,
            "tokens/s": tokens_per_second(point, measured.settings["batch"]),
            "ms": point.ms,
            "low ms": point.low_ms,
            "high ms": point.high_ms,
            "state bytes": point.state_bytes,
            "bytes": point.bytes,
            "note": point.note,
        }
        for point in measured.points
    ]


def _table(measured: results.Measurements) -> Table:
    settings = measured.settings
    about = f"batch {settings['batch']}, {settings['dtype']}, torch {measured.versions['torch']}"
    table = Table(title=f"Decoding on {measured.machine['name']}, {about}", title_justify="left", box=SIMPLE_HEAD)
    table.show_edge, table.padding = False, (0, 1, 0, 0)
    longest = max(len(point.subject) for point in measured.points)
    table.add_column("model", overflow="fold", min_width=min(longest, 20))
    for heading in ("context", "tokens/s", "ms\na step", "of the\nshortest", "state", "least moved\na step"):
        table.add_column(heading, justify="right", no_wrap=True)
    first: dict[str, float] = {}
    for i, point in enumerate(measured.points):
        speed = tokens_per_second(point, settings["batch"])
        cells = ["-", "-", "-"]
        if speed is not None:
            ratio = speed / first.setdefault(point.subject, speed)
            cells = [f"{speed:,.1f}", f"{point.ms:,.3g}", f"{ratio:.2f}x"]
        mark = "*" if point.note and speed is not None else ""
        new = i == 0 or measured.points[i - 1].subject != point.subject
        last = i + 1 == len(measured.points) or measured.points[i + 1].subject != point.subject
        sizes = [short(size, "B") for size in (point.state_bytes, point.bytes)]
        name = escape(point.subject) if new else ""
        table.add_row(name, f"{mark}{point.tokens:,}", *cells, *sizes, end_section=last)
    return table


def _notes(measured: results.Measurements) -> Iterator[str]:
    """Each note once, with what it is about."""
    where: dict[str, dict[str, list[str]]] = {}
    for point in measured.points:
        if point.note:
            mark = "" if point.ms is None else "*"
            where.setdefault(f"{mark}{point.note}", {}).setdefault(point.subject, []).append(f"{point.tokens:,}")
    for note, subjects in where.items():
        if note.startswith("*"):
            yield note
        else:
            yield f"{'; '.join(f'{name} at ' + ' and '.join(contexts) for name, contexts in subjects.items())}: {note}"
