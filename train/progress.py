"""What a person sees of a run: a progress bar (lines where there is no terminal) and a curve."""

import csv
import io
import time
from contextlib import suppress
from math import nan
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from subquad.files import write_atomically

LINES_PER_RUN = 10  # without a terminal
HIGHEST = 1e6  # bits per byte that a curve shows


class RunProgress(Callback):
    """A bar with loss, bits per byte and tokens per second; redraws the curve after each validation."""

    def __init__(self, run: Path, *, bar: bool = True):
        self.run, self.bar = run, bar
        self.console = Console(stderr=True)
        self.display: Progress | None = None
        self._tokens, self._since, self._paused = 0, 0.0, 0.0
        self.training_seconds, self.validated_step = 0.0, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = int(trainer.estimated_stepping_batches)
        if self.bar and trainer.is_global_zero and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"), TimeRemainingColumn())
            self.display = Progress(*columns, console=self.console)
            self.task = self.display.add_task("", total=total, completed=trainer.global_step, text="")
            self.display.start()
        self._lines = max(1, total // LINES_PER_RUN)
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += batch.tokens.numel() * trainer.world_size
        if trainer.fit_loop._should_accumulate():  # this row made no update yet
            return
        step, every = trainer.global_step, trainer.log_every_n_steps
        due = every > 0 and step % every == 0
        if due:
            now = time.monotonic()
            self.rate = self._tokens / (now - self._since)
            self.training_seconds += now - self._since
            self._tokens, self._since = 0, now
            pl_module.log("tokens_per_second", self.rate, batch_size=1, on_step=True, on_epoch=False)
        if not (self.bar and trainer.is_global_zero):
            return
        if self.display is not None:
            text = self._text(trainer) if due else self.display.tasks[0].fields["text"]
            self.display.update(self.task, completed=step, text=text)
        elif due and step % self._lines < trainer.log_every_n_steps:
            self.console.print(f"step {step}: {self._text(trainer)}", highlight=False)

    def _text(self, trainer: Trainer) -> str:
        values = trainer.callback_metrics
        parts = [f"loss {float(values['train/loss']):.3f}", f"{float(values['train/bpb']):.3f} bits/byte"]
        if "val/bpb" in values:
            parts.append(f"validation {float(values['val/bpb']):.3f}")
        return ", ".join([*parts, f"{self.rate:,.0f} tokens/s"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validated_step = trainer.global_step
        if trainer.is_global_zero and trainer.state.fn == "fit":
            for logger in trainer.loggers:
                logger.save()
            draw_curve(self.run)
            bpb = float(trainer.callback_metrics.get("val/bpb", nan))
            if self.bar and self.display is None:
                self.console.print(f"step {trainer.global_step}: validation {bpb:.3f} bits/byte", highlight=False)
        self._since += time.monotonic() - self._paused

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.display is not None:
            self.display.stop()
            self.display = None


def read_metrics(run: Path, last_step: int | None = None) -> list[dict[str, int | float]]:
    """The logged rows of a run, up to a step; a row that a killed process left half-written is left out."""
    rows = []
    path = run / "metrics" / "metrics.csv"
    if not path.exists():
        return rows
    with open(path, newline="", encoding="utf-8") as file:
        for texts in csv.DictReader(file):
            with suppress(ValueError, TypeError):
                row = {name: float(text) for name, text in texts.items() if text != ""}
                row["step"] = int(texts["step"])
                if last_step is None or row["step"] <= last_step:
                    rows.append(row)
    return rows


def draw_curve(run: Path, gzip: float | None = None) -> Path | None:
    """curve.png: bits per byte of training and validation against the step, and of `gzip -9` where it is given.

    A curve that cannot be drawn is a warning, for a run must not end with its picture.
    """
    try:
        return _draw_curve(run, gzip)
    except Exception as error:
        rank_zero_warn(f"the curve of {run} was not drawn: {' '.join(str(error).split()) or type(error).__name__}")
        return None


def _draw_curve(run: Path, gzip: float | None) -> Path | None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(run)
    train, val = (
        [(row["step"], row[name]) for row in rows if abs(row.get(name, nan)) < HIGHEST]
        for name in ("train/bpb", "val/bpb")
    )
    if not train:
        return None
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="0.65", linewidth=1)
    # Beside the steep part of the curve, where nothing else is.
    axes.annotate("training", train[len(train) // 12], (8, 2), textcoords="offset points", color="0.4")
    if val:
        axes.plot(*zip(*val, strict=True), color="black", linewidth=1.8, marker="o", markersize=3.5)
        label = f"validation {val[-1][1]:.2f}"
        behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        axes.annotate(
            label, val[-1], (0, -9), textcoords="offset points", ha="right", va="top", weight="bold", bbox=behind
        )
    if gzip is not None:
        axes.axhline(gzip, color="0.4", linewidth=1, linestyle=(0, (5, 4)))
        # On the left, where the curves are still far above it.
        label, at = f"gzip -9 of the validation text {gzip:.2f}", (0, gzip)
        axes.annotate(label, at, (6, -4), ("axes fraction", "data"), "offset points", va="top", color="0.3")
    # The first steps, near the entropy of a uniform guess, would flatten everything after them.
    values = sorted(value for _, value in train + val)
    low, high = min(values[0], gzip or values[0]), values[int(0.97 * (len(values) - 1))]
    axes.set_ylim(max(0, low - 0.15 * (high - low) - 0.1), high + 0.4)
    axes.set_xlim(0, None)
    axes.set_xlabel("step (updates of the weights)")
    axes.set_ylabel("cross entropy (bits per byte)")
    axes.grid(True, color="0.92", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    write_atomically(run / "curve.png", lambda partial: figure.savefig(partial, format="png"), overwrite=True)
    return run / "curve.png"


class RunLogger(CSVLogger):
    """metrics/metrics.csv of a run, beginning with the rows of what it goes on from."""

    def __init__(self, run: Path, rows: list[dict[str, int | float]]):
        super().__init__(run, name="", version="metrics")
        self.rows = rows

    @property
    @rank_zero_experiment
    def experiment(self) -> "WholeMetrics":
        if self._experiment is None:
            self._experiment = WholeMetrics(self.log_dir, self.rows)
        return self._experiment


class WholeMetrics(ExperimentWriter):
    """Rows that are written whole or not at all, so that a killed process or a full disk takes none that were there."""

    def __init__(self, folder: str, rows: list[dict[str, int | float]]):
        super().__init__(folder)
        self.written: list[dict[str, Any]] = list(rows)

    def _check_log_dir_exists(self) -> None:
        """Lightning deletes the file here."""

    def save(self) -> None:
        if not self.metrics:
            return
        rows = self.written + self.metrics
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, sorted({name for row in rows for name in row}))
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(
            self.metrics_file_path, lambda partial: partial.write_bytes(text.getvalue().encode()), overwrite=True
        )
        self.written, self.metrics = rows, []
