"""CLIP: an image finds its text among the batch's texts, and a text its image (Radford 2021, arXiv 2103.00020).

    x = normalize(image_tower(images))        # [B, D]
    y = normalize(text_tower(texts))          # [B, D]
    z = t * x @ y.T                           # t = exp(log-scale), learned; start t = 1 / 0.07, at most 100
    loss = (cross_entropy(z, diagonal) + cross_entropy(z.T, diagonal)) / 2

Run it: `ssl-kernels train clip` or `python -m ssl_kernels.trainers.clip`. With no arguments it learns OpenMoji in a few
minutes on a laptop, with the settings of the SigLIP trainer.

`--lock-image` keeps the image tower as it is (LiT, Zhai 2021, arXiv 2111.07991): a text tower learns to read out a
pretrained trunk. `--image-head dinotxt` then puts two trainable blocks on top of a ViT and embeds its class token
beside the mean of its patches (dino.txt, Jose 2024, arXiv 2412.16334).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels import ClipLoss
from ssl_kernels.distributed import world
from ssl_kernels.trainers import command, train_pairs
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.ranges import SHARE_BELOW_ONE, at_least, require
from ssl_kernels.trainers.two_towers import TwoTowerConfig, TwoTowerModel

MAX_LOG_SCALE = math.log(100.0)


@dataclass
class ClipConfig(TwoTowerConfig):
    """Train an image tower and a text tower with the softmax loss. The defaults learn OpenMoji in a few minutes.

    ssl-kernels train clip --data pairs.csv --output-dir runs/pairs
    """

    output_dir: Path = Path("runs/clip")
    """Folder for logs, checkpoints and pictures."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the batch."""

    def check(self) -> None:
        super().check()
        require(self, at_least(2, "pairs to tell apart"), "batch_size")
        require(self, SHARE_BELOW_ONE, "label_smoothing")


class Clip(TwoTowerModel):
    """Two towers and a learned scale."""

    def __init__(
        self, image: ImageTower, text: nn.Module, loss: ClipLoss, backend: str = "auto", check: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(image, text, loss, backend, check)
        self.log_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        self.label_smoothing = label_smoothing

    def contrast(self, x: Tensor, y: Tensor, ids: Tensor | None, *learned: Tensor) -> Tensor:
        (log_scale,) = learned
        scale = log_scale.exp()
        if ids is None and self.label_smoothing == 0:
            loss: Tensor = self.loss(x, y, scale)
        else:  # pairs that share a caption or an image are each other's positives: no false negatives
            smoothing = self.label_smoothing
            loss = K.clip_loss(x, y, scale, x_ids=ids, y_ids=ids, label_smoothing=smoothing, **self.loss.how())
        return loss

    @torch.no_grad()
    def after_step(self, number: int) -> None:
        """Beyond a scale of 100 the authors found training unstable."""
        super().after_step(number)
        self.log_scale.clamp_(max=MAX_LOG_SCALE)


def train(config: ClipConfig, console: Console) -> None:
    def model(image: ImageTower, text: nn.Module) -> Clip:
        loss = ClipLoss(group=world())
        return Clip(image, text, loss, config.loss_backend, config.check_loss, config.label_smoothing)

    train_pairs.train("CLIP", model, config, console)


def main(argv: Sequence[str] | None = None, prog: str = "python -m ssl_kernels.trainers.clip") -> int:
    return command.run(ClipConfig, train, argv, prog)


if __name__ == "__main__":
    raise SystemExit(main())
