"""What the formats have in common: samples to compare with, and how close is close enough."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.trainers.errors import UserError

if TYPE_CHECKING:
    from ssl_kernels.trainers.use.trained import Trained

TOLERANCE = 1e-5  # beside the largest number
TEXTS = ("a red circle", "two dogs", "x")


class Written(NamedTuple):
    """The files of a format, how far what they hold is from the model, and how it is loaded."""

    files: list[Path]
    difference: float
    usage: str


def sample_images(model: Trained, n: int = 2) -> Tensor:
    """uint8 images [n, 3, size, size] that are always the same."""
    return torch.randint(
        256, (n, 3, model.size, model.size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def compared(name: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    """The largest relative difference between what was loaded and the model, or an error where it is too large."""
    worst = 0.0
    for what, (ours, theirs) in pairs.items():
        difference = float((ours - theirs).abs().max() / ours.abs().max().clamp(min=1))
        if not difference <= TOLERANCE:
            raise UserError(
                f"--format {name}: the {what} that was written is {difference:.1e} off the model's; expected"
                f" {TOLERANCE:.0e} at most"
            )
        worst = max(worst, difference)
    return worst


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """A safetensors file, of tensors that share no memory."""
    from safetensors.torch import save_file

    save_file({name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}, path, {"format": "pt"})
