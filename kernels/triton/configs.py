"""Tile sizes and launch parameters of the kernels, by widths and GPU: a table and one rule, no autotuning at run time.

`subquad compare kernels --tune` times the candidates on the GPU at hand and writes what is best there into the user's
own table, whose entries come before the shipped ones.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from subquad.errors import UserError
from subquad.folders import cache_folder

Values = dict[str, int]


class Entry(NamedTuple):
    """Values measured to be good for these widths, on GPUs of this compute capability."""

    capability: tuple[int, int]
    widths: Values
    values: Values


class Kernel(NamedTuple):
    """`default` where no entry fits; `candidates` are what tuning tries: every choice of each value."""

    default: Values
    candidates: dict[str, tuple[int, ...]]
    entries: tuple[Entry, ...] = ()


H200 = (9, 0)
OPTIONAL = {"maxnreg"}  # among the values of an entry

_PREPARE = Kernel(
    default={"BLOCK_K": 64, "num_warps": 4, "num_stages": 1},
    candidates={"BLOCK_K": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
)

_GRADIENT = {"BLOCK_K": (16, 32, 64, 128), "BLOCK_V": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)}

_HALF = {"K": 256, "V": 256, "size": 2}

# A width is any integer that a launcher passes by name; one that an entry leaves out may be anything.
SHIPPED: dict[str, Kernel] = {
    # One pass over a sequence, the state [K, BLOCK_V] in registers. On an H200 at K = V = 128 wider blocks or 8 warps
    # were slower than 64 with 4.
    "carry": Kernel(
        default={"BLOCK_V": 32, "num_warps": 4, "num_stages": 1},
        candidates={"BLOCK_V": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
        entries=(Entry(H200, {"K": 128, "V": 128}, {"BLOCK_V": 64, "num_warps": 4, "num_stages": 2}),),
    ),
    # Chunks made ready for the pass over the states, BLOCK_K columns at a time. With 8 warps a product of 64 rows that
    # feeds another is computed twice; with fewer registers a third program runs beside two. `gates` as below, and 2 for
    # every channel.
    "prepare_delta": _PREPARE._replace(
        entries=(
            Entry(
                H200,
                {"K": 128, "gates": 2, "size": 2},
                {"BLOCK_K": 128, "num_warps": 4, "num_stages": 1, "maxnreg": 168},
            ),
        )
    ),
    "prepare_dplr": _PREPARE,
    "prepare_linear": _PREPARE,
    # Before those under a decay for every channel, of `readers` and `writers`: all rows, and pairs that decay strongly.
    "decayed_rows": Kernel(
        default={"BLOCK": 64, "ROWS": 16, "num_warps": 2, "num_stages": 1},
        candidates={"BLOCK": (32, 64, 128), "ROWS": (8, 16), "num_warps": (1, 2, 4), "num_stages": (1,)},
    ),
    "pair_scores": _PREPARE._replace(
        entries=(
            Entry(H200, {"K": 256, "readers": 1, "writers": 1}, {"BLOCK_K": 64, "num_warps": 4, "num_stages": 1}),
            Entry(H200, {"K": 256, "readers": 2, "writers": 2}, {"BLOCK_K": 64, "num_warps": 8, "num_stages": 1}),
        )
    ),
    # As "carry", with up to four row tensors and four matrices a chunk; `size` is the bytes of an operand.
    "affine": Kernel(
        default={"BLOCK_V": 32, "num_warps": 4, "num_stages": 1},
        candidates={"BLOCK_V": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)},
        entries=(
            Entry(H200, {"K": 128, "V": 256, "size": 2}, {"BLOCK_V": 64, "num_warps": 4, "num_stages": 2}),
            Entry(H200, {"K": 256, "V": 256, "size": 4}, {"BLOCK_V": 32, "num_warps": 8, "num_stages": 1}),
        ),
    ),
    # A few tokens: narrow blocks, so that one sequence is many programs.
    "step": Kernel(
        default={"BLOCK_V": 16, "num_warps": 2, "num_stages": 1},
        candidates={"BLOCK_V": (16, 32, 64), "num_warps": (1, 2, 4, 8), "num_stages": (1,)},
    ),
    # The products y . x of all chunks, before the gradients.
    "chunk_products": Kernel(
        default={"BLOCK_V": 64, "num_warps": 4, "num_stages": 1},
        candidates={"BLOCK_V": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2)},
    ),
    # All chunks side by side, BLOCK_K columns a program; `gates`: 0 none, 1 one a head. Tiles of 64 tokens and products
    # of 64 x 64 fill the registers: wider blocks than these spill.
    "chunk_gradient": Kernel(
        default={"BLOCK_K": 32, "BLOCK_V": 32, "num_warps": 4, "num_stages": 1},
        candidates=_GRADIENT,
        entries=(Entry(H200, _HALF, {"BLOCK_K": 64, "BLOCK_V": 64, "num_warps": 4, "num_stages": 1}),),
    ),
    # The same with a decay for every channel, of one reader and writer, two and one, two and two.
    "linear_gradient": Kernel(
        default={"BLOCK_K": 32, "BLOCK_V": 32, "num_warps": 4, "num_stages": 1},
        candidates=_GRADIENT,
        entries=(Entry(H200, _HALF, {"BLOCK_K": 64, "BLOCK_V": 64, "num_warps": 4, "num_stages": 1}),),
    ),
    "delta_gradient": Kernel(
        default={"BLOCK_K": 32, "BLOCK_V": 32, "num_warps": 8, "num_stages": 1},
        candidates=_GRADIENT,
        entries=(Entry(H200, _HALF, {"BLOCK_K": 64, "BLOCK_V": 64, "num_warps": 8, "num_stages": 1}),),
    ),
    "dplr_gradient": Kernel(
        default={"BLOCK_K": 32, "BLOCK_V": 32, "num_warps": 8, "num_stages": 1},
        candidates=_GRADIENT,
        entries=(Entry(H200, _HALF, {"BLOCK_K": 64, "BLOCK_V": 64, "num_warps": 8, "num_stages": 1}),),
    ),
}


def config(kernel: str, *, device: torch.device | None = None, **widths: int) -> Values:
    """The values to launch `kernel` with: keyword arguments of the launch, tile sizes and num_warps, num_stages.

    Of this GPU's entries the one with exactly these widths counts, else the smallest that is nowhere below them, else
    the kernel's default. Call it where tensors are real, inside the custom op: it asks the device what it is.
    """
    if _recorded is not None:
        _recorded[kernel, tuple(sorted(widths.items()))] = None
    if kernel in _forced:
        return {**_forced[kernel]}
    capability = None if device is None or device.type != "cuda" else _capability(device.index)
    return {**_chosen(kernel, capability, tuple(sorted(widths.items())))}


def chosen(kernel: str, capability: tuple[int, int], widths: Values) -> Values:
    """What the tables give on GPUs of this capability, whatever is forced."""
    return _chosen(kernel, capability, tuple(sorted(widths.items())))


@cache
def _chosen(kernel: str, capability: tuple[int, int] | None, widths: tuple[tuple[str, int], ...]) -> Values:
    asked = dict(widths)
    fitting = [e for e in table()[kernel].entries if e.capability == capability and _fits(e.widths, asked)]
    if not fitting:
        return table()[kernel].default
    return min(fitting, key=lambda e: (prod(e.widths.values()), -len(e.widths))).values


def _fits(entry: Values, asked: Values) -> bool:
    """Whether an entry for some widths serves those asked for; being the same, it has the smallest product of them."""
    return all(name in asked and asked[name] <= width for name, width in entry.items())


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def table() -> dict[str, Kernel]:
    """The shipped table under the user's."""
    merged = dict(SHIPPED)
    for name, entries in read(path()).items():
        if name in merged:  # a table written by another version of subquad may know other kernels
            mine = [entry for entry in entries if set(entry.values) - OPTIONAL == set(merged[name].default)]
            keys = {(entry.capability, *sorted(entry.widths.items())) for entry in mine}
            rest = [e for e in merged[name].entries if (e.capability, *sorted(e.widths.items())) not in keys]
            merged[name] = merged[name]._replace(entries=(*mine, *rest))
    return merged


def path() -> Path:
    """The user's table."""
    return cache_folder() / "kernels.json"


def read(file: Path) -> dict[str, list[Entry]]:
    """The entries of a table file by kernel; none where there is no file."""
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        return {
            name: [Entry(tuple(e["capability"]), e["widths"], e["values"]) for e in entries]
            for name, entries in json.loads(text).items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file}, the table of tuned kernels, is damaged ({error}); delete it or tune once more with "
            f"`subquad compare kernels --tune`"
        ) from error


def text(entries: Mapping[str, list[Entry]]) -> str:
    """A table file that `read` reads, one entry a line."""
    kernels = []
    for name, found in entries.items():
        lines = ",\n".join(f"  {json.dumps(entry._asdict())}" for entry in found)
        kernels.append(f"{json.dumps(name)}: [\n{lines}\n]")
    return "{\n" + ",\n".join(kernels) + "\n}\n"


def forget() -> None:
    """Read the user's table again at the next launch."""
    table.cache_clear()
    _chosen.cache_clear()
    _renew()


def generation() -> int:
    """A number that changes with everything that `config` may answer by."""
    return _generation


def _renew() -> None:
    global _generation
    _generation += 1


def recording() -> bool:
    """Whether `recorded` wants to see every call of `config`."""
    return _recorded is not None


# Of the whole process, not of a thread: backward passes launch from threads of their own.
_generation = 0
_forced: dict[str, Values] = {}
_recorded: dict[tuple[str, tuple[tuple[str, int], ...]], None] | None = None


@contextmanager
def forced(kernel: str, values: Mapping[str, int]) -> Iterator[None]:
    """Launch `kernel` with these values whatever the tables say."""
    before = _forced.get(kernel)
    _forced[kernel] = dict(values)
    _renew()
    try:
        yield
    finally:
        _renew()
        del _forced[kernel]
        if before is not None:
            _forced[kernel] = before


@contextmanager
def recorded() -> Iterator[list[tuple[str, Values]]]:
    """The kernels launched inside the block and the widths they asked for, each once, in order; complete at its end."""
    global _recorded
    before, _recorded = _recorded, {}
    calls: list[tuple[str, Values]] = []
    try:
        yield calls
    finally:
        calls += [(name, dict(widths)) for name, widths in _recorded]
        _recorded = before


def candidates(kernel: str) -> list[Values]:
    """Every choice of the kernel's values that tuning tries."""
    choices = table()[kernel].candidates
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
