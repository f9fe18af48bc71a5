"""`ssl-kernels export RUN FOLDER`: the model in formats of others, with a card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from tyro.conf import Positional

from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.use import command
from ssl_kernels.trainers.use.loading import load_run

Format = Literal["timm", "onnx", "torch-export", "open_clip", "transformers"]


@dataclass(kw_only=True)
class ExportConfig:
    """Write a run's model for others: weights, what they are fed, and a card with the run's figures. What is written is
    loaded again and compared with the model."""

    run: Positional[Path]
    """Folder of a run, or one of its checkpoints."""
    folder: Positional[Path]
    """Folder to write to."""
    format: tuple[Format, ...] = ("timm",)
    """timm: the image tower's trunk under timm's names, in the folder itself. onnx, torch-export: both towers.
    open_clip, transformers: both towers, where the architectures match. Each of these has a subfolder."""
    overwrite: bool = False
    """Write into a folder that holds other files."""

    def check(self) -> None:
        """Refuse values that cannot work."""
        if self.folder.is_file():
            raise UserError(f"FOLDER: {self.folder} is a file")
        if self.folder.is_dir() and any(self.folder.iterdir()) and not self.overwrite:
            raise UserError(f"FOLDER: {self.folder} is not empty; --overwrite writes into it")


def work(options: ExportConfig, console: Console) -> None:
    files = load_run(options.run).export(options.folder, options.format)
    console.print("written:", *map(str, files), highlight=False, soft_wrap=True, markup=False)


def main(argv: Sequence[str] | None = None, prog: str = "ssl-kernels export") -> int:
    return command.run(ExportConfig, work, argv, prog)
