"""The file of measured costs that `subquad compare complexity` writes, and the pictures, tables and choices read."""

import json
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from beartype.door import is_bearable

import subquad
from subquad.errors import UserError
from subquad.files import write_atomically
from subquad.kernels.backend import TRITON
from subquad.kernels.blocked import triton_version

FORMAT = 1
Kind = Literal["layer", "op", "model"]
Phase = Literal["train", "prefill", "decode"]
PHASES: tuple[Phase, ...] = ("train", "prefill", "decode")


@dataclass(frozen=True)
class Point:
    """One measurement; a figure is None where it was not taken, and `note` says why there is no time."""

    subject: str  # "Mamba2", "Attention, window 512", or the name of a configuration
    kind: Kind  # op: the layer's mixing op alone, on the very tensors that the layer gave it
    phase: Phase  # train: forward and backward; prefill: with a state, without gradients; decode: one token
    tokens: int  # trained on or read, or the context before the decoded token
    ms: float | None = None  # the median of the repeats
    low_ms: float | None = None  # their quartiles
    high_ms: float | None = None
    flops: int | None = None  # counted
    bytes: int | None = None  # counted: what must at least be moved
    peak_bytes: int | None = None  # the most that was allocated at once, beyond the inputs
    state_bytes: int | None = None
    energy_j: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.subject, self.kind, self.phase, self.tokens


@dataclass(frozen=True)
class Measurements:
    """Points measured in one run, or in one that was resumed, and all that they depend on."""

    command: str
    created: str  # the date, as 2026-01-31
    machine: dict[str, Any]  # device, name, threads, memory_bytes
    versions: dict[str, Any]  # subquad, torch, triton, python
    settings: dict[str, Any]
    points: list[Point] = field(default_factory=list)
    format: int = FORMAT

    def select(self, kind: str, phase: str, subject: str | None = None) -> Iterator[Point]:
        """The points of this kind and phase, measured or not, shortest first for each subject."""
        for name in self.subjects() if subject is None else [subject]:
            mine = [p for p in self.points if (p.subject, p.kind, p.phase) == (name, kind, phase)]
            yield from sorted(mine, key=lambda p: p.tokens)

    def subjects(self, kind: str | None = None) -> list[str]:
        """In the order in which they were measured."""
        return list(dict.fromkeys(p.subject for p in self.points if kind in (None, p.kind)))

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        write_atomically(path, lambda partial: partial.write_text(self._text(), encoding="utf-8"), overwrite=overwrite)

    def _text(self) -> str:
        """JSON with a line a point, so that two runs can be compared line by line."""
        about = {"format": self.format} | {f.name: getattr(self, f.name) for f in fields(self) if f.name != "points"}
        head = json.dumps(about, indent=2).removesuffix("\n}")
        rows = ",\n    ".join(json.dumps(asdict(point), allow_nan=False) for point in self.points)
        return head + ',\n  "points": [' + (f"\n    {rows}\n  " if rows else "") + "]\n}\n"


def load(path: str | Path) -> Measurements:
    """The measurements in a file that `save` wrote."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"{path} holds no measurements of subquad compare: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict) or "format" not in found or not isinstance(found.get("points"), list):
        raise UserError(f"{path} holds no measurements of subquad compare: it has no 'format' and 'points'")
    if found["format"] != FORMAT:
        raise UserError(f"{path} has format {found['format']!r}; this version of subquad reads format {FORMAT}")
    points = [_checked(Point, row, f"{path}: point {n}") for n, row in enumerate(found["points"], 1)]
    return _checked(Measurements, found | {"points": points}, str(path))


def _checked(cls: type, values: Any, where: str) -> Any:
    """cls(**values), where every field is given and has its type."""
    if not isinstance(values, dict):
        raise UserError(f"{where} is a {type(values).__name__}; it must be a mapping")
    hints = {f.name: f.type for f in fields(cls)}
    if odd := set(values) ^ set(hints):
        raise UserError(f"{where}: the keys must be {', '.join(hints)}; missing or unknown: {', '.join(sorted(odd))}")
    for name, hint in hints.items():
        value = float(values[name]) if type(values[name]) is int and hint == float | None else values[name]
        if not is_bearable(value, hint) or isinstance(value, bool):
            raise UserError(f"{where}: {name} is {value!r}, which is no {getattr(hint, '__name__', hint)}")
        values = {**values, name: value}
    return cls(**values)


def begin(command: str, device: torch.device, settings: dict[str, Any]) -> Measurements:
    """No points yet, on this machine, today, with what is installed here."""
    created = datetime.now(UTC).date().isoformat()
    return Measurements(command, created, machine(device), versions(), settings)


def machine(device: torch.device) -> dict[str, Any]:
    """What the measurements are taken on; memory is the device's."""
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name, memory = about.name, about.total_memory
    else:
        name, memory = _processor(), memory_bytes()
    return {"device": device.type, "name": name, "threads": torch.get_num_threads(), "memory_bytes": memory}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Of this machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 0


def versions() -> dict[str, Any]:
    return {
        "subquad": subquad.__version__,
        "torch": torch.__version__,
        "triton": triton_version() if TRITON else None,
        "python": platform.python_version(),
    }
