"""`subquad compare models`: what whole models cost, counted from their configurations without allocating a weight.

A CONFIG is the name of a shipped configuration (mamba2, published/mixtral-8x7b or mixtral-8x7b alone), a YAML or JSON
file, or the folder of a saved model (./mamba2 where a shipped one has its name).

Parameters: all of them, tied ones once. Active: without the experts of an MoE layer that a token does not choose.

FLOPs a token: those of one forward pass over --tokens tokens, divided by the tokens: twice the multiplications of every
matrix product, as torch's FLOP counter sees them, and what the ops do besides products, recurrences as scans, short
convolutions and FFTs, by their own formulas. Dense attention counts its whole T x T square, masked half included;
chunked forms count the products inside their chunks; an MoE layer counts the experts that a token chooses, or where
experts choose all slots they have, spare ones included. Not counted: activations, norms, gates. Training is three times
that: a product's backward pass is two such products.

State: bytes of one sequence's state as `init_state` allocates it for a context in --dtype; what accumulates stays in
float32. Weights: bytes of the parameters that decoding one token reads, each once, in --dtype: the active ones, of an
embedding that is not also the head's only one row.
"""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from subquad import configs
from subquad.arguments import Parser
from subquad.compare.costs import forward, shares
from subquad.compare.output import csv_writer, short
from subquad.errors import UserError, nearest, one_line
from subquad.files import check_output, write_atomically
from subquad.infer.device import DTYPES, pick_dtype
from subquad.infer.state import nbytes
from subquad.models.checkpoint import CONFIG
from subquad.models.config import LMConfig, refuse_code
from subquad.models.lm import LM
from subquad.reading import read_mapping

Row = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print the table, write the files asked for."""
    parser = Parser(prog="subquad compare models", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="shipped names, files, folders of saved models")
    parser.add_argument("--contexts", nargs="+", type=int, default=[1024, 131072], help="of the state (1024 131072)")
    parser.add_argument("--tokens", type=int, default=1024, help="of the sequence whose FLOPs are counted (1024)")
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES) + " (bfloat16), of weights and caches")
    parser.add_argument("--trust-code", action="store_true", help="let what lies in a model's folder import classes")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--json", type=Path, help="write the rows and what could not be counted here")
    parser.add_argument("--overwrite", action="store_true", help="replace existing files")
    given = parser.parse_args(argv)
    parser.at_least(given, "tokens", 1)
    if min(given.contexts) < 1:
        raise UserError(f"--contexts has {min(given.contexts)}; a context is at least 1")
    dtype = pick_dtype(given.dtype)
    assert dtype is not None
    for path in filter(None, (given.csv, given.json)):
        check_output(path, overwrite=given.overwrite)
    contexts = sorted(set(given.contexts))
    found = {name: find_config(name, trust_code=given.trust_code) for name in given.configs}

    rows, notes = [], []
    for name, config in found.items():
        try:
            row, missing = count(config, contexts, given.tokens, dtype)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        rows.append({"model": name, **row})
        notes += [f"{name}: {note}" for note in missing]
    console = Console()
    console.print(_table(rows, contexts, f"FLOPs over {given.tokens:,} tokens; weights and caches in {given.dtype}"))
    for note in notes:
        console.print(f"- {note}", markup=False, highlight=False)
    if given.csv:
        write_atomically(given.csv, csv_writer(rows), overwrite=given.overwrite)
    if given.json:
        about = {"tokens": given.tokens, "dtype": given.dtype, "models": rows, "not counted": notes}
        text = json.dumps(about, indent=2) + "\n"
        write_atomically(given.json, lambda path: path.write_text(text, encoding="utf-8"), overwrite=given.overwrite)
    return 0


def find_config(text: str, *, trust_code: bool = False) -> LMConfig:
    """The configuration that a word of the command line stands for; a model's folder names classes if trusted."""
    values = _read(text)
    if Path(text).is_dir() and not trust_code:
        refuse_code(values, Path(text) / CONFIG)
    try:
        return LMConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{text}: {error}") from error


def _read(text: str) -> dict[str, Any]:
    shipped = configs.names()
    for name in (text, f"published/{text}"):
        if name in shipped:
            return read_mapping(configs.folder() / f"{name}.yaml")
    path = Path(text)
    if path.is_dir():
        values = read_mapping(path / CONFIG)
        if values.get("format") != "subquad" or not isinstance(values.get("lm"), dict):
            raise UserError(f"{path} is no model of subquad: its {CONFIG} has no 'format': 'subquad' with an 'lm' part")
        return values["lm"]
    if not path.exists():
        raise UserError(f"{text!r} is no shipped configuration, file or folder; {nearest(text, shipped)}")
    return read_mapping(path)


def count(config: LMConfig, contexts: Sequence[int], tokens: int, dtype: torch.dtype) -> tuple[Row, list[str]]:
    """The figures of one model, None where there is none, and a sentence for each of those.

    In the row "state bytes at N" for each of the contexts.
    """
    with torch.device("meta"), torch.no_grad():
        model = LM(config).eval()
        active = active_parameters(model)
        row: Row = {"parameters": model.n_parameters(), "active parameters": active}
        notes = []
        states: Row = {}
        for context in contexts:
            try:
                states[f"state bytes at {context}"] = nbytes(model.init_state(1, context, dtype))
            except UserError as error:
                states[f"state bytes at {context}"] = None
                notes.append(f"no state at {context:,}: {error}")
        decodes = all(hasattr(p, "init_state") for b in model.blocks for p in (b.mixer, b.ffn) if p is not None)
        table = 0 if config.tie_embeddings else model.embedding.weight.numel() - config.d_model
        row["weight bytes a token"] = (active - table) * dtype.itemsize if decodes else None
        flops = None
        try:
            flops = forward_flops(model, tokens)
        except (UserError, RuntimeError) as error:  # RuntimeError: someone's layer that looks at values
            notes.append(f"no FLOPs over {tokens:,} tokens: {one_line(error)}")
        row["FLOPs a token"] = None if flops is None else flops / tokens
        row["training FLOPs a token"] = None if flops is None else 3 * flops / tokens
    return row | states, notes


def active_parameters(model: LM) -> int:
    """Trained values without those of the experts that a token does not choose."""
    share = shares(model, 1) | {model.embedding.weight: 1.0}
    return round(sum(p.numel() * share.get(p, 1.0) for p in model.parameters()))


def forward_flops(model: LM, tokens: int) -> int:
    """FLOPs of one forward pass of a model on the meta device."""
    with torch.enable_grad():
        return forward(partial(model, torch.zeros(1, tokens, dtype=torch.long, device="meta")))[1]


def _table(rows: list[Row], contexts: list[int], title: str) -> Table:
    table = Table(title=title, title_justify="left", show_lines=True, padding=(0, 0, 0, 1))
    table.add_column("model", overflow="fold")
    for heading in ("param-\neters", "active", "FLOPs\na token", "training", "weights\na token", "context", "state"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        keys = ("parameters", "active parameters", "FLOPs a token", "training FLOPs a token")
        figures = [short(row[key]) for key in keys] + [short(row["weight bytes a token"], "B")]
        sizes = [short(row[f"state bytes at {context}"], "B") for context in contexts]
        table.add_row(escape(row["model"]), *figures, "\n".join(f"{n:,}" for n in contexts), "\n".join(sizes))
    return table
