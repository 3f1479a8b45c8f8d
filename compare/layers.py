"""`subquad compare layers`: what layers cost against length, measured.

Training is one forward and backward pass; prefill reads all tokens with a state and without gradients; decode reads
single tokens after that. Times are the best of the repeats, on the wall clock.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
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

MEASURES = {"train ms": "train", "prefill ms": "prefill", "decode ms": "decode, a token", "state bytes": "state"}
Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the files asked for."""
    mixers = [name for name, layer in available().items() if layer.kind == "mixer"]
    parser = Parser(prog="subquad compare layers", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--layers", nargs="+", default=mixers, metavar="LAYER", help=LAYERS_HELP)
    parser.add_argument("--lengths", nargs="+", type=int, default=[256, 512, 1024, 2048], help="tokens (256 ... 2048)")
    parser.add_argument("--d-model", type=int, default=256, help="width (256)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (1)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens decoded after each prefill (16)")
    parser.add_argument("--repeat", type=int, default=3, help="the best of this many runs counts (3)")
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
    layers = {name: layer.to(device, dtype) for name, layer in (_build(text, given.d_model) for text in given.layers)}

    rows: list[Row] = []
    lengths = sorted(set(given.lengths))
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(layers) * len(lengths))
        for name, layer in layers.items():
            for length in lengths:
                progress.update(task, description=f"{name}, {length} tokens")
                x = torch.randn(given.batch, length, given.d_model, device=device, dtype=dtype)
                rows.append({"layer": name, "tokens": length, **measure(layer, x, given.new_tokens, given.repeat)})
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


def _build(text: str, d_model: int) -> tuple[str, nn.Module]:
    """What to call the layer that a word of --layers stands for, and the layer."""
    try:
        spec = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--layers: {text!r} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(spec, str | dict):
        raise UserError(f"--layers: {text!r} is neither a layer's name nor a mapping {{name: ..., ...}}")
    layer = build_layer("--layers", spec, d_model=d_model, layer_idx=0, n_layers=1)
    if isinstance(spec, str):
        return spec, layer
    return ", ".join([spec["name"], *(f"{key} {value}" for key, value in spec.items() if key != "name")]), layer


def measure(layer: nn.Module, x: Tensor, new_tokens: int, repeat: int) -> Row:
    """The figures of one layer on one input [B, T, D]; None where a layer cannot decode."""
    upstream = torch.randn_like(x)

    def train() -> None:
        layer.zero_grad(set_to_none=True)
        y, _ = layer(x.detach().requires_grad_())
        y.backward(upstream)

    row: Row = {"train ms": _best(train, repeat, x.device), "prefill ms": None, "decode ms": None, "state bytes": None}
    layer.zero_grad(set_to_none=True)
    if not hasattr(layer, "init_state"):
        return row
    with torch.no_grad():
        state = layer.init_state(x.shape[0], x.shape[1], x.dtype)
        row["state bytes"] = sum(tensor.nbytes for _, _, tensor in leaves(state))
        prefill, decode = zip(*(_generate(layer, x, new_tokens) for _ in range(repeat + 1)), strict=True)
    # The first run warms up.
    return row | {"prefill ms": min(prefill[1:]), "decode ms": min(decode[1:])}


def _generate(layer: nn.Module, x: Tensor, new_tokens: int) -> tuple[float, float]:
    """Milliseconds of the prefill and of one decoded token."""
    state = layer.init_state(x.shape[0], x.shape[1] + new_tokens, x.dtype)
    times = _clock(x.device)
    begin = next(times)
    _, state = layer(x, state)
    middle = next(times)
    for _ in range(new_tokens):
        _, state = layer(x[:, -1:], state)
    return 1e3 * (middle - begin), 1e3 * (next(times) - middle) / new_tokens


def _best(run: Callable[[], None], repeat: int, device: torch.device) -> float:
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
    table.add_column("layer", overflow="fold")
    for heading in ("tokens", "train ms", "prefill ms", "decode ms\na token", "state\nbytes"):
        table.add_column(heading, justify="right")
    for i, row in enumerate(rows):
        figures = ["-" if row[key] is None else f"{row[key]:,.3g}" for key in list(MEASURES)[:3]]
        size = "-" if row["state bytes"] is None else f"{row['state bytes']:,}"
        new = i == 0 or rows[i - 1]["layer"] != row["layer"]
        last = i + 1 == len(rows) or rows[i + 1]["layer"] != row["layer"]
        table.add_row(row["layer"] if new else "", f"{row['tokens']:,}", *figures, size, end_section=last)
    return table
