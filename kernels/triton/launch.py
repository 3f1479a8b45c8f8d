"""Launching kernels: on the device of what they are given, and without finding out anew what they were compiled for.

Of each argument Triton compiles in whether it is there, its type, whether an address or an integer is a multiple of 16
and whether an integer is 1. Asking all this costs a launch of 50 arguments 28 us on the host, more than many kernels
run; a key made by one line of Python and the compiled kernel launched by itself cost 15. What is launched over and over
goes on tapes, which need no key either.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dis import get_instructions
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes

from subquad.kernels.backend import INTERPRETED
from subquad.kernels.triton.tape import STREAM, hooked, recording


def cdiv(x: int, size: int) -> int:
    """How many pieces of `size` cover x. Triton's own is a device function, ten times as slow on the host."""
    return -(-x // size)


def power_of_2(x: int) -> int:
    """The next one from x on."""
    return 1 << max(x - 1, 0).bit_length()


def kernel(function: Callable[..., None] | None = None, *, do_not_specialize: Sequence[str] = ()) -> Any:
    """As `triton.jit`, of a function that is launched: `f[grid](tensor, ..., CONSTANT=..., num_warps=...)`.

    Constants come last in the signature and by name in a call. What was an integer in the first call is one in all;
    everything else is a tensor or None.
    """
    if function is None:
        return partial(kernel, do_not_specialize=do_not_specialize)
    jitted = triton.jit(function, do_not_specialize=do_not_specialize)
    # On an AMD GPU Triton also asks how large a tensor is.
    return ByTriton(jitted) if INTERPRETED or torch.version.hip else Kernel(jitted)


class ByTriton:
    """A kernel that Triton launches itself, in its own way."""

    def __init__(self, jitted: Any):
        self.jitted = jitted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], /, *arguments: Any, **options: Any) -> None:
        run = self.jitted[grid]
        with _disable_current_modes():  # what the interpreter does with torch is no part of the call
            run(*arguments, **options)
        if (tape := recording()) is not None:
            tape.launch(run, arguments, options)


class Launch(NamedTuple):
    kernel: "Kernel"
    key: tuple
    index: Any  # of the device
    arguments: Sequence[Any]
    grid: tuple[int, ...]
    options: dict[str, Any]


class _Waiting(threading.local):
    """Launches of this thread that wait for a compilation; None where they need not."""

    launches: list[Launch] | None = None


_waiting = _Waiting()


class Kernel:
    """A compiled kernel for each key of arguments."""

    def __init__(self, jitted: Any):
        self.jitted = jitted
        self.constants = [parameter.name for parameter in jitted.params if parameter.is_constexpr]
        self.key: Callable[..., tuple] | None = None
        self.compiled: dict[tuple, tuple[Any, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], /, *arguments: Any, **options: Any) -> None:
        index = arguments[0].device.index
        if self.key is None:
            same_hash(self.jitted)
            self.key = specialization(self.jitted, arguments)
        key = (index, self.key(*arguments), *options, *options.values())
        found = self.compiled.get(key)
        if _waiting.launches is not None and (found is None or _waiting.launches):
            _waiting.launches.append(Launch(self, key, index, arguments, grid, options))
        elif index == torch.cuda.current_device():
            self._run(found, key, grid, arguments, options)
        else:
            with torch.cuda.device(index):
                self._run(found, key, grid, arguments, options)

    def _run(self, found: Any, key: tuple, grid: tuple[int, ...], arguments: Any, options: dict[str, Any]) -> None:
        grid = (*grid, *(1, 1)[: 3 - len(grid)])
        if found is None:
            made = self.jitted[grid](*arguments, **options)
            self.compiled[key] = found = made, tuple(options[name] for name in self.constants)
        else:
            made, constants = found
            if hooked():
                made[grid](*arguments, *constants)
            else:
                stream = torch._C._cuda_getCurrentRawStream(key[0])
                made.run(*grid, stream, *_of(made), *arguments, *constants)
        if (tape := recording()) is not None:
            made, constants = found
            tape.launch(made.run, arguments, before=(*grid, STREAM, *_of(made)), after=constants)

    def compile(self, launch: Launch) -> None:
        with torch.cuda.device(launch.index):  # a new thread begins with the first
            self.jitted.warmup(*launch.arguments, grid=launch.grid, **launch.options)


def _of(made: Any) -> tuple[Any, ...]:
    """What a compiled kernel's launcher wants of it; no metadata for hooks, and no hooks."""
    return made.function, made.packed_metadata, None, None, None


@contextmanager
def side_by_side() -> Iterator[None]:
    """Kernels launched inside compile side by side: from the first on that is new, they wait until the end, or until
    `settle` is called, which has to be before anything but a kernel reads what one of them writes."""
    if _waiting.launches is not None:
        yield
        return
    _waiting.launches = []
    try:
        yield
        settle()
    finally:
        _waiting.launches = None


def settle() -> None:
    """Compile what waits, and launch it in order."""
    launches, _waiting.launches = _waiting.launches, None
    if launches is None:
        return
    new = {(id(launch.kernel), launch.key): launch for launch in launches if launch.key not in launch.kernel.compiled}
    if len(new) > 1:
        with ThreadPoolExecutor(len(new)) as pool:
            list(pool.map(lambda launch: launch.kernel.compile(launch), new.values()))
    for launch in launches:
        launch.kernel.launch(launch.grid, *launch.arguments, **launch.options)
    _waiting.launches = []


def same_hash(jitted: Any) -> None:
    """Hash a function's source after those that it calls.

    The name of a compiled kernel in the cache of triton 3.6 has in it which constants its callees read, of those that
    were hashed before. By its own order, that of the first use of each, it is another in another process, which then
    compiles again what is there.
    """
    for step in get_instructions(jitted.fn):
        called = jitted.__globals__.get(step.argval) if step.opname == "LOAD_GLOBAL" else None
        if isinstance(called, triton.JITFunction) and called.hash is None:
            same_hash(called)
    _ = jitted.cache_key


def specialization(jitted: Any, arguments: Sequence[Any]) -> Callable[..., tuple]:
    """A function of arguments like these that tells apart whatever Triton compiles apart."""
    parts = []
    parameters = [parameter for parameter in jitted.params if not parameter.is_constexpr]
    for parameter, argument in zip(parameters, arguments, strict=True):
        x = parameter.name
        if not isinstance(argument, int):
            parts += [f"{x} is not None and {x}.dtype", f"{x} is None or {x}.data_ptr() % 16 == 0"]
        elif isinstance(argument, bool):
            raise TypeError(f"{jitted.__name__}: {x} is a bool, which kernels take as a constant or as 0 or 1")
        else:  # of 64 bits or of 32
            parts.append(f"{x} >> 31")
            if not parameter.do_not_specialize:
                parts.append(f"{x} if {x} < 2 else 2 + ({x} % 16 == 0)")
    names = ", ".join(parameter.name for parameter in parameters)
    return eval(f"lambda {names}: ({', '.join(parts)},)")
