"""What a device tells of a call: its peak memory and its energy; and how much memory there is."""

import ctypes
import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TypeVar

import torch
from torch._C._autograd import _disable_profiler, _enable_profiler, _prepare_profiler
from torch._C._profiler import RecordScope

from subquad.compare.results import memory_bytes

T = TypeVar("T")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
ENERGY_SECONDS = 0.3  # the counter moves every 20 to 100 ms


def peak_bytes(run: Callable[[], T], device: torch.device) -> tuple[T, int | None]:
    """What `run` returns, and the most that was allocated at once in it beyond what was before.

    None on devices whose allocations torch does not report.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    return _profiled(run) if device.type == "cpu" else (run(), None)


def _profiled(run: Callable[[], T]) -> tuple[T, int]:
    """By the profiler's record of allocations, without that of ops, which makes a loop of many ops ten times longer."""
    profiler = torch.autograd.profiler.profile(profile_memory=True)
    config, activities = profiler.config(), profiler.kineto_activities
    with _profiler_silenced():
        _prepare_profiler(config, activities)
        _enable_profiler(config, activities, {RecordScope.USER_SCOPE})
        try:
            result = run()
        finally:
            found = _disable_profiler()
    level = most = 0
    for _, change in sorted((e.start_ns(), e.nbytes()) for e in found.events() if e.name() == "[memory]"):
        level += change
        most = max(most, level)
    return result, most


@contextmanager
def _profiler_silenced() -> Iterator[None]:
    """torch 2.13 writes to the standard error, past Python, when a profiler starts, stops and sees old memory freed."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def free_bytes(device: torch.device) -> int:
    """What can still be allocated there, as far as the system tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])
    except (OSError, StopIteration):
        free = memory_bytes() or 2**63
    try:  # a container's limit is not the machine's
        group = Path("/sys/fs/cgroup")
        limit, stat = ((group / name).read_text().split() for name in ("memory.max", "memory.stat"))
        return free if limit == ["max"] else min(free, int(limit[0]) - int(stat[stat.index("anon") + 1]))
    except (OSError, ValueError):
        return free


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """The C library keeps what is freed instead of handing it back to the system, as torch does on GPUs.

    It would hand back tensors of some 10 MB and fault them in again, page by page, on every call: 1 ms for 4 MB. Only
    long sequences have those, and the exponents of layers that are linear in the length come out at 1.2 to 1.4.
    """
    libc = _libc()
    if libc is not None:
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_MAX, 0)
    try:
        yield
    finally:
        if libc is not None:
            libc.mallopt(M_TRIM_THRESHOLD, 128 << 10)  # what it starts with
            libc.mallopt(M_MMAP_MAX, 65536)
            libc.malloc_trim(0)


def release(device: torch.device) -> None:
    """Hand back to the system what is not in use."""
    gc.collect()
    libc = _libc()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif libc is not None:
        libc.malloc_trim(0)


def _libc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def energy_counter(device: torch.device) -> Callable[[], float] | None:
    """Joules that a GPU has taken since its driver was loaded, by NVML; None where nothing reports them."""
    if device.type != "cuda":
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000


def joules(run: Callable[[], object], device: torch.device) -> float | None:
    """Energy of one run, from as many as the counter needs; what the device takes while idle is part of it."""
    counter = energy_counter(device)
    if counter is None:
        return None
    torch.cuda.synchronize(device)
    runs, before, begin = 0, counter(), perf_counter()
    while perf_counter() - begin < ENERGY_SECONDS:
        run()
        torch.cuda.synchronize(device)
        runs += 1
    return (counter() - before) / runs
