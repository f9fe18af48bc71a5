"""Where the figures of a run's steps go: JSON lines always, TensorBoard and Weights & Biases if they are wanted."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ssl_kernels.trainers.checkpoints import naming

if TYPE_CHECKING:
    from ssl_kernels.trainers.loop_config import LoopConfig

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB_ID = ".wandb-id"
TIMED = ("images_per_s", "peak_mb", "elapsed_s")  # the metrics that two runs of one seed need not share


class Logger(Protocol):
    """Keeps the records of steps: a number of the step, an epoch, and figures by name."""

    def log(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_loggers(config: LoopConfig, settings: dict[str, Any], done: int) -> list[Logger]:
    """Those that a configuration asks for, of a run that has come to the step `done`."""
    folder = config.output_dir
    loggers: list[Logger] = [JsonLines(folder / METRICS)]
    if config.tensorboard:
        loggers.append(TensorBoard(folder / TENSORBOARD, done))
    if config.wandb:
        loggers.append(Wandb(config.wandb, folder, settings))
    return loggers


def read_records(path: Path, up_to: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics file; what is none, such as a last line that a kill cut short, is left out."""
    records = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record and (up_to is None or record["step"] <= up_to):
                records.append(record)
    return records


def json_line(record: dict[str, Any]) -> str:
    """JSON knows no infinity, which the norm of a step that a scaler skips may be: null stands for it."""
    values = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(values) + "\n"


class JsonLines:
    """A line of JSON for each record, on the disk before the next step."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with naming(path):
            self.file = open(path, "a")  # noqa: SIM115 (closed by the run)

    def log(self, record: dict[str, Any]) -> None:
        with naming(self.path):
            self.file.write(json_line(record))
            self.file.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been told
            self.file.close()


class TensorBoard:
    """TensorBoard's event files, of which those after the step `done` are void."""

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._excepthook, threading.excepthook = threading.excepthook, self._pass_over
        with naming(folder):
            self.board = SummaryWriter(str(folder), purge_step=done + 1)

    def log(self, record: dict[str, Any]) -> None:
        with naming(self.folder):
            for name, value in record.items():
                if name not in ("step", "epoch"):
                    self.board.add_scalar(name, value, record["step"])

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.board.close()
        threading.excepthook = self._excepthook

    def _pass_over(self, error: threading.ExceptHookArgs) -> None:
        """An error in TensorBoard's thread is raised at the next record: no traceback is printed for it."""
        if not (issubclass(error.exc_type, OSError) and type(error.thread).__module__.startswith("tensorboard.")):
            self._excepthook(error)


class Wandb:
    """A run of Weights & Biases, with the name of the folder; resumed, it is the same run."""

    def __init__(self, project: str, folder: Path, settings: dict[str, Any]) -> None:
        wandb: Any = importlib.import_module("wandb")
        path = folder / WANDB_ID
        known = path.read_text().strip() if path.exists() else None
        self.run = wandb.init(
            project=project, name=folder.name, dir=os.fspath(folder), config=settings, id=known, resume="allow"
        )
        path.write_text(self.run.id)

    def log(self, record: dict[str, Any]) -> None:
        self.run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def close(self) -> None:
        self.run.finish()
