"""`subquad compare refresh`: write the README's tables and figures anew from the shipped measurements.

A table stands between the lines `<!-- measured: NAME -->` and `<!-- end -->`; a figure is an image figures/cpu/NAME.svg
of the costs measured on that device. --check writes nothing and fails where one is out of step with its file. --measure
takes a shipped file again first, with the command that it holds.
"""

import re
import shlex
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from subquad.arguments import Parser
from subquad.compare import cost_curves, shipped
from subquad.compare.output import without_outputs
from subquad.compare.readme_tables import TABLES
from subquad.errors import UserError, nearest
from subquad.files import write_atomically

FIGURE = re.compile(r"!\[[^]]*\]\((figures/(\w+)/\w+\.svg)\)")  # path and device
BLOCK = re.compile(r"^<!-- measured: (.+?) -->\n(.*?)^<!-- end -->$", flags=re.MULTILINE | re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is to be measured, rewrite the page, say what changed."""
    parser = Parser(prog="subquad compare refresh", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("page", nargs="?", type=Path, default=Path("README.md"), help="the page (README.md)")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the page is out of step")
    parser.add_argument("--measure", nargs="+", default=[], metavar="FILE", help=", ".join(shipped.names()))
    given = parser.parse_args(argv)
    if given.check and given.measure:
        raise UserError("--check writes nothing, so it goes with no --measure")
    before = read(given.page)
    rewrite(before, str(given.page))  # so that a page with a wrong mark is told before anything is measured
    commands = {name: command(name) for name in given.measure}
    for words in commands.values():
        print(f"$ {shlex.join(words)}", flush=True)
        if import_module("subquad.compare.cli").main(words[2:]):
            raise UserError(f"{shlex.join(words)} failed; {given.page} is left as it was")
    after = rewrite(before, str(given.page))
    stale = [
        name for (name, old), (_, new) in zip(BLOCK.findall(before), BLOCK.findall(after), strict=True) if old != new
    ]
    figures = stale_figures(after, given.page)
    if given.check:
        for name in [*(f"table {name!r}" for name in stale), *(f"figure {path}" for path in figures)]:
            print(f"{given.page}: the {name} is out of step with the shipped measurements")
        return int(bool(stale or figures))
    for device in sorted(set(figures.values())):
        folder = given.page.parent / "figures" / device
        folder.mkdir(parents=True, exist_ok=True)
        cost_curves.figures(shipped.costs(device), folder, suffix=".svg", overwrite=True)
    if stale:
        write_atomically(given.page, lambda path: path.write_text(after, encoding="utf-8"), overwrite=True)
    print(f"{given.page}: {', '.join([*stale, *figures]) or 'nothing'} changed")
    return 0


def read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {page}: {error.strerror}; run this in the checkout") from error


def rewrite(text: str, page: str, tables: dict[str, Callable[[], list[str]]] = TABLES) -> str:
    """The page with each table as its file has it now."""
    marks = re.findall(r"^<!-- measured: (.+?) -->$", text, flags=re.MULTILINE)
    if not marks:
        raise UserError(f"{page} has no line <!-- measured: NAME -->; there is nothing to refresh")
    for name in marks:
        if name not in tables:
            raise UserError(f"{page}: there is no table {name!r}; {nearest(name, tables)}")
    if [name for name, _ in BLOCK.findall(text)] != marks:
        raise UserError(f"{page}: a line <!-- measured: NAME --> has no <!-- end --> before the next one")

    def block(match: re.Match[str]) -> str:
        return "\n".join([f"<!-- measured: {match[1]} -->", "", *tables[match[1]](), "", "<!-- end -->"])

    return BLOCK.sub(block, text)


def stale_figures(text: str, page: Path) -> dict[str, str]:
    """The figures of costs that the page shows and that were not drawn from what is shipped, with their devices."""
    found = {}
    for path, device in FIGURE.findall(text):
        file = page.parent / path
        drawn = file.read_text(encoding="utf-8") if file.is_file() else ""
        if cost_curves.fingerprint(shipped.costs(device)) not in drawn:
            found[path] = device
    return found


def command(name: str) -> list[str]:
    """The command of a shipped file, writing to that file."""
    typed = shlex.split(shipped.document(name)["command"])
    if typed[:2] != ["subquad", "compare"]:
        raise UserError(f"--measure {name}: it was not measured by subquad compare, but by: {' '.join(typed)}")
    return [*without_outputs(typed), "--json", str(shipped.path(name)), "--overwrite"]
