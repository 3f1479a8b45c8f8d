"""`subquad compare recall`: what small models keep of what they read, against the bytes they keep it in.

Models of the named mixers, each followed by a SwiGLU, are trained from nothing on synthetic tasks by the module and
optimiser of `subquad train`. Accuracy is that of fresh sequences: of all answers at the training length, of those past
it at multiples of it. Each finished run is a line of OUT/results.jsonl; the same command again does what is missing.

A configuration (--config, a YAML file or a shipped one's name) has these options as its keys, layers as a list or as a
mapping of labels, each to a layer or to the several layers of a line; the command line goes before it. Where it holds a
claim, its figure is drawn (OUT/NAME.png and .svg), and OUT/claims.md says whether the runs agree. --claims stands for
the shipped ones: known results of recall and state tracking at small scale.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from subquad import configs
from subquad.arguments import Parser
from subquad.compare.claim_picture import draw_claim
from subquad.compare.output import csv_writer
from subquad.compare.recall_claims import Verdict, gather, markdown
from subquad.compare.recall_experiment import KINDS, PRESETS, Experiment, experiment
from subquad.compare.recall_picture import draw
from subquad.compare.recall_runs import Results, Row, carry_out, knobs
from subquad.compare.recall_tasks import TASKS, Task
from subquad.compare.shipped import folder
from subquad.compare.subjects import label, specification
from subquad.errors import UserError, nearest, shown
from subquad.files import check_output, write_atomically
from subquad.infer.device import pick_device
from subquad.reading import parse_yaml


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, print the tables, write the files."""
    given = arguments(argv)
    device = pick_device(given.device)
    if given.csv:
        check_output(given.csv, overwrite=given.overwrite)
    options = {key: getattr(given, key) for key in KINDS if getattr(given, key) is not None}
    preset = PRESETS.get(given.preset, {})
    experiments = [experiment(options, preset, config) for config in given.config or [None]]
    if given.results:
        shipped = str(given.results) == SHIPPED
        results = Results(folder() / "recall.jsonl" if shipped else given.results, make=False)
        prepare_folder(given.out, experiments, overwrite=given.overwrite)
    else:
        results = Results(given.out / "results.jsonl", make=True)
    failed = train_missing(experiments, results, device, given)

    verdicts: list[Verdict] = []
    rows: list[Row] = []
    for one in experiments:
        found = [(tag, results.find(run)) for tag, run in one.runs]
        if all(row is not None for _, row in found):
            report(one, found, given.out, verdicts)
            rows += [row | {"layer": one.title(tag, row["mixer"])} for tag, row in found]
    if verdicts:
        text = markdown(verdicts)
        write_atomically(given.out / "claims.md", lambda path: path.write_text(text, encoding="utf-8"), overwrite=True)
    if given.csv and rows:
        write_atomically(given.csv, csv_writer([_flat(row) for row in rows]), overwrite=given.overwrite)
    for run, reason in failed:
        Console(stderr=True).print(f"failed: {escape(_name(run))}: {escape(reason)}", soft_wrap=True)
    return 1 if failed else 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, its words of YAML read."""
    parser = Parser(prog="subquad compare recall", description=(__doc__ or "").split("\n\n", 1)[1])
    parser.add_argument("--config", nargs="+", help="YAML files or shipped ones: " + ", ".join(configs.names("recall")))
    parser.add_argument("--claims", action="store_true", help="all shipped configurations")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help=TASKS_HELP)
    parser.add_argument("--layers", nargs="+", metavar="LAYER", help=LAYERS_HELP)
    parser.add_argument("--first", metavar="LAYER", help="mixer of a block before the others, without a SwiGLU (none)")
    parser.add_argument("--d-model", type=int, help="width (64)")
    parser.add_argument("--blocks", type=int, help="blocks of mixer and SwiGLU (2)")
    parser.add_argument("--steps", type=int, help="of training (1000)")
    parser.add_argument("--batch", type=int, help="sequences a step (64)")
    parser.add_argument("--lr", help="highest of AdamW (0.003), or '{Mamba2: 0.005, others: 0.003}'")
    parser.add_argument("--seeds", type=int, help="runs of each, with seeds from 0 (3)")
    parser.add_argument("--shortest", type=int, help="train at random lengths from this one to the task's")
    parser.add_argument("--beyond", nargs="*", type=int, help="multiples of the training length to evaluate at (2 4)")
    parser.add_argument("--variants", nargs="*", metavar="KNOBS", help=VARIANTS_HELP)
    parser.add_argument("--preset", help=f"values for what is not given: {', '.join(PRESETS)} (minutes on two cores)")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each a process of its own (1)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the first GPU, else cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl, pictures and claims.md")
    parser.add_argument("--results", type=Path, help=RESULTS_HELP)
    parser.add_argument("--csv", type=Path, help="write the runs here")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --csv, with --results pictures")
    given = parser.parse_args(argv)
    if given.preset is not None and given.preset not in PRESETS:
        raise UserError(f"--preset: there is no {given.preset!r}; {nearest(given.preset, PRESETS)}")
    if given.claims and given.config:
        raise UserError("--claims stands for the shipped configurations; give it or --config")
    if given.claims:
        given.config = configs.names("recall")
    for name in ("tasks", "layers", "variants"):
        if getattr(given, name) is not None:
            setattr(given, name, [specification(f"--{name}", text) for text in getattr(given, name)])
    if given.first is not None:
        given.first = specification("--first", given.first)
    if given.lr is not None:
        given.lr = parse_yaml(given.lr, f"--lr: {shown(given.lr)}")
    parser.at_least(given, "workers", 1)
    return given


TASKS_HELP = "names, or mappings with knobs such as '{name: mqar, pairs: 16}'; by default all: " + ", ".join(TASKS)
LAYERS_HELP = "mixers, or mappings with arguments such as '{name: Attention, window: 8}'"
SHIPPED = "shipped"
RESULTS_HELP = f"train nothing and take the runs from this file, or from the package's with the word {SHIPPED}"
VARIANTS_HELP = "also evaluate at the training length with other knobs, such as '{distance: 8}' of needle"


def prepare_folder(out: Path, experiments: Sequence[Experiment], *, overwrite: bool) -> None:
    """The folder, in which nothing is replaced unasked."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    for one in experiments:
        for path in (out / f"{one.name}.png", out / f"{one.name}.svg", out / "claims.md"):
            check_output(path, overwrite=overwrite)


def train_missing(
    experiments: Sequence[Experiment], results: Results, device: Any, given: argparse.Namespace
) -> list[tuple[Row, str]]:
    """Do the runs that `results` lacks, and return those that failed with the reason."""
    wanted = {str(sorted(run.items())): run for one in experiments for _, run in one.runs}
    missing = [run for run in wanted.values() if results.find(run) is None]
    if given.results and missing:
        raise UserError(
            f"{given.results} lacks {len(missing)} of {len(wanted)} runs, such as {_name(missing[0])}; without "
            "--results they are trained"
        )
    failed = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=sum(run["steps"] for run in missing))

        def advance(run: Row, steps: int) -> None:
            progress.update(bar, description=escape(_name(run)), advance=steps)

        for run, found in carry_out(missing, device, given.workers, advance):
            if isinstance(found, str):
                failed.append((run, found))
            else:
                results.add(run, found)
    return failed


def report(one: Experiment, found: list[tuple[str, Row]], out: Path, verdicts: list[Verdict]) -> None:
    """Print the tables of an experiment and draw it; add the verdict where it holds a claim."""
    panels = []
    for task in one.tasks:
        mine = [row | {"layer": one.title(tag, row["mixer"])} for tag, row in found if row["task"] == knobs(task)]
        panels.append((label(knobs(task)), task.chance, summary(mine)))
        Console().print(_table(task, panels[-1][2], one.settings))
    if one.claim is None:
        write_atomically(out / f"{one.name}.png", lambda path: draw(panels, path), overwrite=True)
        return
    lines = gather(found, one.claim.x)
    verdict = one.claim.judge(lines)
    Console().print(f"{one.claim.says}: {'agrees' if verdict.agrees else 'DISAGREES'}\n{verdict.found}\n", markup=False)
    for kind in ("png", "svg"):
        write_atomically(
            out / f"{one.name}.{kind}",
            lambda path, kind=kind: draw_claim(verdict, lines, one.tasks, path, kind),
            overwrite=True,
        )
    verdicts.append(verdict)


def shipped_claims() -> list[str]:
    """The table of claims and verdicts, from the package's own runs."""
    results = Results(folder() / "recall.jsonl", make=False)
    verdicts = []
    for name in configs.names("recall"):
        one = experiment({}, {}, name)
        found = [(tag, row) for tag, run in one.runs if (row := results.find(run))]
        if one.claim is None or len(found) < len(one.runs):
            raise UserError(f"{results.path} lacks runs of {name}; take it anew with subquad compare recall --claims")
        verdicts.append(one.claim.judge(gather(found, one.claim.x)))
    return markdown(verdicts).splitlines()


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


def _table(task: Task, rows: list[Row], settings: Row) -> Table:
    about = "width {d_model}, {blocks} blocks, {steps} steps, {seeds} seeds".format(**settings)
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


def _name(run: Row) -> str:
    return f"{run['task']['name']}, {label(run['mixer'])}, seed {run['seed']}"


def _flat(row: Row) -> Row:
    """A run as a row of the CSV."""
    about = {"task": label(row["task"]), **{k: row[k] for k in ("layer", "seed", "steps", "parameters", "state_bytes")}}
    factors = [f"accuracy at {length // row['lengths'][0]}x" for length in row["lengths"]]
    variants = [f"accuracy with {variant}" for variant in row["variants"]]
    return about | dict(zip([*factors, *variants], [*row["accuracy"], *row["accuracy_of_variants"]], strict=True))
