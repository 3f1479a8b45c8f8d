"""The memory that is free, and tensors that would not fit it refused before they are allocated."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import inf, prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from subquad.errors import UserError

_SIZED = {
    "empty",
    "zeros",
    "ones",
    "full",
    "rand",
    "randn",
    "randint",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
}


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def free_bytes(device: torch.device) -> float:
    """Bytes that can still be allocated on `device`; infinite where nothing is, as on meta, or nobody tells."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return min(_machine(), _container(), _process()) if device.type == "cpu" else inf


def _machine() -> float:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return inf


def _container() -> float:
    """What the control group leaves, pages of files not counted as taken: the kernel gives them up."""
    try:
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip("/\n")
        limit, taken = (group / "memory.max").read_text(), int((group / "memory.current").read_text())
        files = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["file"]
        return inf if limit.strip() == "max" else max(int(limit) - taken + int(files), 0)
    except (OSError, ValueError, KeyError):
        return inf


def _process() -> float:
    """What `ulimit -v` leaves."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        return inf if limit == resource.RLIM_INFINITY else max(limit - pages * os.sysconf("SC_PAGE_SIZE"), 0)
    except (ImportError, OSError, ValueError):
        return inf


class Room(TorchFunctionMode):
    """Refuses a tensor that would not fit the memory that was free at first, less what was asked for since.

    A system that promises more memory than it has would kill the process when the tensor is filled.
    """

    def __init__(self, what: str, device: torch.device):
        super().__init__()
        self.what, self.device = what, device
        self.free = free_bytes(device)
        self.taken = 0.0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.free < inf and torch.device(kwargs.get("device") or self.device).type == self.device.type:
            self.taken += _bytes_made(getattr(func, "__name__", ""), args, kwargs)
            if self.taken > self.free:
                raise UserError(
                    f"{self.what} takes more than {self.taken / 1e9:,.1f} GB with what was made before it, and "
                    f"{self.free / 1e9:,.1f} GB of memory are free here"
                )
        return func(*args, **kwargs)


_ROOM: ContextVar[Room | None] = ContextVar("room", default=None)


@contextmanager
def room_for(what: str, device: torch.device | None = None) -> Iterator[None]:
    """Within it, tensors that do not fit the device's memory are refused; `what` they are for stands in the error."""
    outer = _ROOM.get()
    if outer is not None:
        before, outer.what = outer.what, what
        yield
        outer.what = before
        return
    room = Room(what, device or torch.get_default_device())
    token = _ROOM.set(room)
    try:
        with room:
            yield
    finally:
        _ROOM.reset(token)


def _bytes_made(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Bytes of the tensor that a call makes; 0 where its arguments hold as much already."""
    tensors = [a for a in args if isinstance(a, Tensor)]
    numbers = [a for a in args if isinstance(a, int | float)]
    sizes = kwargs.get("size", next((a for a in args if isinstance(a, tuple | list)), numbers))
    count: float
    if name in _SIZED:
        count = prod(sizes)
    elif name == "eye":
        count = numbers[0] * numbers[-1]
    elif name == "arange":
        first, last, step = (0, numbers[0], 1) if len(numbers) == 1 else (*numbers, 1)[:3]
        count = (last - first) / (step or 1)
    elif name in ("linspace", "logspace"):
        count = numbers[-1]
    elif name == "repeat" and tensors:
        count = tensors[0].numel() * prod(sizes)
    elif prod(t.numel() for t in tensors) <= 2**20:
        return 0
    else:
        try:
            count = prod(np.broadcast_shapes(*(t.shape for t in tensors))) if tensors else 0
        except ValueError:
            return 0
        if any(count * t.element_size() <= t.untyped_storage().nbytes() for t in tensors):
            return 0  # no result of broadcasting
    dtype = kwargs.get("dtype") or (tensors[0].dtype if tensors else torch.get_default_dtype())
    return float(max(count, 0)) * dtype.itemsize
