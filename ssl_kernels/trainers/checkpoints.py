"""Checkpoints from which a run continues bit-exactly, and files that are written whole or not at all."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssl_kernels.trainers.errors import UserError

CHECKPOINT = "last.pt"


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, flush it to the disk, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checkpoint_path(resume: Path) -> Path:
    """The checkpoint that `--resume` means: the file itself, or the one in the folder."""
    path = resume / CHECKPOINT if resume.is_dir() else resume
    if not path.is_file():
        raise UserError(f"--resume: no checkpoint at {path}; expected a run's folder or its {CHECKPOINT}")
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "optimizer", "step", "total", "data", "rng", "config", "elapsed_s"} - state.keys()
    except Exception as error:  # torch, zipfile and pickle each have their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--resume: {path} is not a readable checkpoint ({reason[:120]})") from None
    if missing:
        raise UserError(f"--resume: {path} is not a checkpoint of this trainer (it lacks {', '.join(sorted(missing))})")
    return dict(state)


def rng_state() -> dict[str, Any]:
    """Where every random generator of this process stands, in types that `torch.load(weights_only=True)` knows."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": (version, list(internal), gauss),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every random generator back to where `rng_state` found it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
