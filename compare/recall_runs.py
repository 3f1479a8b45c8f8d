"""One run of `subquad compare recall`: a small model trained and asked; many of them, some at once; their record."""

import json
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from multiprocessing import connection, get_context
from multiprocessing.process import BaseProcess
from os import cpu_count
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import nn

from subquad.compare.recall_tasks import Task, make_task
from subquad.errors import UserError, one_line
from subquad.infer.state import nbytes
from subquad.layers.base import device_of
from subquad.models.config import LMConfig
from subquad.models.lm import LM
from subquad.train.cli import quiet
from subquad.train.rows import IGNORED, Batch
from subquad.train.task import LanguageModeling

Row = dict[str, Any]
EXAMPLES = 256  # fresh sequences a length
AT_ONCE = 16384  # tokens evaluated in one call
FRESH = 1 << 48  # seeds of fresh sequences begin here, past those of any training
WEIGHT_DECAY = 0.1


def knobs(task: Task) -> Row:
    return {"name": task.name, **asdict(task)}


def model_config(run: Row) -> LMConfig:
    """The model of a run: a block of the mixer `first` where one is given, then blocks of the mixer and a SwiGLU."""
    task = make_task("results", run["task"])
    before = [{"pattern": [{"mixer": run["first"]}]}] if run["first"] else []
    blocks = [*before, {"repeat": run["blocks"], "pattern": [{"mixer": run["mixer"], "ffn": "SwiGLU"}]}]
    return LMConfig(d_model=run["d_model"], vocab_size=task.vocab_size, tie_embeddings=False, blocks=blocks)


def perform(run: Row, device: torch.device, advance: Callable[[], None]) -> Row:
    """Train and evaluate: what a run found."""
    quiet()
    warnings.filterwarnings("ignore", message=".*no `val_dataloader`.*")  # accuracy is measured after training
    task = make_task("results", run["task"])
    torch.manual_seed(run["seed"])
    warmup = max(1, min(100, run["steps"] // 10))
    module = LanguageModeling(model_config(run), lr=run["lr"], warmup_steps=warmup, weight_decay=WEIGHT_DECAY)
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        max_steps=run["steps"],
        gradient_clip_val=1.0,
        callbacks=[_Advance(advance)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, _Stream(task, run))
    except SystemExit as stop:  # Lightning's answer to Ctrl-C, after it has had later ones ignored
        signal.signal(signal.SIGINT, interrupt)
        raise KeyboardInterrupt from stop
    model = module.lm.to(device).eval()
    return {
        "accuracy": [accuracy(model, task, length) for length in run["lengths"]],
        "accuracy_of_variants": [accuracy(model, replace(task, **variant), task.length) for variant in run["variants"]],
        "state_bytes": state_bytes(model, task.length),
        "parameters": model.n_parameters(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
    }


class _Advance(Callback):
    def __init__(self, advance: Callable[[], None]):
        self.advance = advance

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.advance()


class _Stream:
    """The batches of a run's training: each sequence is new, and batch number n follows from the seed and n.

    With `shortest` a batch's length is drawn between it and the task's, evenly on a logarithmic scale.
    """

    def __init__(self, task: Task, run: Row):
        self.task, self.run = task, run

    def __len__(self) -> int:
        return int(self.run["steps"])

    def __iter__(self) -> Iterator[Batch]:
        for step in range(len(self)):
            seed, length = (self.run["seed"] << 32) + step, self.task.length
            if self.run["shortest"]:
                drawn = torch.rand(1, generator=torch.Generator().manual_seed(seed)).item()
                length = round(self.run["shortest"] * (length / self.run["shortest"]) ** drawn)
            examples = self.task.examples(seed, self.run["batch"], length)
            yield Batch(*examples, cu_seqlens=None, bytes_per_token=1.0, carry=None)


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, length: int) -> float | None:
    """The part of right answers on fresh sequences: of all at the training length, at others of those past it.

    None where a layer cannot read so many tokens.
    """
    tokens, targets = task.examples(FRESH + length, EXAMPLES, length)
    if length > task.length:
        targets[:, : task.length] = IGNORED
    device = device_of(model)
    right = 0
    for part, wanted in zip(*(t.split(max(1, AT_ONCE // length)) for t in (tokens, targets)), strict=True):
        try:
            logits, _ = model(part.to(device))
        except UserError:
            return None
        right += int((logits.argmax(-1).cpu() == wanted).sum())
    return right / int((targets != IGNORED).sum())


def state_bytes(model: LM, length: int) -> int | None:
    """Of one sequence after `length` tokens, caches included; None where a layer has no state to decode with."""
    try:
        return nbytes(model.init_state(1, length))
    except UserError:
        return None


class Results:
    """A file of runs: a line a finished run, {what it depends on} and under "found" what it found."""

    def __init__(self, path: Path, *, make: bool):
        self.path = path
        self.found: dict[str, Row] = {}
        try:
            if make:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            text = path.read_text(encoding="utf-8")
            if make and text and not text.endswith("\n"):  # of a process killed while it wrote
                self._append("")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"cannot {'write' if make else 'read'} {path}: {reason}") from error
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
                found = row.pop("found")
                self.found[self._key(row)] = row | found
            except (ValueError, KeyError, AttributeError, TypeError):
                Console(stderr=True).print(f"{self.path}: line {number} is no whole run and is left out")

    @staticmethod
    def _key(run: Mapping[str, Any]) -> str:
        return json.dumps(run, sort_keys=True)

    def find(self, run: Row) -> Row | None:
        return self.found.get(self._key(run))

    def add(self, run: Row, found: Row) -> None:
        self._append(json.dumps(run | {"found": found}))
        self.found[self._key(run)] = run | found

    def _append(self, line: str) -> None:
        """In one write at the file's end: other commands may add to the same file."""
        with open(self.path, "ab", buffering=0) as file:
            file.write(f"{line}\n".encode())


def carry_out(
    runs: Sequence[Row], device: torch.device, workers: int, advance: Callable[[Row, int], None]
) -> Iterator[tuple[Row, Row | str]]:
    """Each run with what it found, as they end, or with one line that says why it failed.

    With several workers each run is a process of its own, so that none takes another with it; advance(run, n) is told
    of n further steps.
    """
    if workers == 1:
        for run in runs:
            yield run, _attempt(run, device, partial(advance, run, 1))
        return
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])  # each process begins with torch and Lightning imported
    threads = max(1, (cpu_count() or 1) // workers)
    waiting = list(reversed(runs))
    at_work: dict[Any, tuple[Row, BaseProcess]] = {}  # by our end of its pipe
    try:
        while waiting or at_work:
            while waiting and len(at_work) < workers:
                run = waiting.pop()
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(run, device, threads, theirs), daemon=True)
                process.start()
                theirs.close()
                at_work[ours] = run, process
            for ours in connection.wait(list(at_work)):
                run, process = at_work[ours]
                try:
                    message = ours.recv()
                except EOFError:
                    process.join()
                    message = f"its process ended with code {process.exitcode}"
                if isinstance(message, int):
                    advance(run, message)
                    continue
                del at_work[ours]
                ours.close()
                process.join()
                yield run, message
    finally:
        for _, process in at_work.values():
            process.kill()
            process.join()


def _work(run: Row, device: torch.device, threads: int, out: connection.Connection) -> None:
    """Perform a run in a process of its own and send steps, then what it found or why it failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command ends its processes itself
    torch.set_num_threads(threads)
    out.send(_attempt(run, device, lambda: out.send(1)))
    out.close()


def _attempt(run: Row, device: torch.device, advance: Callable[[], None]) -> Row | str:
    try:
        return perform(run, device, advance)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {one_line(error)}"
