"""Measurements that ship with the package: one JSON file a run, with its command, date, machine and versions.

costs_DEVICE.json and decode_DEVICE.json are what `subquad compare complexity` and `subquad compare decode` write; the
others are rows of `subquad compare cpu` and `subquad compare kernels`. The README's tables are generated from them.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from subquad.compare.results import Measurements, load
from subquad.errors import UserError, nearest


def folder() -> Path:
    return Path(str(files(__name__)))


def names() -> list[str]:
    """The files, without their ending."""
    return sorted(path.stem for path in folder().glob("*.json"))


def path(name: str) -> Path:
    if name not in names():
        raise UserError(f"there is no shipped measurement {name!r}; {nearest(name, names())}")
    return folder() / f"{name}.json"


def document(name: str) -> dict[str, Any]:
    """A shipped file as it is: command, created, machine, versions, settings, and rows or points."""
    return json.loads(path(name).read_text(encoding="utf-8"))


def devices() -> list[str]:
    """What there are measured costs of layers for."""
    return [name.removeprefix("costs_") for name in names() if name.startswith("costs_")]


def costs(device: str) -> Measurements:
    """The measured costs of layers on a device, and of whole models decoding where they were measured."""
    if device not in devices():
        raise UserError(
            f"there are no shipped measurements of {device!r}, only of {', '.join(devices())}; "
            "give a file of subquad compare complexity with --from"
        )
    return load(path(f"costs_{device}"))
