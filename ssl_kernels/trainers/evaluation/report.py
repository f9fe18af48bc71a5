"""The report on a finished run: its closing table, its summary and its curves."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ssl_kernels.trainers.checkpoints import BEST, CHECKPOINT, write_atomically
from ssl_kernels.trainers.data.faults import EVALUATION, TRAINING, Faults
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.evaluation import curves
from ssl_kernels.trainers.loggers import METRICS
from ssl_kernels.trainers.training import Result

Row = tuple[str, Sequence[str], str]  # a name, the cells of the first columns, and a remark


def closing_table(
    console: Console, title: str, caption: str, columns: Sequence[str], figures: Sequence[Row], training: Sequence[Row],
    result: Result, total_s: float,
) -> None:  # fmt: skip
    """Print what the run reached, a line to each figure, and below how it got there: by what training, time, memory."""
    table = Table(
        title=title, title_justify="left", title_style="bold", caption=caption or None, caption_justify="left"
    )
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("remarks")
    seconds = f"{result.elapsed_s:.0f} / {total_s:.0f}"
    speed = result.images_per_s
    costs: list[Row] = [
        ("seconds", [seconds], f"training ({result.steps} steps) / all"),
        *([] if speed is None else [("images a second", [f"{speed:.0f}"], "in training, without the first step")]),
        ("peak memory, MB", [f"{result.peak_mb:.0f}"], "CPU: whole process with its libraries"),
    ]
    for rows in (figures, [*training, *costs]):
        for name, cells, remark in rows:
            table.add_row(name, *cells, *[""] * (len(columns) - len(cells)), remark)
        table.add_section()
    console.print(table)
    for note in result.notes:
        console.print(note, highlight=False, soft_wrap=True)


@dataclass
class Report:
    """What is left of a finished run: in its folder pictures and a summary, on the console what these leave out."""

    console: Console
    folder: Path
    title: str
    result: Result
    begun: float  # by `time.perf_counter`
    pictures: list[str] = field(default_factory=list)  # besides the curves

    @property
    def picture_title(self) -> str:
        """The title, and before it the last two parts of the run's folder."""
        return f"{'/'.join(self.folder.parts[-2:])}: {self.title}"

    def draw_curves(self, figures: Sequence[Any] | None = None) -> None:
        """The curves of training, with the figures of the evaluation once there are any."""
        if self.result.records:  # whose file may be lost
            remark = curves.plot_curves(
                self.folder / "curves.png", self.result.records, self.picture_title, figures or ()
            )
            if figures is not None:
                self.remark("curves.png", remark)

    def remark(self, picture: str, what: str) -> None:
        """Say what a picture leaves out, if anything."""
        if what:
            self.console.print(f"{picture}: {what}", highlight=False, markup=False, soft_wrap=True)

    def summarise(self, figures: Sequence[Any], faults: Faults | None = None, found: Found | None = None) -> float:
        """Write the summary; returns how many seconds the run has taken in all."""
        total_s = time.perf_counter() - self.begun
        write_summary(self.folder / "summary.json", self.result, figures, total_s, faults, found)
        return total_s

    def name_files(self) -> None:
        """Name the files of the run."""
        files = (CHECKPOINT, BEST, METRICS, "config.json", "tensorboard", "curves.png", "summary.json", *self.pictures)
        written = [self.folder / file for file in files if (self.folder / file).exists()]
        self.console.print("written:", *map(str, written), highlight=False, soft_wrap=True)


def loss_difference(result: Result) -> float | None:
    """The largest relative difference between the loss and the reference's; None if they were not compared."""
    compared = [r for r in result.records if "loss_reference" in r]
    differences = [abs(r["loss_check"] - r["loss_reference"]) / max(abs(r["loss_reference"]), 1e-12) for r in compared]
    return max(differences, default=None)


def write_summary(
    path: Path, result: Result, figures: Sequence[Any], total_s: float, faults: Faults | None = None,
    found: Found | None = None,
) -> None:  # fmt: skip
    """What a run reached, what was found of its data, and what of it was left out, for programs."""
    faults = Faults() if faults is None else faults
    first, last = (result.records[i]["loss"] if result.records else None for i in (0, -1))
    summary: dict[str, Any] = {
        "figures": [asdict(figure) for figure in figures], "loss_first": first, "loss_last": last,
        "loss_difference": loss_difference(result), "steps": result.steps, "training_s": result.elapsed_s,
        "data": None if found is None else found.as_dict(),
        "total_s": total_s, "peak_mb": result.peak_mb, "images_per_s": result.images_per_s, "notes": result.notes,
        "left_out": {of: faults.counts(of) for of in (TRAINING, EVALUATION)},
    }  # fmt: skip
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(summary, indent=2) + "\n"))
