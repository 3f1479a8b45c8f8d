"""Which form of an op runs.

Every op has up to three forms with one signature: `naive` (the recurrence as written in the paper: the specification
and the float64 oracle), `torch` (chunked and vectorised, on any device) and `triton` (fused, on GPUs). The form follows
from the device of the inputs; `with backend("torch"):` forces one, and a forced form that cannot run raises.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from subquad.errors import UserError, nearest

BACKENDS = ("naive", "torch", "triton")
_forced: str | None = None  # of the whole process: torch.compile reads module variables, but no context variables
TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton kernels run on the CPU, slowly: for tests
_warned: set[str] = set()
OPS: dict[str, tuple[str, ...]] = {}  # op -> its forms, filled as the ops are defined


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one form of every op inside the `with` block: "naive", "torch" or "triton"."""
    if name not in BACKENDS:
        raise UserError(f"there is no backend {name!r}; {nearest(name, BACKENDS)}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def current_backend(device_type: str) -> str:
    """The form that ops on this kind of device take now, where they have it."""
    if _forced:
        return _forced
    return "triton" if device_type == "cuda" and TRITON else "torch"


def register(op: str, **forms: Callable[..., Any]) -> Mapping[str, Callable[..., Any]]:
    """Declare an op's forms; returns them for `pick`."""
    OPS[op] = tuple(forms)
    return forms


def pick(
    op: str, forms: Mapping[str, Callable[..., Any]], like: Tensor, unfit: str | None = None
) -> Callable[..., Any]:
    """The form of `op` to run on `like`'s device.

    `unfit` says why the Triton form cannot take these inputs, if so: then a GPU runs the torch form, with one warning.
    float64, which the kernels do not compute in, takes the torch form by rule.
    """
    name = current_backend(like.device.type)
    if name == "triton" and name in forms and not _forced:
        if like.dtype == torch.float64:
            name = "torch"
        elif unfit:
            _warn_once(f"{op}: the Triton form does not take {unfit}; the torch form runs")
            name = "torch"
    elif name == "triton" and not _forced:
        name = "torch"  # an op that has no Triton form
    if name not in forms:
        raise UserError(f"{op} has no {name} form; it has: {', '.join(forms)}")
    if name == "triton":
        if not TRITON:
            raise UserError(f"{op}: backend('triton') needs the package triton, which is not installed here")
        if like.device.type != "cuda" and not INTERPRETED:
            raise UserError(f"{op}: backend('triton') needs tensors on a GPU; these are on {like.device}")
        if unfit or like.dtype == torch.float64:
            raise UserError(f"{op}: the Triton form does not take {unfit or 'float64'}")
    return forms[name]


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=4)
