"""From the folder of a run to its networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ssl_kernels.trainers.checkpoints import CHECKPOINT
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation import compare
from ssl_kernels.trainers.use.trained import Trained


def load_run(run: Path, device: str | torch.device = "cpu") -> Trained:
    """The networks of the run in a folder, or of one of its checkpoints, on a device."""
    path = run / CHECKPOINT if run.is_dir() else run
    state = read(path)
    figures: dict[str, Any] = compare.load(path.parent) if (path.parent / "summary.json").is_file() else {}
    return Trained(state["inputs"], state["model"], device=device, config=state["config"], figures=figures, path=path)


def read(path: Path) -> dict[str, Any]:
    """A checkpoint that says how its networks are built and fed."""
    if not path.is_file():
        raise UserError(f"RUN: no checkpoint at {path}; expected a run's folder or its {CHECKPOINT}")
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch, zipfile and pickle each have their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"RUN: {path} is not a readable checkpoint ({reason[:120]})") from None
    if "model" not in state or "config" not in state:
        raise UserError(f"RUN: {path} is not a checkpoint of ssl-kernels train or finetune")
    if not state.get("inputs"):
        raise UserError(
            f"RUN: {path} does not say what its networks are fed, for an older version wrote it; train again, or"
            " continue an unfinished run with --resume, which writes a new one"
        )
    return state


def device_of(name: str) -> torch.device:
    """The device that an option names, `auto` being an accelerator where there is one."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: cannot use {name!r} ({str(error).splitlines()[0]})") from None
    return device
