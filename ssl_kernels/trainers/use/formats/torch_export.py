"""The towers as torch.export programs: `torch.export.load(path).module()` runs them without this library."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ssl_kernels.trainers.use.formats.towers import towers
from ssl_kernels.trainers.use.formats.written import Written, compared

if TYPE_CHECKING:
    from ssl_kernels.trainers.use.trained import Trained


def refusal(model: Trained) -> str | None:
    """Every model can be written so."""
    return None


def write(model: Trained, folder: Path) -> Written:
    """Write a file to each tower, and run what was written."""
    files, pairs = [], {}
    for name, tower in towers(model).items():
        files.append(folder / f"{name}.pt2")
        torch.export.save(tower.program(), files[-1])
        loaded = torch.export.load(files[-1]).module()
        pairs[f"{name} tower"] = tower.expected(), loaded(*tower.example)
    return Written(files, compared("torch-export", pairs), _usage(model, folder.name))


def _usage(model: Trained, folder: str) -> str:
    lines = [
        "```python", "import torch", "",
        f'image = torch.export.load("{folder}/image.pt2").module()',
        f"pixels = torch.zeros(1, 3, {model.size}, {model.size}, dtype=torch.uint8)  # your images, not normalised",
        "embedding = image(pixels)",
    ]  # fmt: skip
    if model.text is not None:
        lines.append(f'text = torch.export.load("{folder}/text.pt2").module()')
    return "\n".join([*lines, "```", ""])
