"""How far an evaluation has come, on the console."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

_EVERY_S = 5.0  # seconds, at least, between two lines where there is no terminal


class Stages:
    """Shows what is being evaluated: as a bar on a terminal, elsewhere as a line every few seconds.

    Without a console it shows nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(quiet=True)
        columns = (TextColumn("evaluating: {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        shown = self.console.is_terminal and not self.console.quiet
        self.progress = Progress(*columns, console=self.console, disable=not shown, transient=True)
        self.bar = self.progress.add_task("", total=0)
        self.begun = self.total = 0  # stages
        self.told_at = float("-inf")

    def plan(self, stages: int) -> None:
        """So many stages more will come."""
        self.total += stages
        self.progress.update(self.bar, total=self.total)

    def begin(self, what: str) -> None:
        """A stage begins, and the one before has ended."""
        self.progress.update(self.bar, description=what, completed=self.begun)
        self.begun += 1
        now = time.monotonic()
        if not self.console.is_terminal and now - self.told_at >= _EVERY_S:
            self.told_at = now
            self.console.print(f"evaluating: {what} ({self.begun} of {self.total})", highlight=False, markup=False)

    def __enter__(self) -> Stages:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.progress.stop()
