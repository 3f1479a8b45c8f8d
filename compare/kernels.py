"""`subquad compare kernels`: the Triton forms on the GPU at hand, against the memory floor and other libraries.

Times are on the GPU's clock, the least of three medians. The floor is what moving the bytes takes at the rate of a
copy, measured in the same run: a forward pass reads its inputs and writes its output, training also reads inputs and
upstream gradient and writes the gradients.
"""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from subquad.arguments import Parser
from subquad.compare.kernel_bars import draw
from subquad.compare.kernel_cases import CASES, PEERS, Case, Sizes, Tensors
from subquad.compare.kernel_timing import copy_rate, floor, measure, trainable
from subquad.compare.kernel_tune import tune
from subquad.compare.output import csv_writer, json_writer, typed
from subquad.compare.results import begin
from subquad.errors import UserError, nearest
from subquad.files import check_output, write_atomically
from subquad.infer.device import DTYPES, pick_dtype
from subquad.kernels.backend import backend
from subquad.kernels.examples import Example, load_ops, relative_error
from subquad.kernels.triton import configs

SHAPES = ("B8T2048H16D128", "B1T32768H16D128")
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables, write the files asked for; 1 if one of our kernels failed."""
    parser = Parser(prog="subquad compare kernels", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--ops", nargs="+", metavar="OP", help="by default every op with a Triton form")
    parser.add_argument("--peer", action="append", default=[], metavar="P", help=f"{', '.join(PEERS)}; more than once")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxTxHxDx", help=" ".join(SHAPES))
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES) + " (bfloat16)")
    parser.add_argument("--cold", action="store_true", help="with an empty compile cache, so that first calls compile")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--json", type=Path, help="write the rows here, with command, machine, versions and settings")
    parser.add_argument("--picture", type=Path, metavar="F.png", help="draw the bars here")
    parser.add_argument("--tune", action="store_true", help="find the best launch values, keep them, and end")
    parser.add_argument("--output", type=Path, help="with --tune: write the table here and not to your own")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    given = parser.parse_args(argv)
    shapes = [Sizes.parse(text) for text in given.shapes]
    dtype = pick_dtype(given.dtype)
    assert dtype is not None
    for peer in given.peer:
        _check_peer(peer)
    cases = _cases(given.ops)
    if given.output and not given.tune:
        raise UserError("--output is where --tune writes; what is measured goes to --csv, --json and --picture")
    if given.tune and (given.peer or given.csv or given.json or given.picture or given.cold):
        raise UserError("--tune finds launch values and ends; give it --ops, --shapes, --dtype and --output only")
    for path in filter(None, (given.csv, given.json, given.picture, given.output)):
        check_output(path, overwrite=given.overwrite)
    _require_gpu()
    if given.tune:
        return _tune(cases, shapes, dtype, given.output)

    title = f"{torch.cuda.get_device_name()}, {given.dtype}, torch {torch.__version__}, {_triton()}"
    with _empty_compile_cache() if given.cold else nullcontext():
        rows, rate = _measure_all(cases, shapes, dtype, list(dict.fromkeys(given.peer)))
    title += f", copies at {rate / 1e12:.2f} TB/s"
    console = Console()
    for shape in shapes:
        console.print(table([row for row in rows if row["shape"] == str(shape)], f"{title}\n{shape}"))
    for row in rows:
        if row["note"]:
            console.print(f"{row['case']}, {row['library']}, {row['shape']}: {row['note']}", markup=False)
    if given.csv:
        write_atomically(given.csv, csv_writer(rows), overwrite=given.overwrite)
    if given.json:
        settings = {"dtype": given.dtype, "cold": given.cold, "copy_tb_s": rate / 1e12}
        about = begin(typed("compare kernels", argv), torch.device("cuda", torch.cuda.current_device()), settings)
        about.versions.update({peer: _version(PEERS[peer]) for peer in given.peer if peer != "torch"})
        write_atomically(given.json, json_writer(about, rows), overwrite=given.overwrite)
    if given.picture:
        write_atomically(given.picture, lambda path: draw(rows, title, path), overwrite=given.overwrite)
    return int(any(row["library"] == "ours" and row["note"] for row in rows))


def _check_peer(peer: str) -> None:
    if peer not in PEERS:
        raise UserError(f"--peer: there is no peer {peer!r}; {nearest(peer, PEERS)}")
    if find_spec(PEERS[peer]) is None:
        raise UserError(f"--peer {peer}: the package {PEERS[peer]} is not installed here")


def _cases(ops: Sequence[str] | None) -> list[Case]:
    """The cases of the ops asked for, which must all have a Triton form; by default of all that have one."""
    forms = load_ops()
    known = dict.fromkeys(case.op for case in CASES)
    for op in ops or ():
        if op not in known:
            raise UserError(f"--ops: there is no {op!r} to measure; {nearest(op, known)}")
        if "triton" not in forms[op]:
            raise UserError(f"--ops: {op} has no Triton form yet; it has: {', '.join(forms[op])}")
    chosen = [case for case in CASES if "triton" in forms[case.op] and case.op in (ops or known)]
    if not chosen:
        raise UserError("no op has a Triton form yet, so there is nothing to measure")
    return chosen


def _require_gpu() -> None:
    if not torch.cuda.is_available():
        raise UserError("subquad compare kernels needs an NVIDIA GPU, and torch sees none here")


def _version(package: str) -> str:
    """Of the distribution that brings a package (fla comes with flash-linear-attention and with fla-core)."""
    return " ".join(sorted({f"{name} {version(name)}" for name in packages_distributions().get(package, [])}))


def _triton() -> str:
    import triton

    return f"triton {triton.__version__}"


@contextmanager
def _empty_compile_cache() -> Iterator[None]:
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def progress_bar() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    # Without a thread of its own, which would run beside the calls that are timed.
    return Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)


def _measure_all(
    cases: Sequence[Case], shapes: Sequence[Sizes], dtype: torch.dtype, peers: Sequence[str]
) -> tuple[list[Row], float]:
    """A row for each case, shape and library, and the rate of a copy in bytes a second."""
    device = torch.device("cuda", torch.cuda.current_device())
    rate = copy_rate(device)
    rows = []
    with progress_bar() as progress:
        task = progress.add_task("", total=len(cases) * len(shapes))
        for shape in shapes:
            for case in cases:
                progress.update(task, description=f"{case.name}, {shape}")
                progress.refresh()
                example = case.example(shape, dtype, device)
                rows += compare(case, example, str(shape), rate, peers)
                progress.advance(task)
    return rows, rate


def compare(case: Case, example: Example, shape: str, rate: float, peers: Sequence[str]) -> list[Row]:
    """The rows of one case: ours and each of the peers that has it."""
    tensors = trainable(example.inputs, case.constants)
    calls: dict[str, tuple[Callable[[Tensors], Tensor], Tensors]] = {"ours": (_form(example, "triton"), tensors)}
    for peer in peers:
        if peer == "torch":
            calls[peer] = _form(example, "torch"), tensors
        elif peer in case.peers:
            prepared = case.peers[peer].prepare(example.inputs)
            calls[peer] = case.peers[peer].call, trainable(prepared, case.constants)
    rows: list[Row] = []
    ours: Tensor | None = None
    for library, (call, inputs) in calls.items():
        row: Row = {"case": case.name, "op": case.op, "shape": shape, "dtype": _dtype(example), "library": library}
        try:
            figures, out = measure(call, inputs)
        except Exception as error:  # a kernel that does not compile or run: the row says so, and the others go on
            row |= dict.fromkeys(COLUMNS) | {"note": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        else:
            least = floor(tensors, out, rate)
            row |= {"forward ms": figures.forward_ms, "forward floor ms": least.forward_ms}
            row["forward / floor"] = figures.forward_ms / least.forward_ms
            row |= {"train ms": figures.train_ms, "train floor ms": least.train_ms}
            row["train / floor"] = figures.train_ms / least.train_ms
            row |= {"peak MiB": figures.peak_mib, "first call s": figures.first_s}
            if library == "ours":
                ours = out
            row["difference"] = None if ours is None or library == "ours" else relative_error(out, ours)
            for phase in ("forward", "train"):
                mine = rows[0][f"{phase} ms"] if rows else None
                row[f"{phase} / ours"] = None if mine is None else row[f"{phase} ms"] / mine
            row["note"] = ""
        rows.append(row)
        torch.cuda.empty_cache()
    return rows


COLUMNS = (
    *("forward ms", "forward floor ms", "forward / floor", "train ms", "train floor ms", "train / floor"),
    *("peak MiB", "first call s", "difference", "forward / ours", "train / ours", "note"),
)


def _dtype(example: Example) -> str:
    return str(next(iter(example.inputs.values())).dtype).removeprefix("torch.")


def _form(example: Example, form: str) -> Callable[[Tensors], Tensor]:
    """The op in one of its forms, on tensors to be given."""

    def call(tensors: Tensors) -> Tensor:
        with backend(form):
            return example._replace(inputs=tensors).call()[0]

    return call


def table(rows: Sequence[Row], title: str) -> Table:
    """One shape's rows, ours under the case's name: milliseconds, how many times the floor, how many times ours."""
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    phases = ("forward", "train")
    for heading in ("forward\nms", "over\nfloor", "over\nours", "both\nms", "over\nfloor", "over\nours"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for heading in ("peak\nMiB", "first\ncall s"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        cells = [
            _number(row[key], spec)
            for phase in phases
            for key, spec in ((f"{phase} ms", ".3f"), (f"{phase} / floor", ".1f"), (f"{phase} / ours", ".2f"))
        ]
        cells += [_number(row["peak MiB"], ",.0f"), _number(row["first call s"], ".1f")]
        last = i + 1 == len(rows) or rows[i + 1]["case"] != row["case"]
        shown.add_row(row["case"] if row["library"] == "ours" else f"  {row['library']}", *cells, end_section=last)
    return shown


def _number(x: float | None, spec: str) -> str:
    return "-" if x is None else format(x, spec)


def _tune(cases: Sequence[Case], shapes: Sequence[Sizes], dtype: torch.dtype, output: Path | None) -> int:
    """Tune, say what changed and write it: to `output`, else into the user's table."""
    device = torch.device("cuda", torch.cuda.current_device())
    with progress_bar() as progress:
        found = tune(cases, shapes, dtype, device, progress)
    console, shown = Console(), Table(title=f"Best on {torch.cuda.get_device_name()}", title_justify="left")
    for heading in ("kernel", "widths", "values", "were", "time"):
        shown.add_column(heading, overflow="fold")
    for best in found:
        cells = (" ".join(f"{k}={v}" for k, v in part.items()) for part in (best.widths, best.values, best.before))
        shown.add_row(best.kernel, *cells, f"{best.gain:.2f}x")
    console.print(shown)
    target = output or configs.path()
    kept = {} if output else configs.read(target)
    capability = torch.cuda.get_device_capability(device)
    for best in found:
        entry = configs.Entry(capability, best.widths, best.values)
        others = [e for e in kept.get(best.kernel, []) if (e.capability, e.widths) != (capability, best.widths)]
        kept[best.kernel] = [*others, entry]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(target, lambda path: path.write_text(configs.text(kept), encoding="utf-8"), overwrite=True)
    configs.forget()
    console.print(f"Written to {target}", soft_wrap=True)
    return 0
