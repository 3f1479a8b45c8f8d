"""`subquad conformance LAYER`: put a layer, the zoo's or anyone's, through the contract's properties."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from subquad.arguments import Parser
from subquad.errors import UserError, shown
from subquad.layers.build import build_layer, find_layer
from subquad.layers.conformance import PROPERTIES, Subject, attempt
from subquad.reading import parse_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table of properties; the exit code is 1 if one fails."""
    parser = Parser(prog="subquad conformance", description=__doc__)
    parser.add_argument("layer", help="a layer of subquad, or the dotted path of a class")
    parser.add_argument("--d-model", type=int, default=48, metavar="D", help="width to build it with (48)")
    parser.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="a constructor argument")
    options = parser.parse_args(argv)
    spec = {"name": options.layer} | dict(_argument(text) for text in options.arg)
    build_layer("conformance", spec, d_model=parser.at_least(options, "d_model", 1), layer_idx=0, n_layers=1)
    arguments = {name: value for name, value in spec.items() if name != "name"}
    subject = Subject(find_layer("conformance", options.layer), options.d_model, arguments)

    console, progress = Console(width=None if sys.stdout.isatty() else 120), Console(stderr=True)
    results = [attempt(name, subject) for name in track(PROPERTIES, "checking", console=progress, transient=True)]
    concerned = [r for r in results if r.applies]
    table = Table(title=f"{options.layer}: {sum(r.passed for r in concerned)} of {len(concerned)} properties hold")
    for heading in ("", "property", "what it says"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "property")
    for r in results:
        says = r.message or (PROPERTIES[r.name].__doc__ or "").strip()
        verdict = "n/a" if not r.applies else "[green]pass[/green]" if r.passed else "[red]FAIL[/red]"
        table.add_row(verdict, r.name, escape(says))
    console.print(table)
    return int(not all(r.passed for r in results))


def _argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--arg takes NAME=VALUE, not {shown(text)}")
    return name, parse_yaml(value, f"--arg {shown(text)}")
