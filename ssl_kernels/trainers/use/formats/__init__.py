"""A run in formats of others: timm's names, ONNX, torch.export, open_clip's and transformers' folders.

What was written is loaded again, as its users will, and compared with the model before anything is said to be written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.use.formats import card, onnx, open_clip, timm, torch_export, transformers
from ssl_kernels.trainers.use.formats.written import Written

if TYPE_CHECKING:
    from ssl_kernels.trainers.use.trained import Trained

FORMATS = {
    "timm": timm, "onnx": onnx, "torch-export": torch_export, "open_clip": open_clip, "transformers": transformers,
}  # fmt: skip


def export(model: Trained, folder: Path, formats: Sequence[str] = ("timm",)) -> list[Path]:
    """Write `model` to `folder` in each of the formats, and a card with the run's figures; returns the files.

    timm's files lie in the folder itself, the others in a subfolder each. A format that cannot hold the model is
    refused with the reason, before anything is written.
    """
    unknown = [name for name in formats if name not in FORMATS]
    if unknown or not formats:
        raise UserError(f"--format: expected some of {', '.join(FORMATS)}, got {unknown[0] if unknown else 'none'}")
    chosen = [name for name in FORMATS if name in formats]
    for name in chosen:
        reason = FORMATS[name].refusal(model)
        if reason:
            raise UserError(f"--format {name}: {reason}")
    written: dict[str, Written] = {}
    device = model.device
    try:
        model.to("cpu")
        for name in chosen:
            place = folder if name == "timm" else folder / name.replace("-", "_")
            place.mkdir(parents=True, exist_ok=True)
            written[name] = FORMATS[name].write(model, place)
    finally:
        model.to(device)
    page = folder / "README.md"
    page.write_text(card.page(model, written), encoding="utf-8")
    return [*(path for result in written.values() for path in result.files), page]
