"""Launching kernels: on the device of what they are given, and without finding out anew what they were compiled for.

Of each argument Triton compiles in whether it is there, its type, whether an address or an integer is a multiple of 16
and whether an integer is 1. Asking all this costs a launch of 50 arguments 28 us on the host, more than many kernels
run; a key made by one line of Python and the compiled kernel launched by itself cost 15.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
import triton

from subquad.kernels.backend import INTERPRETED

Variants = Sequence[tuple[tuple[int, ...], dict[str, Any]]]  # grids; constants and options


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
    return jitted if INTERPRETED or torch.version.hip else Kernel(jitted)


class Kernel:
    """A compiled kernel for each key of arguments."""

    def __init__(self, jitted: Any):
        self.jitted = jitted
        self.constants = [parameter.name for parameter in jitted.params if parameter.is_constexpr]
        self.key: Callable[..., tuple] | None = None
        self.compiled: dict[tuple, tuple[Any, list[Any]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.launch(arguments, ((grid, options),))

    def launch(self, arguments: Sequence[Any], variants: Variants) -> None:
        """Once with each of these grids, constants and options; what is new of several is compiled side by side."""
        index = arguments[0].device.index
        if index == torch.cuda.current_device():
            return self._launch(index, arguments, variants)
        with torch.cuda.device(index):
            self._launch(index, arguments, variants)

    def _launch(self, index: Any, arguments: Sequence[Any], variants: Variants) -> None:
        if self.key is None:
            self.key = specialization(self.jitted, arguments)
        shared = self.key(*arguments)
        keys = [(index, shared, *options, *options.values()) for _, options in variants]
        if len(variants) > 1:
            missing = [variant for key, variant in zip(keys, variants, strict=True) if key not in self.compiled]
            self._compile(index, arguments, missing)
        for key, (grid, options) in zip(keys, variants, strict=True):
            found = self.compiled.get(key)
            if found is None:
                made = self.jitted[grid](*arguments, **options)
                self.compiled[key] = made, [options[name] for name in self.constants]
            else:
                made, constants = found
                made[*grid, *(1, 1)[: 3 - len(grid)]](*arguments, *constants)

    def _compile(self, index: Any, arguments: Sequence[Any], missing: Variants) -> None:
        def warm(variant: tuple[tuple[int, ...], dict[str, Any]]) -> None:
            with torch.cuda.device(index):  # a new thread begins with the first
                self.jitted.warmup(*arguments, grid=variant[0], **variant[1])

        if missing:
            with ThreadPoolExecutor(len(missing)) as pool:
                list(pool.map(warm, missing))


def launch_each(kernel: Any, arguments: Sequence[Any], variants: Variants) -> None:
    """Launch the kernel once with each of these grids, constants and options, compiled side by side where it is new."""
    if isinstance(kernel, Kernel):
        return kernel.launch(arguments, variants)
    for grid, options in variants:
        kernel[grid](*arguments, **options)


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
