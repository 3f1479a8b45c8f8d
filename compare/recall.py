"""`subquad compare recall`: what small models keep of what they read, against the bytes they keep it in.

Models of the named mixers, each followed by a SwiGLU, are trained from nothing on synthetic tasks by the module and
optimiser of `subquad train`. Accuracy is that of fresh sequences: of all answers at the training length, of those past
it at multiples of it. Each finished run is a line of OUT/results.jsonl; the same command again does what is missing.
"""

import argparse
import json
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from subquad.arguments import Parser
from subquad.compare.layers import label, specification
from subquad.compare.output import csv_writer
from subquad.compare.recall_picture import draw
from subquad.compare.recall_tasks import TASKS, Task, make_task
from subquad.errors import UserError, nearest
from subquad.infer.device import pick_device
from subquad.infer.output import check_output, write_atomically
from subquad.infer.state import nbytes
from subquad.models.config import LMConfig
from subquad.models.lm import LM
from subquad.train.cli import quiet
from subquad.train.rows import IGNORED, Batch
from subquad.train.task import LanguageModeling

Row = dict[str, Any]
DEFAULTS: Row = {
    "tasks": list(TASKS),
    "layers": ["Attention", "LinearAttention", "DeltaNet"],
    "d_model": 64,
    "blocks": 2,
    "steps": 1000,
    "batch": 64,
    "lr": 3e-3,
    "seeds": 3,
    "beyond": [2, 4],
}
PRESETS: dict[str, Row] = {
    "laptop": {
        "tasks": ["{name: mqar, pairs: 8, vocabulary: 32, length: 32}"],
        "layers": ["Attention", "{name: Attention, window: 8}", "LinearAttention", "DeltaNet", "Mamba2"],
        "d_model": 32,
        "steps": 400,
        "seeds": 2,
    },
}
EXAMPLES = 256  # fresh sequences a length
AT_ONCE = 16384  # tokens evaluated in one call
FRESH = 1 << 48  # seeds of fresh sequences begin here, past those of any training
WEIGHT_DECAY = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, print the tables, write the files."""
    given = arguments(argv)
    device = pick_device(given.device)
    tasks = [make_task("--tasks", specification("--tasks", text)) for text in given.tasks]
    layers = [specification("--layers", text) for text in given.layers]
    if given.csv:
        check_output(given.csv, overwrite=given.overwrite)
    runs = [describe(task, layer, seed, given) for task, layer, seed in product(tasks, layers, range(given.seeds))]
    for run in runs[:: given.seeds]:  # what cannot be built is told before anything is trained
        LM.from_config(run["lm"])
    results = Results(given.out)
    missing = [run for run in runs if results.find(run) is None]
    quiet()
    warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")  # accuracy is measured after training
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(missing) * given.steps)
        for run in missing:
            progress.update(bar, description=f"{run['task']['name']}, {run['layer']}, seed {run['seed']}")
            results.add(run, perform(run, device, lambda: progress.advance(bar)))

    found = [results.find(run) for run in runs]
    panels = []
    for task in tasks:
        mine = [row for row in found if row["task"] == knobs(task)]
        panels.append((label(knobs(task)), task.chance, summary(mine)))
        Console().print(_table(task, panels[-1][2], given))
    write_atomically(given.out / "recall.png", lambda path: draw(panels, path), overwrite=True)
    if given.csv:
        write_atomically(given.csv, csv_writer([_flat(row) for row in found]), overwrite=given.overwrite)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What the command line, then the preset, then DEFAULTS say."""
    parser = Parser(prog="subquad compare recall", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=TASKS_HELP)
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help=LAYERS_HELP)
    parser.add_argument("--d-model", type=int, help="width (64)")
    parser.add_argument("--blocks", type=int, help="blocks of mixer and SwiGLU (2)")
    parser.add_argument("--steps", type=int, help="of training (1000)")
    parser.add_argument("--batch", type=int, help="sequences a step (64)")
    parser.add_argument("--lr", type=float, help="highest learning rate of AdamW (0.003)")
    parser.add_argument("--seeds", type=int, help="runs of each, with seeds from 0 (3)")
    parser.add_argument("--beyond", nargs="*", type=int, help="multiples of the training length to evaluate at (2 4)")
    parser.add_argument("--preset", help=f"values for what is not given: {', '.join(PRESETS)} (minutes on two cores)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl and recall.png")
    parser.add_argument("--csv", type=Path, help="write the runs here")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --csv")
    given = parser.parse_args(argv)
    if given.preset is not None and given.preset not in PRESETS:
        raise UserError(f"--preset: there is no {given.preset!r}; {nearest(given.preset, PRESETS)}")
    for name, value in (DEFAULTS | PRESETS.get(given.preset, {})).items():
        if getattr(given, name) is None:
            setattr(given, name, value)
    for name in ("d_model", "blocks", "steps", "batch", "seeds"):
        parser.at_least(given, name, 1)
    if not 0 < given.lr < float("inf"):
        raise UserError(f"--lr is {given.lr}; it must be above 0")
    if any(factor < 2 for factor in given.beyond):
        raise UserError(f"--beyond has {min(given.beyond)}; a multiple past the training length is at least 2")
    return given


TASKS_HELP = "names, or mappings with knobs such as '{name: mqar, pairs: 16}'; by default all: " + ", ".join(TASKS)
LAYERS_HELP = "mixers, or mappings with arguments such as '{name: Attention, window: 8}'"


def knobs(task: Task) -> Row:
    return {"name": task.name, **asdict(task)}


def describe(task: Task, layer: str | dict[str, Any], seed: int, given: argparse.Namespace) -> Row:
    """Everything a run's outcome depends on, as it stands in results.jsonl."""
    pattern = [{"mixer": layer, "ffn": "SwiGLU"}]
    blocks = [{"repeat": given.blocks, "pattern": pattern}]
    lm = LMConfig(d_model=given.d_model, vocab_size=task.vocab_size, tie_embeddings=False, blocks=blocks)
    run = {"task": knobs(task), "layer": label(layer), "seed": seed, "steps": given.steps, "batch": given.batch}
    return run | {"lr": given.lr, "lengths": [task.length * n for n in (1, *given.beyond)], "lm": lm.to_dict()}


def perform(run: Row, device: torch.device, advance: Callable[[], None]) -> Row:
    """Train and evaluate: what a run found."""
    task = make_task("results", run["task"])
    torch.manual_seed(run["seed"])
    warmup = max(1, min(100, run["steps"] // 10))
    module = LanguageModeling(
        LMConfig.from_dict(run["lm"]), lr=run["lr"], warmup_steps=warmup, weight_decay=WEIGHT_DECAY
    )
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        max_steps=run["steps"],
        gradient_clip_val=1.0,
        callbacks=[_Advance(advance)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, _Stream(task, run))
    except SystemExit as stop:  # Lightning's answer to Ctrl-C, after it has had later ones ignored
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from stop
    model = module.lm.to(device).eval()
    accuracies = [accuracy(model, task, length) for length in run["lengths"]]
    return {
        "accuracy": accuracies,
        "state_bytes": state_bytes(model, task.length),
        "parameters": model.n_parameters(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }


class _Advance(Callback):
    def __init__(self, advance: Callable[[], None]):
        self.advance = advance

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.advance()


class _Stream:
    """The batches of a run's training: each sequence is new, and batch number n follows from the seed and n."""

    def __init__(self, task: Task, run: Row):
        self.task, self.run = task, run

    def __len__(self) -> int:
        return int(self.run["steps"])

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            examples = self.task.examples((self.run["seed"] << 32) + step, self.run["batch"])
            yield Batch(*examples, cu_seqlens=None, bytes_per_token=1.0, carry=None)


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, length: int) -> float | None:
    """The part of right answers on fresh sequences: of all at the training length, at others of those past it.

    None where a layer cannot read so many tokens.
    """
    tokens, targets = task.examples(FRESH + length, EXAMPLES, length)
    if length > task.length:
        targets[:, : task.length] = IGNORED
    device = next(model.parameters()).device
    right = 0
    for part, wanted in zip(*(t.split(max(1, AT_ONCE // length)) for t in (tokens, targets)), strict=True):
        try:
            logits, _ = model(part.to(device))
        except UserError:
            return None
        right += int((logits.argmax(-1).cpu() == wanted).sum())
    return right / int((targets != IGNORED).sum())


def state_bytes(model: LM, length: int) -> int | None:
    """Of one sequence after `length` tokens, caches included; None where a layer has no state to decode with."""
    try:
        return nbytes(model.init_state(1, length))
    except UserError:
        return None


class Results:
    """results.jsonl: a line a finished run, {what it depends on} and under "found" what it found."""

    def __init__(self, folder: Path):
        self.path = folder / "results.jsonl"
        self.found: dict[str, Row] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+", encoding="utf-8") as file:
                file.seek(0)
                lines = file.readlines()
                if lines and not lines[-1].endswith("\n"):  # of a process killed while it wrote
                    file.write("\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                found = row.pop("found")
            except (ValueError, KeyError, AttributeError, TypeError):
                Console(stderr=True).print(f"{self.path}: line {number} is no whole run and is left out")
                continue
            self.found[self._key(row)] = row | found

    @staticmethod
    def _key(run: Row) -> str:
        return json.dumps(run, sort_keys=True)

    def find(self, run: Row) -> Row | None:
        return self.found.get(self._key(run))

    def add(self, run: Row, found: Row) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(run | {"found": found}) + "\n")
        self.found[self._key(run)] = run | found


def summary(rows: Sequence[Row]) -> list[Row]:
    """One row a layer: (mean, least, greatest) of its seeds' accuracy at each length."""
    out = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        mine = [row for row in rows if row["layer"] == layer]
        columns = zip(*(row["accuracy"] for row in mine), strict=True)
        spread = [None if None in c else (sum(c) / len(c), min(c), max(c)) for c in columns]
        out.append({key: mine[0][key] for key in ("layer", "state_bytes", "parameters", "lengths")})
        out[-1]["accuracy"] = spread
    return out


def _table(task: Task, rows: list[Row], given: argparse.Namespace) -> Table:
    about = f"width {given.d_model}, {given.blocks} blocks, {given.steps} steps, {given.seeds} seeds"
    title = f"{label(knobs(task))}\n{about}; right answers in %, range; chance {100 * task.chance:.0f}"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold", min_width=min(18, max(len(row["layer"]) for row in rows)))
    table.add_column("values", justify="right")
    table.add_column("state\nbytes", justify="right")
    for i, length in enumerate(rows[0]["lengths"]):
        table.add_column(f"{'trained' if i == 0 else 'past it'}\n{length:,}", justify="right")
    for row in rows:
        size = "-" if row["state_bytes"] is None else f"{row['state_bytes']:,}"
        table.add_row(row["layer"], f"{row['parameters'] / 1000:,.0f} k", size, *map(_percent, row["accuracy"]))
    return table


def _percent(spread: tuple[float, float, float] | None) -> str:
    """The mean and, where they differ from it once rounded, the least and the greatest."""
    if spread is None:
        return "-"
    mean, least, greatest = (f"{100 * a:.0f}" for a in spread)
    return mean if least == greatest else f"{mean} {least}-{greatest}"


def _flat(row: Row) -> Row:
    """A run as a row of the CSV."""
    names = [f"accuracy at {length // row['lengths'][0]}x" for length in row["lengths"]]
    about = {"task": label(row["task"]), **{k: row[k] for k in ("layer", "seed", "steps", "parameters", "state_bytes")}}
    return about | dict(zip(names, row["accuracy"], strict=True))
