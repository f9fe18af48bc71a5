"""What a run tells as it goes on: `metrics.jsonl`, TensorBoard, and a bar, or a line to each epoch, on the console."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

METRICS = "metrics.jsonl"
TIMED = ("images_per_s", "peak_mb", "elapsed_s")  # the metrics that two runs of one seed need not share


def read_records(path: Path, up_to: int | None = None) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if up_to is None or record["step"] <= up_to:
                records.append(record)
    return records


def json_line(record: dict[str, Any]) -> str:
    """JSON knows no infinity, which the norm of a step that a scaler skips may be: null stands for it."""
    values = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(values) + "\n"


def peak_memory_mb(device: torch.device) -> float:
    """The most memory used so far: of the GPU if the run is on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import psutil

    info = psutil.Process().memory_info()
    try:
        import resource
    except ImportError:  # Windows counts the peak itself
        return float(info.peak_wset) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (2**20 if os.uname().sysname == "Darwin" else 2**10)


@dataclass
class RunLog:
    """The open log of a run of `total` steps in `epochs` epochs; only the first of several processes has files."""

    console: Console
    progress: Progress
    bar: TaskID
    board: SummaryWriter | None
    file: TextIO | None
    total: int
    epochs: int
    last: str = ""  # record, as the console shows it

    def write(self, record: dict[str, Any]) -> None:
        """Keep a record of a step."""
        if self.file is None or self.board is None:
            return
        self.file.write(json_line(record))
        self.file.flush()
        for name, value in record.items():
            if name not in ("step", "epoch"):
                self.board.add_scalar(name, value, record["step"])
        self.last = (
            f"epoch {record['epoch'] + 1}/{self.epochs}  loss {record['loss']:.4f}"
            f"  {record['images_per_s']:.0f} images/s  {record['peak_mb']:.0f} MB"
        )

    def show(self, done: int, elapsed_s: float) -> None:
        """Show on the console how far the run has come."""
        self.progress.update(self.bar, description=self.last, completed=done)
        if not self.console.is_terminal and done % (self.total // self.epochs) == 0:
            left = elapsed_s / done * (self.total - done)
            self.console.print(f"step {done}/{self.total}  {self.last}  {left:.0f} s left", highlight=False)


@contextlib.contextmanager
def open_log(folder: Path | None, console: Console, *, done: int, total: int, epochs: int) -> Iterator[RunLog]:
    """The log of a run that has come to the step `done`; without a folder, of a process that does not log."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    bar = progress.add_task("", total=total, completed=done)
    if folder is None:
        yield RunLog(console, progress, bar, None, None, total, epochs)
        return
    from torch.utils.tensorboard import SummaryWriter

    with progress, SummaryWriter(folder / "tensorboard", purge_step=done + 1) as board, \
            open(folder / METRICS, "a") as file:  # fmt: skip
        yield RunLog(console, progress, bar, board, file, total, epochs)
