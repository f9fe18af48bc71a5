"""SigLIP: images and texts meet in a sigmoid loss over all pairs of a batch (Zhai 2023, arXiv 2303.15343).

    x = normalize(image_tower(images))        # [B, D]
    y = normalize(text_tower(texts))          # [B, D]
    z = t * x @ y.T + b                       # t = exp(log-scale), both learned; start t = 10, b = -10
    loss = mean over rows of the sum of softplus(-z) on the diagonal and softplus(z) elsewhere

Run it: `ssl-kernels train siglip` or `python -m ssl_kernels.trainers.siglip`. With no arguments it learns OpenMoji in
a few minutes on a laptop. Of the defaults, epochs and image size were chosen on a validation split of the training
pairs (`--evaluate-on validation`); the optimizer's settings, the augmentation and the towers' sizes come from earlier
experiments on other random splits of the same emoji, so the figures may be a little flattered by them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels import SigLipLoss
from ssl_kernels.distributed import world
from ssl_kernels.trainers import command, train_pairs
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.two_towers import TwoTowerConfig, TwoTowerModel


@dataclass
class SigLipConfig(TwoTowerConfig):
    """Train an image tower and a text tower with the sigmoid loss. The defaults learn OpenMoji in a few minutes.

    ssl-kernels train siglip --data pairs.csv --output-dir runs/pairs
    """


class SigLip(TwoTowerModel):
    """Two towers, a learned scale and a learned bias."""

    def __init__(
        self, image: ImageTower, text: nn.Module, loss: SigLipLoss, backend: str = "auto", check: bool = False
    ) -> None:
        super().__init__(image, text, loss, backend, check)
        self.log_scale = nn.Parameter(torch.tensor([math.log(10.0)]))
        self.bias = nn.Parameter(torch.tensor([-10.0]))

    def learned(self) -> tuple[Tensor, ...]:
        return self.log_scale, self.bias

    def contrast(self, x: Tensor, y: Tensor, ids: Tensor | None, *learned: Tensor) -> Tensor:
        log_scale, bias = learned
        scale = log_scale.exp()
        if ids is None:
            loss: Tensor = self.loss(x, y, scale, bias)
        else:  # pairs that share a caption or an image are each other's positives: no false negatives
            loss = K.sigmoid_contrastive_loss(x, y, scale, bias, x_ids=ids, y_ids=ids, **self.loss.how())
        return loss

    def scalars(self, log_scale: Tensor, *others: Tensor) -> dict[str, Tensor]:
        (bias,) = others
        return {**super().scalars(log_scale), "logit_bias": bias.detach()}


def train(config: SigLipConfig, console: Console) -> None:
    def model(image: ImageTower, text: nn.Module) -> SigLip:
        return SigLip(image, text, SigLipLoss(group=world()), config.loss_backend, config.check_loss)

    train_pairs.train("SigLIP", model, config, console)


def main(argv: Sequence[str] | None = None, prog: str = "python -m ssl_kernels.trainers.siglip") -> int:
    return command.run(SigLipConfig, train, argv, prog)


if __name__ == "__main__":
    raise SystemExit(main())
