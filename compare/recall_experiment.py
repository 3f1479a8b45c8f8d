"""What `subquad compare recall` is asked to run: options, presets and configurations, checked before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from subquad import configs
from subquad.compare.recall_claims import Claim
from subquad.compare.recall_runs import Row, knobs, model_config
from subquad.compare.recall_tasks import TASKS, Task, make_task
from subquad.compare.subjects import label
from subquad.errors import UserError, nearest
from subquad.layers.build import check_keys, check_type
from subquad.models.lm import LM
from subquad.reading import read_mapping

Spec = str | dict[str, Any]
KINDS: dict[str, Any] = {
    "tasks": list,
    "layers": list | dict,
    "first": str | dict | None,
    "d_model": int,
    "blocks": int,
    "steps": int,
    "batch": int,
    "lr": str | float | dict,
    "seeds": int,
    "shortest": int | None,
    "beyond": list[int],
    "variants": list[dict],
}
DEFAULTS: Row = {
    "tasks": list(TASKS),
    "layers": ["Attention", "LinearAttention", "DeltaNet"],
    "first": None,
    "d_model": 64,
    "blocks": 2,
    "steps": 1000,
    "batch": 64,
    "lr": 3e-3,
    "seeds": 3,
    "shortest": None,
    "beyond": [2, 4],
    "variants": [],
}
PRESETS: dict[str, Row] = {
    "laptop": {
        "tasks": [{"name": "mqar", "pairs": 8, "vocabulary": 32, "length": 32}],
        "layers": ["Attention", {"name": "Attention", "window": 8}, "LinearAttention", "DeltaNet", "Mamba2"],
        "d_model": 32,
        "steps": 400,
        "seeds": 2,
    },
}
OTHERS = "others"  # in a mapping of learning rates, the layers that it does not name


@dataclass(frozen=True)
class Experiment:
    """Runs that belong together: each task with each layer and seed.

    layers: (label of its line, what it is). runs: (label, what the run's outcome depends on).
    """

    name: str
    settings: Row
    tasks: list[Task]
    layers: list[tuple[str, Spec]]
    claim: Claim | None
    runs: list[tuple[str, Row]]

    def title(self, tag: str, spec: Spec) -> str:
        """What to call a layer: its label, or where several share it its name and arguments."""
        return tag if sum(other == tag for other, _ in self.layers) == 1 else label(spec)


def experiment(given: Row, preset: Row, config: str | None = None) -> Experiment:
    """From what the command line says, then a configuration, then a preset, then DEFAULTS."""
    values = {} if config is None else read_config(config)
    name = "recall" if config is None else Path(config).stem
    settings = DEFAULTS | preset | {key: value for key, value in values.items() if key != "claim"} | given

    def where(key: str) -> str:
        return f"{config}: {key}" if key in values and key not in given else f"--{key.replace('_', '-')}"

    for key, kind in KINDS.items():
        if key != "lr":
            check_type(where(key), settings[key], kind)
    for key in ("d_model", "blocks", "steps", "batch", "seeds"):
        if settings[key] < 1:
            raise UserError(f"{where(key)} is {settings[key]}; it must be at least 1")
    if any(factor < 2 for factor in settings["beyond"]):
        raise UserError(
            f"{where('beyond')} has {min(settings['beyond'])}; a multiple past the training length is at least 2"
        )
    tasks = [make_task(where("tasks"), spec) for spec in settings["tasks"]]
    for task, variant in product(tasks, settings["variants"]):
        make_task(where("variants"), knobs(task) | variant)
    for task in tasks if settings["shortest"] is not None else []:
        if not task.shortest <= settings["shortest"] <= task.length:
            raise UserError(
                f"{where('shortest')} is {settings['shortest']}; {task.name} needs {task.shortest} to {task.length}"
            )
    layers = lines(settings["layers"])
    rates = [rate(where("lr"), settings["lr"], spec) for _, spec in layers]
    claim = None
    if "claim" in values:
        axes = {"state_bytes", "length"}.union(*map(knobs, tasks), *settings["variants"])
        claim = Claim.from_dict(name, values["claim"], [tag for tag, _ in layers], sorted(axes - {"name"}))
    runs = [
        (tag, describe(task, spec, lr, seed, settings))
        for task, ((tag, spec), lr), seed in product(tasks, zip(layers, rates, strict=True), range(settings["seeds"]))
    ]
    for _, run in runs[:: settings["seeds"]]:  # what cannot be built is told before anything is trained
        LM.from_config(model_config(run))
    return Experiment(name, settings, tasks, layers, claim, runs)


def read_config(config: str) -> Row:
    """The mapping that a file or the name of a shipped configuration holds."""
    shipped = configs.names("recall")
    if config not in shipped and not Path(config).exists():
        raise UserError(f"--config: {config!r} is no shipped configuration or file; {nearest(config, shipped)}")
    values = read_mapping(configs.folder() / "recall" / f"{config}.yaml" if config in shipped else config)
    check_keys(config, values, [*KINDS, "claim"])
    return values


def lines(layers: list[Spec] | dict[str, Any]) -> list[tuple[str, Spec]]:
    """(label, layer) of a list of layers, or of a mapping of labels to a layer or several."""
    if isinstance(layers, list):
        return [(label(spec), spec) for spec in layers]
    several = {tag: specs if isinstance(specs, list) else [specs] for tag, specs in layers.items()}
    return [(str(tag), spec) for tag, specs in several.items() for spec in specs]


def rate(where: str, lr: Any, spec: Spec) -> float:
    """The learning rate of a layer: a number, or a mapping of layers' names and `others` to numbers."""
    if isinstance(lr, Mapping):
        name = spec if isinstance(spec, str) else str(spec.get("name"))
        if name not in lr and OTHERS not in lr:
            raise UserError(f"{where} has neither {name!r} nor {OTHERS!r}; give either a learning rate")
        return rate(where, lr.get(name, lr.get(OTHERS)), spec)
    try:
        value = float(lr)
    except (TypeError, ValueError):
        raise UserError(f"{where} is {lr!r}; it must be a number, or a mapping of layers to numbers") from None
    if not 0 < value < float("inf"):
        raise UserError(f"{where} is {lr}; it must be above 0")
    return value


def describe(task: Task, spec: Spec, lr: float, seed: int, settings: Row) -> Row:
    """Everything a run's outcome depends on, as it stands in results.jsonl."""
    run = {"task": knobs(task), "mixer": spec, "seed": seed, "lr": lr}
    run |= {key: settings[key] for key in ("first", "d_model", "blocks", "steps", "batch", "shortest", "variants")}
    return run | {"lengths": [task.length * factor for factor in (1, *settings["beyond"])]}
