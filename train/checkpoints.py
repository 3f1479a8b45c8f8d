"""Checkpoints that are whole or absent, and stops that leave one behind."""

import io
import os
import random
import signal
import struct
import sys
import threading
import zipfile
import zlib
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from subquad.errors import UserError
from subquad.files import write_atomically

T = TypeVar("T")
STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopped(Exception):
    """Training was asked to stop and did; `path` is the newest checkpoint, if there is one."""

    def __init__(self, path: Path | None):
        super().__init__(f"stopped with checkpoint {path}")
        self.path = path


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, to disk, and renames: whoever kills the process finds the old file or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()  # torch reports a full disk as a RuntimeError without its cause
        torch.save(checkpoint, buffer)
        write_atomically(path, lambda partial: partial.write_bytes(buffer.getbuffer()), overwrite=True)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if not is_whole(path):
            raise UserError(f"the checkpoint {path} is damaged: its checksums are not those that were written")
        try:
            return super().load_checkpoint(path, map_location, weights_only)
        except Exception as error:  # torch says to a damaged file whatever its parts say
            raise UserError(f"the checkpoint {path} is damaged: {type(error).__name__}: {error}") from error


def newest(folder: Path) -> Path | None:
    """The checkpoint of the most steps."""
    return max(folder.glob("step-*.ckpt"), key=lambda path: path.name, default=None)


def step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def is_whole(path: str | Path) -> bool:
    """Whether a checkpoint's parts have the checksums that torch, which writes a zip file, put beside them."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, zlib.error, struct.error, RuntimeError):
        return False


def newest_whole(folder: Path, *, say: bool) -> Path:
    """The checkpoint of the most steps that is not damaged; those that are, are named on stderr if `say`.

    Raises UserError where there is none.
    """
    found = sorted(folder.glob("step-*.ckpt"), key=lambda path: path.name, reverse=True)
    for path in found:
        if is_whole(path):
            return path
        if say:
            print(f"the checkpoint {path} is damaged; the one before it is taken", file=sys.stderr)
    what = "no checkpoint" if not found else "no undamaged checkpoint"
    raise UserError(f"there is {what} in {folder} to resume from")


def over_ranks(value: T) -> list[T] | None:
    """The values of all processes, in the order of their ranks, on the first; None on the others."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    found: list[Any] | None = [None] * world if rank == 0 else None
    torch.distributed.gather_object(value, found)
    return found


class RunCheckpoints(Checkpoint):
    """Saves `folder`/step-N.ckpt every `every` steps, and when training ends, fails or is told to stop; keeps the last.

    SIGINT (Ctrl-C), SIGTERM and SIGHUP let the current step finish, save and raise `Stopped`; a second one stops at
    once. One that was ignored from outside, as nohup does, stays so.
    Python's, numpy's and torch's random states go into the checkpoint, which Lightning leaves out.
    """

    def __init__(self, folder: Path, every: int, keep: int = 2):
        self.folder, self.every, self.keep = folder, every, keep
        self.saved_step = 0
        self._asked_to_stop = self._stopping = False
        self._handlers: dict[int, Any] = {}
        self._random: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved_step = trainer.global_step
        if self._random is not None:
            _set_random_state(self._random)
            self._random = None
        if threading.current_thread() is threading.main_thread():
            heard = [
                number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN
            ]  # nohup ignores one
            self._handlers = {number: signal.signal(number, self._on_signal) for number in heard}

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._asked_to_stop:
            raise Stopped(newest(self.folder))
        self._asked_to_stop = True
        os.write(2, b"\nstopping after this step (once more: at once, losing what follows the newest checkpoint)\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():  # the gradients so far are in no checkpoint
            return
        # One process of several may hear it first.
        asked = trainer.strategy.reduce_boolean_decision(self._asked_to_stop, all=False)
        if asked or trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps:
            self._save(trainer)
        self._stopping = asked

    def _stop(self, *args: Any) -> None:
        # Not at once in on_train_batch_end, after which Lightning still logs the step.
        if self._stopping:
            raise Stopped(newest(self.folder))

    on_train_batch_start = on_validation_start = on_train_epoch_end = _stop

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        self._restore_handlers()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers()
        # A failed disk would fail again, and after a signal in the middle of an update there is no whole state.
        # Of several processes the others may wait elsewhere for ever.
        if trainer.training and trainer.world_size == 1 and not isinstance(exception, Stopped | OSError | UserError):
            self._save(trainer)
            if path := newest(self.folder):
                print(
                    f"training failed; {path} holds its last whole step, and --resume goes on from it", file=sys.stderr
                )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_handlers()

    def _save(self, trainer: Trainer) -> None:
        if trainer.global_step == self.saved_step:
            return
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}.ckpt")
        self.saved_step = trainer.global_step
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step-*.ckpt"))[: -self.keep]:
                old.unlink()

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def state_dict(self) -> dict[str, Any]:
        return {"random_of_ranks": over_ranks(_random_state())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        states = state_dict.get("random_of_ranks") or [state_dict["random"]]  # as version 0.1.0 wrote it
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        self._random = states[rank] if rank < len(states) else None


def _random_state() -> dict[str, Any]:
    """In types that torch.load takes with weights_only."""
    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
