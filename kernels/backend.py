"""Which form of an op runs.

Every op has up to three forms with one signature: `naive` (the recurrence as written in the paper: the specification
and the float64 oracle), `torch` (chunked and vectorised, on any device) and `triton` (fused, on GPUs). The form follows
from the device of the inputs; `with backend("torch"):` forces one, and a forced form that cannot run raises.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from subquad.errors import UserError, nearest

BACKENDS = ("naive", "torch", "triton")
_forced: str | None = None  # of the whole process: torch.compile reads module variables, but no context variables
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
    return _forced or "torch"


def register(op: str, **forms: Callable[..., Any]) -> Mapping[str, Callable[..., Any]]:
    """Declare an op's forms; returns them for `pick`."""
    OPS[op] = tuple(forms)
    return forms


def pick(op: str, forms: Mapping[str, Callable[..., Any]], like: Tensor) -> Callable[..., Any]:
    """The form of `op` to run on `like`'s device."""
    name = current_backend(like.device.type)
    if name not in forms:
        raise UserError(f"{op} has no {name} form; it has: {', '.join(forms)}")
    return forms[name]
