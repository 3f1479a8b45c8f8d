"""`subquad compare forms`: every layer's vectorised form against its plain recurrence.

Both run the same layer in this process, in turn, and the best of the repeats counts, in milliseconds of CPU time.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

from subquad.arguments import Parser
from subquad.compare.output import csv_writer
from subquad.errors import UserError, nearest
from subquad.infer.output import check_output, write_atomically
from subquad.kernels.backend import backend
from subquad.layers import available

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the file asked for."""
    layers = available()
    mixers = [name for name, layer in layers.items() if layer.kind == "mixer"]
    parser = Parser(prog="subquad compare forms", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--layers", nargs="+", default=mixers, metavar="LAYER", help="names; by default every mixer")
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 2048], help="tokens (64 2048)")
    parser.add_argument("--d-model", type=int, default=256, help="width (256)")
    parser.add_argument("--repeat", type=int, default=3, help="the best of this many runs counts (3)")
    parser.add_argument("--threads", type=int, default=1, help="threads (1)")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    given = parser.parse_args(argv)
    for name in ("d_model", "repeat", "threads"):
        parser.at_least(given, name, 1)
    if min(given.lengths) < 1:
        raise UserError(f"--lengths has {min(given.lengths)}; a length is at least 1")
    for name in given.layers:
        if name not in layers:
            raise UserError(f"there is no layer {name!r}; {nearest(name, layers)}")
    if given.csv:
        check_output(given.csv, overwrite=given.overwrite)

    threads = torch.get_num_threads()
    torch.set_num_threads(given.threads)
    try:
        cases = [(name, length) for name in given.layers for length in sorted(set(given.lengths))]
        console = Console(stderr=True)
        rows = [
            {
                "layer": name,
                "tokens": length,
                **measure(layers[name](given.d_model), length, given.d_model, given.repeat),
            }
            for name, length in track(cases, "measuring", console=console, transient=True)
        ]
    finally:
        torch.set_num_threads(threads)
    title = (
        f"Width {given.d_model}, batch 1, {given.threads} thread(s), torch {torch.__version__}: CPU ms, naive / torch"
    )
    Console().print(_table(rows, title))
    if given.csv:
        write_atomically(given.csv, csv_writer(rows), overwrite=given.overwrite)
    return 0


def measure(layer: nn.Module, length: int, d_model: int, repeat: int) -> Row:
    """CPU milliseconds of a pass without gradients, and of a forward and backward pass, in both forms."""
    x = torch.randn(1, length, d_model)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def train() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x)[0].sum().backward()

    row: Row = {}
    for what, run in (("forward", forward), ("train", train)):
        times: dict[str, float] = {}
        for form in ("torch", "naive") * repeat:
            with backend(form):
                times[form] = min(times.get(form, float("inf")), _cpu_ms(run))
        row |= {f"{what} {form} ms": times[form] for form in ("naive", "torch")}
        row[f"{what} ratio"] = times["naive"] / times["torch"]
    return row


def _cpu_ms(run: Callable[[], None]) -> float:
    begin = process_time()
    run()
    return 1e3 * (process_time() - begin)


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layer", no_wrap=True)
    for heading in ("tokens", "forward\nnaive", "torch", "ratio", "training\nnaive", "torch", "ratio"):
        table.add_column(heading, justify="right")
    for row in rows:
        figures = [f"{row[key]:,.3g}" for key in list(row)[2:]]
        for at in (2, 5):
            figures[at] = f"{float(row[list(row)[2 + at]]):.2f}x"
        table.add_row(row["layer"], f"{row['tokens']:,}", *figures)
    return table
