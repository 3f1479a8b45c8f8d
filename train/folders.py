"""A run's folder belongs to one run at a time, and is made by one process of it."""

import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only

from subquad.errors import UserError, shown_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def first_process() -> bool:
    """Whether this is the one process of a run, or the first of several: known before they meet.

    torchrun and Slurm say so by RANK and SLURM_PROCID, Lightning to those that it starts by LOCAL_RANK.
    """
    return (getattr(rank_zero_only, "rank", 0) or 0) == 0


class Lock:
    """Holds a run's folder for this process until `release`, or until it ends however it ends.

    The file `.NAME.lock` beside the folder names its owner. The system holds the lock (flock), so that none outlives a
    killed process, and a file that was left means nothing.

    Raises UserError, which names the owner, where another process holds it.
    """

    def __init__(self, run: Path):
        run = Path(os.path.realpath(run))
        self.path = run.with_name(f".{run.name}.lock")
        self.handle: int | None = None
        if fcntl is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            handle = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.pread(handle, 4096, 0)
                os.close(handle)
                raise UserError(f"the run folder {shown_text(str(run))} is in use{_owner(owner)}") from error
            if _is_still(self.path, handle):
                break
            os.close(handle)  # its owner removed it between our two calls
        self.handle = handle
        about = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(about | {"command": " ".join(sys.argv)[:1000]}).encode(), 0)

    def release(self) -> None:
        if self.handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self.handle)
            self.handle = None


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _owner(text: bytes) -> str:
    try:
        about: dict[str, Any] = json.loads(text)
        return f" by process {about['pid']} on {about['host']} since {about['since']}: {about['command']}"
    except (ValueError, KeyError, TypeError):
        return " by another process"  # which has just taken it
