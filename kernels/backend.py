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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from subquad.errors import UserError, nearest
from subquad.kernels import blocked

BACKENDS = ("naive", "torch", "triton")
_forced: str | None = None  # of the whole process: torch.compile reads module variables, but no context variables
TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton kernels run on the CPU, slowly: for tests
_warned: set[str] = set()
OPS: dict[str, tuple[str, ...]] = {}  # op -> its forms, filled as the ops are defined


class Call(NamedTuple):
    """A call of an op's form, to be made again with any of its forms."""

    op: str
    forms: Mapping[str, Callable[..., Any]]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    form: Callable[..., Any]  # the one that ran
    unfit: str | None = None  # why the Triton form cannot take these inputs, if so

    @property
    def on_gpu(self) -> str:
        """The form that a GPU would run of this call, in any dtype but float64: "triton", or "torch" and why."""
        if "triton" not in self.forms:
            return "torch: there is no Triton form"
        return "triton" if self.unfit is None else f"torch: the Triton form does not take {self.unfit}"


_calls: list[Call] | None = None
_instead: Callable[[Call], Any] | None = None


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
    op: str,
    forms: Mapping[str, Callable[..., Any]],
    like: Tensor,
    unfit: str | None = None,
) -> Callable[..., Any]:
    """The form of `op` to run on `like`'s device.

    `unfit` says why the Triton form cannot take these inputs, if so. Then, and where `subquad doctor` has blocked it, a
    GPU runs the torch form, with one warning. An op without a Triton form, and float64, which the kernels do not
    compute in, take the torch form by rule.
    """
    form = _choose(op, forms, like, unfit)
    return form if _calls is None else _recorded(op, forms, form, unfit)


@contextmanager
def recorded_calls(instead: Callable[[Call], Any] | None = None) -> Iterator[list[Call]]:
    """The calls of ops' forms made inside the `with` block, without those that a form itself makes.

    `instead` gives what a call returns where the form shall not run.
    """
    global _calls, _instead
    before, (_calls, _instead) = (_calls, _instead), ([], instead)
    try:
        yield _calls
    finally:
        _calls, _instead = before


def _recorded(
    op: str, forms: Mapping[str, Callable[..., Any]], form: Callable[..., Any], unfit: str | None
) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        global _calls
        calls, _calls = _calls, None
        try:
            made = Call(op, forms, args, kwargs, form, unfit)
            if calls is not None:
                calls.append(made)
            return form(*args, **kwargs) if _instead is None else _instead(made)
        finally:
            _calls = calls

    return call


def _choose(op: str, forms: Mapping[str, Callable[..., Any]], like: Tensor, unfit: str | None) -> Callable[..., Any]:
    name, device = current_backend(like.device.type), like.device
    if name == "triton" and not _forced and ("triton" not in forms or like.dtype == torch.float64):
        name = "torch"
    if name not in forms:
        raise UserError(f"{op} has no {name} form; it has: {', '.join(forms)}")
    if name != "triton":
        return forms[name]
    if not TRITON:
        raise UserError(f"{op}: backend('triton') needs the package triton, which is not installed here")
    if device.type != "cuda" and not INTERPRETED:
        raise UserError(f"{op}: backend('triton') needs tensors on a GPU; these are on {device}")
    if unfit or like.dtype == torch.float64:
        refusal = f"does not take {unfit or 'float64'}"
    else:
        refusal = blocked.refusal(op, device.index) if device.type == "cuda" else None
    if refusal is None:
        return forms["triton"]
    if _forced:
        raise UserError(f"{op}: the Triton form {refusal}")
    _warn_once(f"{op}: the Triton form {refusal}; the torch form runs")
    return forms["torch"]


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=5)


_warn_once._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in blocked.py: a traced call warns too
