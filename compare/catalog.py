"""`subquad layers`: the zoo as a table, and one layer's arguments."""

import inspect
import re
import sys
from collections.abc import Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from subquad.arguments import Parser
from subquad.compare import shipped
from subquad.compare.results import Measurements
from subquad.errors import UserError, nearest
from subquad.kernels.state import leaves
from subquad.layers import Layer, available

TIMED = ("prefill", "decode")
SHOWN = 4096  # tokens: of the lengths measured the longest that is not longer


def main(argv: Sequence[str] | None = None) -> int:
    """Print all layers, or one."""
    parser = Parser(prog="subquad layers", description=__doc__)
    parser.add_argument("name", nargs="?", help="a layer, for its docstring, arguments, types and defaults")
    parser.add_argument("--markdown", action="store_true", help="the table as in the README")
    options = parser.parse_args(argv)
    name, layers = options.name, available()
    if name is not None and name not in layers:
        raise UserError(f"there is no layer {name!r}; {nearest(name, layers)}")
    if options.markdown:
        print("\n".join(markdown(layers)))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 160)  # a pipe has no width to fit
    if name is None:
        console.print(_overview(layers))
        console.print("T tokens, S cached, D d_model, H heads; the other letters: subquad layers NAME.")
    else:
        _describe(console, layers[name])
    return 0


def _overview(layers: dict[str, type[Layer]]) -> Table:
    table = Table(
        title="Layers: cost of T tokens in training, of one token in decoding, and values of state a sequence"
    )
    for heading in ("name", "kind", "op", "train", "decode", "state", "paper"):
        table.add_column(heading, overflow="fold", no_wrap=heading in ("name", "op"))
    for name, layer in sorted(layers.items(), key=lambda item: (item[1].kind != "mixer", item[0])):
        card = layer.card
        cells = ["?"] * 5 if card is None else [card.op, card.train, card.decode, card.state, card.paper]
        table.add_row(name, layer.kind, *map(escape, cells))
    return table


def markdown(layers: dict[str, type[Layer]]) -> list[str]:
    """The README's table; state bytes are counted from the tensors of one float32 sequence at width 256.

    The last columns are milliseconds as shipped for a CPU.
    """
    measured, at = times()
    heading = [*("layer", "op", "train", "decode a token", "state", "paper", "bytes at 1 k", "at 64 k")]
    heading += [f"ms to read {at:,}", "to decode one"]
    rows = ["| " + " | ".join(heading) + " |", "|" + " --- |" * len(heading)]
    for name, layer in layers.items():
        card = layer.card
        cells = ["?"] * 5 if card is None else [card.op, card.train, card.decode, card.state, card.paper]
        found = {p.phase: p.ms for p in measured.points if (p.subject, p.kind, p.tokens) == (name, "layer", at)}
        figures = ["" if found.get(phase) is None else f"{found[phase]:#.3g}".rstrip(".") for phase in TIMED]
        rows.append("| " + " | ".join([f"`{name}`", *cells, *_state_bytes(layer), *figures]) + " |")
    return rows


def times() -> tuple[Measurements, int]:
    """The shipped costs on a CPU, and of the lengths measured the one that the table shows."""
    measured = shipped.costs("cpu")
    lengths = {p.tokens for p in measured.points if p.kind == "layer" and p.phase in TIMED}
    return measured, max((n for n in lengths if n <= SHOWN), default=min(lengths))


def _state_bytes(layer: type[Layer], d_model: int = 256) -> list[str]:
    built = layer(d_model)
    if not hasattr(built, "init_state"):
        return ["whole sequences only", ""]
    cells = []
    for length in (1_000, 64_000):
        if built.max_len is not None and length > built.max_len:
            cells.append(f"at most {built.max_len:,} tokens")
        else:
            state = leaves(built.init_state(1, length))
            cells.append(f"{sum(t.numel() * t.element_size() for _, _, t in state):,}")
    return cells


def _describe(console: Console, layer: type[Layer]) -> None:
    console.print(f"[bold]{layer.__name__}[/bold] ({layer.kind})\n")
    console.print(escape(inspect.getdoc(layer) or ""), highlight=False, soft_wrap=True)
    hints = get_type_hints(layer.__init__)
    table = Table(title="Arguments", title_justify="left")
    for heading in ("name", "type", "default"):
        table.add_column(heading, overflow="fold")
    for parameter in list(inspect.signature(layer.__init__).parameters.values())[1:]:
        default = "required" if parameter.default is inspect.Parameter.empty else repr(parameter.default)
        table.add_row(parameter.name, escape(type_name(hints.get(parameter.name, Any))), escape(default))
    console.print()
    console.print(table)


def type_name(hint: Any) -> str:
    """A type as a reader writes it: `int | None`, `"elu" | "relu"`."""
    if hint is type(None):
        return "None"
    if get_origin(hint) is Literal:
        return " | ".join(repr(value) for value in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(type_name(part) for part in get_args(hint))
    if isinstance(hint, type) and not get_args(hint):
        return hint.__name__
    return re.sub(r"\b(?:typing|collections\.abc)\.", "", str(hint))
