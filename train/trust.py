"""What the config.yaml in a run's folder may name without --trust_code: a class would be imported and run.

A file that the user names with --config is the user's own word; this one may have come with the folder. Words and
numbers are free, and so are a few callbacks of Lightning whose arguments are words and numbers themselves.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from subquad.errors import UserError, shown, shown_text
from subquad.models.config import refuse_code

TAKE_CLASSES = ("accelerator", "strategy", "logger", "callbacks", "profiler", "plugins")  # of the trainer's options
WORDS = {
    *("auto", "cpu", "gpu", "cuda", "mps", "tpu"),
    *("ddp", "ddp_spawn", "ddp_find_unused_parameters_true", "fsdp", "simple", "advanced"),
}
HARMLESS = {
    f"lightning.pytorch.callbacks.{name}"
    for name in ("DeviceStatsMonitor", "EarlyStopping", "LearningRateMonitor", "ModelCheckpoint", "Timer")
}
SECTIONS = ("model", "data", "trainer")


def check_run_config(values: Mapping[str, Any], path: Path) -> None:
    """One sentence that names what the run's own configuration would import."""

    how = "to go on, add --trust_code if you trust that folder, or name a file of yours with --config"

    def refuse(where: str, name: Any) -> UserError:
        return UserError(
            f"{shown_text(str(path))} gives {where} as {shown(name)}, which would be imported and run; {how}"
        )

    for key in ("config", *(key for key in values if not key.isidentifier())):
        if key in values:
            raise refuse(shown_text(key), values[key])
    for section in SECTIONS:  # a word there is another file
        if not isinstance(values.get(section), Mapping | None):
            raise refuse(section, values[section])
    model, trainer = values.get("model") or {}, values.get("trainer") or {}
    if not isinstance(model.get("lm"), Mapping | None):
        raise refuse("model.lm", model["lm"])
    refuse_code((model.get("lm") or {}).get("blocks"), path, how)
    for option in TAKE_CLASSES:
        for value in given if isinstance(given := trainer.get(option), list) else [given]:
            if not _harmless(value, path.parent):
                raise refuse(f"trainer.{option}", value.get("class_path") if isinstance(value, Mapping) else value)
    rest = {**values, "trainer": {name: value for name, value in trainer.items() if name not in TAKE_CLASSES}}
    if (found := _class_path(rest)) is not None:
        raise refuse("a class_path", found)


def _harmless(value: Any, folder: Path) -> bool:
    if isinstance(value, str):  # the parser takes the name of a file for that file
        return value in WORDS and not (folder / value).exists() and not Path(value).exists()
    if not isinstance(value, Mapping):
        return value is None or isinstance(value, bool)
    arguments = value.get("init_args", {})
    return (
        set(value) <= {"class_path", "init_args"}
        and value.get("class_path") in HARMLESS
        and isinstance(arguments, Mapping)
        and _class_path(arguments) is None
    )


def _class_path(values: Any) -> Any:
    """The first class_path anywhere in `values`."""
    for key, value in values.items() if isinstance(values, Mapping) else enumerate(values):
        if isinstance(key, str) and (key == "class_path" or not key.isidentifier()):  # a.b: c and a+: [c] as well
            return value
        if isinstance(value, Mapping | list) and (found := _class_path(value)) is not None:
            return found
    return None
