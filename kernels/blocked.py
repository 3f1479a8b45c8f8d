"""The block list: Triton forms that `subquad doctor` found wrong on a GPU of this machine. Dispatch obeys it.

Triton 3.4 to 3.7.0 miscompiles some gated backward kernels on Hopper GPUs; a form that a GPU gets wrong runs there as
its torch form until doctor finds it right, after an update of triton or of subquad. The list is a JSON file in the
user's cache folder, read once a process.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from subquad.errors import UserError
from subquad.folders import cache_folder


class Blocked(NamedTuple):
    """An op whose Triton form this GPU gets wrong with this version of triton."""

    op: str
    gpu: str
    triton: str
    reason: str
    date: str


_ignored = False


def path() -> Path:
    return cache_folder() / "blocked.json"


def read() -> list[Blocked]:
    """What the file holds; nothing where there is none."""
    try:
        text = path().read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    try:
        return [Blocked(**entry) for entry in json.loads(text)]
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path()}, the list of blocked kernels, is damaged ({error}); delete it and run `subquad doctor`"
        ) from error


def refusal(op: str, index: int) -> str | None:
    """Why dispatch may not run the Triton form of `op` on this CUDA device, if so: the end of a sentence."""
    if _ignored:
        return None
    found = _entries().get(op)
    if not found:
        return None
    gpu, version = gpu_name(index), triton_version()
    for entry in found:
        if (entry.gpu, entry.triton) == (gpu, version):
            return (
                f"is blocked on {gpu} with triton {version}: `subquad doctor` found on {entry.date} that "
                f"{entry.reason}; run it again after an update"
            )
    return None


# What torch.compiler.assume_constant_result sets, which would import the compiler (1.5 s): a traced call runs `refusal`
# as it is, once, and neither the file nor the GPU's name is read in a compiled graph.
refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache
def _entries() -> dict[str, list[Blocked]]:
    by_op: dict[str, list[Blocked]] = {}
    for entry in read():
        by_op.setdefault(entry.op, []).append(entry)
    return by_op


def forget() -> None:
    """Read the file again before the next decision."""
    _entries.cache_clear()


@contextmanager
def ignored() -> Iterator[None]:
    """Run Triton forms whether blocked or not, to check them."""
    global _ignored
    before, _ignored = _ignored, True
    try:
        yield
    finally:
        _ignored = before


@lru_cache
def gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@lru_cache
def triton_version() -> str:
    import triton

    return triton.__version__
