"""`subquad compare forms`: every op's vectorised form against its plain recurrence, alone and in its layer.

Both forms run in this process, in turn, and the best of the repeats counts, in milliseconds of CPU time. The op alone
gets what the layer gives it; the table shows how many times faster the vectorised form is, the file the milliseconds.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import process_time
from typing import Any

import torch
import torch.utils._pytree as pytree
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from subquad.arguments import Parser
from subquad.compare.costs import mixing
from subquad.compare.output import csv_writer
from subquad.errors import UserError, nearest
from subquad.files import check_output, write_atomically
from subquad.kernels.backend import Call, backend, recorded_calls
from subquad.layers import available
from subquad.layers.base import Layer

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
        f"Naive / torch, CPU time; width {given.d_model}, batch 1, {given.threads} thread(s), torch {torch.__version__}"
    )
    Console().print(_table(rows, title))
    if given.csv:
        write_atomically(given.csv, csv_writer(rows), overwrite=given.overwrite)
    return 0


def measure(layer: Layer, length: int, d_model: int, repeat: int) -> Row:
    """CPU milliseconds of a pass without gradients, and of a forward and backward pass: the op's and the layer's."""
    x = torch.randn(1, length, d_model)
    with backend("torch"), recorded_calls() as calls:
        layer(x)
    calls = mixing(layer, calls)

    def op(form: str) -> None:
        for call in calls:
            _sum_backward(_again(call, form))

    def whole(form: str) -> None:
        layer.zero_grad(set_to_none=True)
        _sum_backward(layer(x))

    row: Row = {}
    for what, run in (("op", op), ("layer", whole)):
        for how, grad in (("forward", False), ("train", True)):
            times: dict[str, float] = {}
            for form in ("torch", "naive") * repeat:
                with backend(form), torch.set_grad_enabled(grad):
                    times[form] = min(times.get(form, float("inf")), _cpu_ms(partial(run, form)))
            row |= {f"{what} {how} {form} ms": times[form] for form in ("naive", "torch")}
            row[f"{what} {how} ratio"] = times["naive"] / times["torch"]
    layer.zero_grad(set_to_none=True)
    return row


def _again(call: Call, form: str) -> Any:
    """The call once more, on leaves, so that a backward pass ends at the op."""
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), (call.args, call.kwargs)
    )
    return call.forms[form](*args, **kwargs)


def _sum_backward(results: Any) -> None:
    """From the sum of the output, which comes first; nothing where no gradients are recorded."""
    out = pytree.tree_leaves(results)[0]
    if out.requires_grad:
        (torch.view_as_real(out) if out.is_complex() else out).sum().backward()


def _cpu_ms(run: Callable[[], None]) -> float:
    begin = process_time()
    run()
    return 1e3 * (process_time() - begin)


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("layer", no_wrap=True)
    for heading in ("tokens", "op\nforward", "op\ntrain", "layer\nforward", "layer\ntrain"):
        table.add_column(heading, justify="right")
    for row in rows:
        ratios = [f"{figure:.2f}x" for key, figure in row.items() if key.endswith("ratio")]
        table.add_row(row["layer"], f"{row['tokens']:,}", *ratios)
    return table
