"""Where a command runs, in which precision, and how much memory it takes."""

import sys
from pathlib import Path

import torch

from subquad.errors import UserError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def pick_dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise UserError(f"there is no dtype {name!r} here; {nearest(name, DTYPES)}")
    return None if name is None else DTYPES[name]


def pick_device(name: str | None) -> torch.device:
    """The named device, or the first accelerator, or the CPU; one that is not here is an error."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return accelerator or torch.device("cpu")
    here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"there is no device {name!r}; this machine has: {here}") from error
    if device.type == "meta":
        raise UserError(f"there is no device {name!r} to compute on; this machine has: {here}")
    return device


class PeakMemory:
    """The most memory that was in use since this was made, above what was in use then.

    On a GPU what torch has allocated; else the resident memory of the process. `source` says how it was measured: where
    the system cannot reset its peak (all but Linux), what the process took before is part of `ru_maxrss` and hides
    smaller peaks.
    """

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.source = "cuda"
            torch.cuda.reset_peak_memory_stats(device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5")
                self.source = "VmHWM"
            except OSError:
                self.source = "none" if sys.platform == "win32" else "ru_maxrss"
        self.before = torch.cuda.memory_allocated(device) if self.source == "cuda" else self._peak()

    def above(self) -> int | None:
        """Bytes, or None where the system does not tell."""
        return None if self.source == "none" else max(self._peak() - self.before, 0)

    def _peak(self) -> int:
        if self.source == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if self.source == "VmHWM":
            status = Path("/proc/self/status").read_text()
            return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
        if self.source == "none":
            return 0
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
