"""What a run tells as it goes on: its loggers' records, and a bar, or a line to each epoch, on the console."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from ssl_kernels.collapse import CollapseWarning, SpreadMonitor
from ssl_kernels.trainers.loggers import Logger


def peak_memory_mb(device: torch.device) -> float:
    """The most memory used so far: of the GPU if the run is on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # in ru_maxrss, Linux counts what the process held that started this one
        (peak,) = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(peak) / 2**10
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**20
    unit = 2**20 if os.uname().sysname == "Darwin" else 2**10
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / unit


@dataclass
class RunLog:
    """The open log of a run of `total` steps, of which an epoch has `epoch_steps`; only the first of several processes
    has loggers."""

    console: Console
    progress: Progress
    bar: TaskID
    loggers: Sequence[Logger]
    total: int
    epoch_steps: int
    last: str = ""  # record, as the console shows it
    monitors: dict[str, SpreadMonitor] = field(default_factory=dict)  # of each spread that is logged

    def write(self, record: dict[str, Any]) -> None:
        """Keep a record of a step. Raises a `CollapseWarning` where its figures are those of a collapse."""
        for name in (name for name in record if name.endswith("_std")):
            monitor = self.monitors.setdefault(name, SpreadMonitor(f"the {name.removesuffix('_std')}s"))
            monitor(record[name])
        for logger in self.loggers:
            logger.log(record)
        epochs = -(-self.total // self.epoch_steps)
        self.last = (
            f"epoch {record['epoch'] + 1}/{epochs}  loss {record['loss']:.4f}"
            f"  {record['images_per_s']:.0f} images/s  {record['peak_mb']:.0f} MB"
        )

    def show(self, done: int, elapsed_s: float) -> None:
        """Show on the console how far the run has come. It goes on where the terminal, or who reads it, is gone."""
        with contextlib.suppress(OSError, SystemExit):  # which rich raises for a pipe that nobody reads
            self.progress.update(self.bar, description=self.last, completed=done)
            if not self.console.is_terminal and (done % self.epoch_steps == 0 or done == self.total):
                left = elapsed_s / done * (self.total - done)
                self.console.print(f"step {done}/{self.total}  {self.last}  {left:.0f} s left", highlight=False)


@contextlib.contextmanager
def collapse_told(tell: Callable[[str], object]) -> Iterator[None]:
    """Warnings of collapse are told in a line, which names no place in the code."""
    show = warnings.showwarning

    def show_or_tell(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if issubclass(category, CollapseWarning):
            tell(str(message))
        else:
            show(message, category, *where, **options)

    warnings.showwarning = show_or_tell
    try:
        yield
    finally:
        warnings.showwarning = show


@contextlib.contextmanager
def open_log(
    console: Console, loggers: Sequence[Logger], *, done: int, total: int, epoch_steps: int
) -> Iterator[RunLog]:
    """The log of a run that has come to the step `done`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal or console.quiet)
    bar = progress.add_task("", total=total, completed=done)
    try:
        with contextlib.suppress(OSError):
            progress.start()
        yield RunLog(console, progress, bar, loggers, total, epoch_steps)
    finally:
        with contextlib.suppress(OSError):
            progress.stop()
        for logger in loggers:
            logger.close()
