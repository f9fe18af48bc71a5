"""From the folder of a run to its networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ssl_kernels.trainers.checkpoints import checkpoint_path, load_checkpoint
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation import compare
from ssl_kernels.trainers.use.trained import Trained


def load_run(run: Path, device: str | torch.device = "cpu") -> Trained:
    """The networks of the run in a folder, or of one of its checkpoints, on a device."""
    path = checkpoint_path(run, "RUN")
    state = load_checkpoint(path, "RUN")
    if not state.get("inputs"):
        raise UserError(
            f"RUN: {path} does not say what its networks are fed, for an older version wrote it; train again, or"
            " continue an unfinished run with --resume, which writes a new one"
        )
    figures: dict[str, Any] = compare.load(path.parent) if (path.parent / "summary.json").is_file() else {}
    return Trained(state["inputs"], state["model"], device=device, config=state["config"], figures=figures, path=path)


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
