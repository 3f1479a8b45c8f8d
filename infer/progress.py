"""How far a long job is."""

from time import perf_counter
from typing import Any


class Progress:
    """A bar on stderr for what takes more than two seconds."""

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done = what, total, 0
        self.bar: Any = None
        self.began = perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def advance(self, count: int) -> None:
        self.done += count
        if self.bar is None and self.done < self.total and perf_counter() - self.began > 2:
            self._show()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f} / {task.total:,.0f} tokens"),
        )
        self.bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
        self.bar.start()
        self.task = self.bar.add_task(self.what, total=self.total)

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()
