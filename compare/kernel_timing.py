"""Milliseconds, memory and compile time of calls on a GPU, and the least that moving their bytes takes there."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]


class Figures(NamedTuple):
    forward_ms: float
    train_ms: float
    peak_mib: float
    first_s: float


class Floor(NamedTuple):
    """Milliseconds at the rate of a copy: the forward pass reads its inputs and writes its output once; training also
    reads inputs and upstream gradient once more and writes the gradients."""

    forward_ms: float
    train_ms: float


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    free, _ = torch.cuda.mem_get_info(device)
    source = torch.empty(min(2**30, free // 4), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * milliseconds(lambda: target.copy_(source)))


def milliseconds(run: Callable[[], object]) -> float:
    """The median on the GPU's clock, the cache flushed before each run."""
    from triton.testing import do_bench

    return do_bench(run, warmup=25, rep=100, return_mode="median")


def floor(tensors: Tensors, out: Tensor, rate: float) -> Floor:
    read = sum(x.nbytes for x in tensors.values())
    gradients = sum(x.nbytes for x in tensors.values() if x.requires_grad)
    forward = read + out.nbytes
    return Floor(1e3 * forward / rate, 1e3 * (forward + read + out.nbytes + gradients) / rate)


def trainable(tensors: Tensors, constants: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """The same values as leaves that want gradients, but for the constants."""
    return {name: x.detach().requires_grad_(name not in constants) for name, x in tensors.items()}


def measure(call: Callable[[Tensors], Tensor], tensors: Tensors, rounds: int = 3) -> tuple[Figures, Tensor]:
    """What `call(tensors)` costs forward and with its gradients, and its output; the first run is timed apart.

    The least of as many medians as `rounds`: what else the host does can only make a call take longer.
    """
    leaves = [x for x in tensors.values() if x.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            return call(tensors)

    def train() -> None:
        out = call(tensors)
        torch.autograd.grad(out, leaves, upstream)

    torch.cuda.synchronize()
    begin = perf_counter()
    out = call(tensors)
    upstream = torch.randn_like(out)
    torch.autograd.grad(out, leaves, upstream)
    torch.cuda.synchronize()
    first = perf_counter() - begin

    out = out.detach()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    times = [(milliseconds(forward), milliseconds(train)) for _ in range(rounds)]
    return Figures(*map(min, zip(*times, strict=True)), peak, first), out
