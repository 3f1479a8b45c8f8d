"""The best launch values of each kernel on the GPU at hand, among the candidates listed beside its table."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.progress import Progress

from subquad.compare.kernel_cases import Case, Sizes, Tensors
from subquad.compare.kernel_timing import milliseconds, trainable
from subquad.kernels import blocked
from subquad.kernels.backend import backend
from subquad.kernels.examples import differences
from subquad.kernels.triton import configs
from subquad.kernels.triton.configs import Values

# Of outputs and gradients, relative to the plain recurrence in float64: it separates a wrong kernel from a rounded one.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
SHORT = 130  # tokens of a check: two chunks and a bit


class Best(NamedTuple):
    """`gain` is how many times as fast the ops are as with the values of `before`."""

    kernel: str
    widths: Values
    values: Values
    before: Values
    gain: float


class Run(NamedTuple):
    """One case at one size, as it is timed and as it is checked."""

    case: Case
    sizes: Sizes
    dtype: torch.dtype
    device: torch.device

    def ms(self) -> float:
        """Forward and backward."""
        example = self.case.example(self.sizes, self.dtype, self.device)
        tensors: Tensors = trainable(example.inputs, self.case.constants)
        leaves = [x for x in tensors.values() if x.requires_grad]

        def train() -> None:
            out = example._replace(inputs=tensors).call()[0]
            torch.autograd.grad(out, leaves, out.detach())

        with backend("triton"), blocked.ignored():
            return milliseconds(train)

    def is_right(self) -> bool:
        return all(x < TOLERANCE[self.dtype] for x in errors(self.case, self.sizes, self.dtype, self.device).values())


def errors(case: Case, sizes: Sizes, dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """How far the Triton form's outputs and gradients are off at these widths, on one short sequence."""
    small = case.example(sizes._replace(B=1, T=SHORT), dtype, device)
    with blocked.ignored():
        return differences(small, "triton")


def tune(
    cases: Sequence[Case], shapes: Sequence[Sizes], dtype: torch.dtype, device: torch.device, progress: Progress
) -> list[Best]:
    """For every kernel and widths that the cases launch, the values that make these cases fastest and are right."""
    users: dict[tuple[str, tuple[tuple[str, int], ...]], list[Run]] = {}
    for run in (Run(case, sizes, dtype, device) for sizes in shapes for case in cases):
        with configs.recorded() as calls:
            run.ms()
        for kernel, widths in calls:
            users.setdefault((kernel, tuple(widths.items())), []).append(run)
    found = []
    task = progress.add_task("", total=sum(len(configs.candidates(kernel)) for kernel, _ in users))
    for (kernel, pairs), runs in users.items():
        widths = dict(pairs)
        progress.update(task, description=f"{kernel} {' '.join(f'{k}={v}' for k, v in pairs)}")
        progress.refresh()
        before = configs.config(kernel, device=device, **widths)
        base = [run.ms() for run in runs]
        times = []
        for values in configs.candidates(kernel):
            with configs.forced(kernel, values):
                times.append((_relative_time(runs, base), values))
            progress.update(task, advance=1, refresh=True)
        for time, values in sorted(times, key=lambda pair: pair[0]):
            with configs.forced(kernel, values):
                if time < float("inf") and all(run.is_right() for run in runs):
                    found.append(Best(kernel, widths, values, before, 1 / time))
                    break
    return found


def _relative_time(runs: Sequence[Run], base: Sequence[float]) -> float:
    """The mean ratio to the base; infinite where the values do not compile or fit on this GPU."""
    from triton.errors import TritonError

    try:
        return sum(run.ms() / ms for run, ms in zip(runs, base, strict=True)) / len(runs)
    except (TritonError, RuntimeError):  # the compiler's passes raise the latter
        return float("inf")
