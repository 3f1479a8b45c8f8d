"""`subquad compare layers`: what layers cost against length, measured.

Training is one forward and backward pass; prefill reads all tokens with a state and without gradients; their times are
the best of the repeats, on the wall clock. Decode reads single tokens after that, in turn at every length, and is the
median of them all: what else the machine does falls on all lengths alike. Its ratio is to the shortest length.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn

from subquad.arguments import Parser
from subquad.compare.curves import draw
from subquad.compare.output import csv_writer
from subquad.errors import UserError
from subquad.infer.device import DTYPES, pick_device, pick_dtype
from subquad.infer.output import check_output, write_atomically
from subquad.kernels.state import leaves
from subquad.layers import available
from subquad.layers.build import build_layer

FIGURES = ("train ms", "prefill ms", "decode ms", "decode ratio")
PIECE = 4096  # tokens read at a time on the way to a long context
WARM_UP = 3  # decoded tokens that do not count
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the files asked for."""
    parser = Parser(prog="subquad compare layers", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help=LAYERS_HELP)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048], help="tokens (256 ... 2048)")
    parser.add_argument("--d-model", type=int, default=256, help="width (256)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (1)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens decoded at each length (64)")
    parser.add_argument("--repeat", type=int, default=3, help="of training and prefill the best of so many counts (3)")
    parser.add_argument("--only-decode", action="store_true", help=ONLY_DECODE_HELP)
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else cpu")
    parser.add_argument("--dtype", default="float32", help=", ".join(DTYPES) + " (float32)")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--png", type=Path, help="draw the curves here")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    given = parser.parse_args(argv)
    for name in ("d_model", "batch", "new_tokens", "repeat"):
        parser.at_least(given, name, 1)
    if min(given.lengths) < 1:
        raise UserError(f"--lengths has {min(given.lengths)}; a length is at least 1")
    device, dtype = pick_device(given.device), pick_dtype(given.dtype)
    for path in filter(None, (given.csv, given.png)):
        check_output(path, overwrite=given.overwrite)
    torch.manual_seed(0)
    layers = {
        name: layer.to(device, dtype)
        for name, layer in (_build(text, given.d_model) for text in given.layers or _mixers(given.only_decode))
    }
    if given.only_decode:
        for name, layer in layers.items():
            if not hasattr(layer, "init_state"):
                raise UserError(f"--only-decode: {name} cannot decode: it reads the whole sequence at once")

    rows: list[Row] = []
    lengths = sorted(set(given.lengths))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(layers))
        for name, layer in layers.items():
            progress.update(task, description=name)
            xs = [torch.randn(given.batch, n, given.d_model, device=device, dtype=dtype) for n in lengths]
            repeat = 0 if given.only_decode else given.repeat
            measured = measure(layer, xs, given.new_tokens, repeat)
            rows += [{"layer": name, "tokens": n, **row} for n, row in zip(lengths, measured, strict=True)]
            progress.advance(task)

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    title = f"Width {given.d_model}, batch {given.batch}, {given.dtype} on {where}, torch {torch.__version__}"
    Console().print(_table(rows, title))
    if given.csv:
        write_atomically(given.csv, csv_writer(rows), overwrite=given.overwrite)
    if given.png:
        write_atomically(given.png, lambda path: draw(rows, title, path), overwrite=given.overwrite)
    return 0


LAYERS_HELP = "names, or mappings with arguments such as '{name: Attention, window: 64}'; by default every mixer"
ONLY_DECODE_HELP = "no training and no prefill times; by default of every mixer whose state does not grow"


def _mixers(constant_state: bool) -> list[str]:
    """The names of all mixers, or of those that decode with a state of constant size."""
    mixers = [name for name, layer in available().items() if layer.kind == "mixer"]
    if not constant_state:
        return mixers
    return [name for name in mixers if available()[name].constant_state and hasattr(available()[name], "init_state")]


def _build(text: str, d_model: int) -> tuple[str, nn.Module]:
    """What to call the layer that a word of --layers stands for, and the layer."""
    spec = specification("--layers", text)
    return label(spec), build_layer("--layers", spec, d_model=d_model, layer_idx=0, n_layers=1)


def specification(option: str, text: str) -> str | dict[str, Any]:
    """The name or the mapping {name: ..., ...} that a word of the command line is."""
    try:
        spec = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{option}: {text!r} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(spec, str | dict):
        raise UserError(f"{option}: {text!r} is neither a name nor a mapping {{name: ..., ...}}")
    return spec


def label(spec: str | dict[str, Any]) -> str:
    """A name and its arguments in a row."""
    if isinstance(spec, str):
        return spec
    return ", ".join([str(spec.get("name")), *(f"{key} {value}" for key, value in spec.items() if key != "name")])


def measure(layer: nn.Module, xs: Sequence[Tensor], new_tokens: int, repeat: int) -> list[Row]:
    """The figures of one layer on inputs [B, T, D], shortest first; None where a layer cannot decode.

    repeat 0 leaves training and prefill out.
    """
    rows, states = [], []
    for x in xs:
        row: Row = dict.fromkeys(("train ms", "prefill ms", "decode ms", "decode ratio", "state bytes"))
        if repeat:
            row["train ms"] = _best(partial(_train, layer, x, torch.randn_like(x)), repeat, x.device)
            layer.zero_grad(set_to_none=True)
        rows.append(row)
        if hasattr(layer, "init_state"):
            with torch.no_grad():
                empty = layer.init_state(x.shape[0], x.shape[1], x.dtype)
                row["state bytes"] = sum(tensor.nbytes for _, _, tensor in leaves(empty))
                read = partial(_read, layer, x, new_tokens + WARM_UP)
                if repeat:
                    row["prefill ms"] = _best(read, repeat, x.device)
                states.append(read())
    if states:
        with torch.no_grad():
            times = _decode(layer, states, xs[0][:, -1:], new_tokens)
        for row, ms in zip(rows, times, strict=True):
            row |= {"decode ms": ms, "decode ratio": ms / times[0]}
    return rows


def _train(layer: nn.Module, x: Tensor, upstream: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    y, _ = layer(x.detach().requires_grad_())
    y.backward(upstream)


def _read(layer: nn.Module, x: Tensor, more: int) -> Any:
    """The state after x, with room for `more` tokens."""
    state = layer.init_state(x.shape[0], x.shape[1] + more, x.dtype)
    for piece in x.split(PIECE, 1):
        _, state = layer(piece, state)
    return state


def _decode(layer: nn.Module, states: list[Any], x: Tensor, new_tokens: int) -> list[float]:
    """Milliseconds of a token x [B, 1, D] after each state, medians of new_tokens turns."""
    found: list[list[float]] = [[] for _ in states]
    times = _clock(x.device)
    for turn in range(WARM_UP + new_tokens):
        order = range(len(states))
        for i in order if turn % 2 else reversed(order):
            begin = next(times)
            _, states[i] = layer(x, states[i])
            found[i].append(1e3 * (next(times) - begin))
    return [median(ms[WARM_UP:]) for ms in found]


def _best(run: Callable[[], Any], repeat: int, device: torch.device) -> float:
    """Milliseconds of the fastest run after one to warm up."""
    times = _clock(device)
    run()
    found = []
    for _ in range(repeat):
        begin = next(times)
        run()
        found.append(1e3 * (next(times) - begin))
    return min(found)


def _clock(device: torch.device) -> Iterator[float]:
    """Seconds at which the device has done all that was asked of it."""
    while True:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        yield perf_counter()


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    longest = max(len(row["layer"]) for row in rows)
    table.add_column("layer", overflow="fold", min_width=min(longest, 24))
    for heading in ("tokens", "train ms", "prefill ms", "decode ms\na token", "ratio", "state\nbytes"):
        table.add_column(heading, justify="right")
    for i, row in enumerate(rows):
        figures = ["-" if row[key] is None else f"{row[key]:,.3g}" for key in FIGURES]
        size = "-" if row["state bytes"] is None else f"{row['state bytes']:,}"
        new = i == 0 or rows[i - 1]["layer"] != row["layer"]
        last = i + 1 == len(rows) or rows[i + 1]["layer"] != row["layer"]
        table.add_row(row["layer"] if new else "", f"{row['tokens']:,}", *figures, size, end_section=last)
    return table
