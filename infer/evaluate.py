"""The `subquad eval` command: bits per byte of a model on files, also by position in the context."""

import argparse
import glob
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subquad.arguments import Parser
from subquad.errors import UserError

if TYPE_CHECKING:
    from subquad.infer.loss import Losses


def main(argv: list[str]) -> int:
    """Run `eval ARGUMENTS`; returns 0. Bad input raises UserError."""
    options = parser().parse_args(argv)
    if options.context < 1 or options.chunk < 1:
        raise UserError(f"--context {options.context} and --chunk {options.chunk} must be at least 1")
    from subquad.files import check_output, write_atomically
    from subquad.infer.device import pick_device, pick_dtype
    from subquad.infer.loss import measure
    from subquad.models.checkpoint import load
    from subquad.models.tokenizer import load_tokenizer

    device, dtype = pick_device(options.device), pick_dtype(options.dtype)
    for path in (options.json, options.png):
        if path is not None:
            check_output(path, overwrite=options.overwrite)
    texts = [read(path) for path in files(options.data)]
    model = load(options.model, device=device, dtype=dtype, trust_code=options.trust_code)
    tokenizer = load_tokenizer(options.model, trust_code=options.trust_code, special_tokens=options.special_tokens)
    losses = measure(model, tokenizer, texts, context=options.context, chunk=options.chunk)
    show(losses)
    if options.json is not None:
        text = json.dumps(summary(losses), indent=2) + "\n"
        write_atomically(options.json, lambda partial: partial.write_text(text), overwrite=options.overwrite)
    if options.png is not None:
        write_atomically(options.png, lambda partial: draw(losses, partial), overwrite=options.overwrite)
    return 0


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="eval", description="Bits per byte of a model on files, also by position in the context.")
    p.add_argument("--model", required=True, metavar="DIR", help="folder of a model saved by subquad")
    p.add_argument("--data", required=True, nargs="+", metavar="F", help="files, or patterns such as 'texts/**/*.txt'")
    p.add_argument("--special-tokens", action="store_true", help="let a text that spells a special token become it")
    p.add_argument("--context", type=int, default=4096, metavar="N", help="tokens to look back on at most (4096)")
    p.add_argument("--chunk", type=int, default=4096, metavar="N", help="tokens a call, which bounds the memory (4096)")
    p.add_argument("--json", metavar="F", help="write the figures as JSON")
    p.add_argument("--png", metavar="F", help="draw bits per byte against the position")
    p.add_argument("--overwrite", action="store_true", help="let --json and --png replace files")
    p.add_argument("--trust-code", action="store_true", help="let what lies in a model's folder import classes")
    p.add_argument("--dtype", help="float32, bfloat16, float16 or float64; float32 by default")
    p.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else cpu")
    return p


def files(patterns: list[str]) -> list[Path]:
    """The files that paths and globs name, each once; one that names none is an error."""
    found: set[Path] = set()
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            raise UserError(f"--data: {pattern} is a folder; give its files, such as '{pattern.rstrip('/')}/**/*.txt'")
        named = [path] if path.exists() else [Path(p) for p in glob.glob(pattern, recursive=True)]
        named = [p for p in named if p.is_file()]
        if not named:
            raise UserError(f"--data: no file matches {pattern!r}")
        found.update(named)
    return sorted(found)


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def show(losses: "Losses") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("tokens of context", "tokens", "bits per byte", title=None)
    for column in table.columns:
        column.justify = "right"
    for row in summary(losses)["by_position"]:
        table.add_row(f"{row['from']:,} - {row['to']:,}", f"{row['tokens']:,}", f"{row['bits_per_byte']:.4f}")
    table.add_section()
    table.add_row("all", f"{losses.total_tokens:,}", f"{losses.bits_per_byte:.4f}")
    Console().print(table)


def summary(losses: "Losses") -> dict[str, Any]:
    rows = [
        {"from": 2**i, "to": min(2 ** (i + 1) - 1, losses.context), "tokens": count, "bits_per_byte": bits}
        for i, (count, bits) in enumerate(zip(losses.tokens, losses.by_position, strict=True))
        if count
    ]
    return {
        "bits_per_byte": losses.bits_per_byte,
        "bits_per_token": losses.bits_per_token,
        "tokens": losses.total_tokens,
        "bytes": losses.n_bytes,
        "context": losses.context,
        "by_position": rows,
    }


def draw(losses: "Losses", path: Path) -> None:
    from matplotlib.figure import Figure

    rows = summary(losses)["by_position"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([row["from"] for row in rows], [row["bits_per_byte"] for row in rows], marker="o")
    axes.axhline(losses.bits_per_byte, color="grey", linestyle=":", label=f"all: {losses.bits_per_byte:.3f}")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("tokens of context (from)")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png", dpi=150)
