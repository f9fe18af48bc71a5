"""What the methods that learn from images alone share: their settings, the encoder, and what training asks of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ssl_kernels.ema import ModelEma
from ssl_kernels.schedules import cosine_momentum
from ssl_kernels.trainers import batch_norm
from ssl_kernels.trainers.data.batches import Batch
from ssl_kernels.trainers.data.image_data import ImageConfig
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.loop_config import LoopConfig
from ssl_kernels.trainers.optim import parameter_groups
from ssl_kernels.trainers.ranges import POSITIVE, SHARE_BELOW_ONE, at_least, require
from ssl_kernels.trainers.trunks import BUILT_IN, TINY, keep_all_paths


@dataclass
class SelfSupervisedConfig(ImageConfig, LoopConfig):
    """What the command lines of trainers on images alone have in common."""

    epochs: int = 14
    """Passes over the training images."""
    batch_size: int = 128
    """Images per forward pass. Each is seen in two views, and in DINO in its local crops too."""
    lr: float = 2e-3
    """Peak learning rate."""
    image_model: str = TINY
    """The built-in `tiny-resnet` or `tiny-vit`, or any timm model by name: resnet50, vit_small_patch16_224."""
    drop_path: float = 0.0
    """Largest probability with which a residual block is skipped for an image in training, which keeps deep networks
    from overfitting; it rises along the blocks. A teacher skips none. Each of several processes draws on its own."""
    hidden: int = 256
    """Width of the heads' hidden layers. Heads are dropped after training; the network below them is evaluated."""
    dim: int = 128
    """Size of the embedding in which views are compared."""
    temperature: float = 0.2
    """Divides the cosine similarities of embeddings."""

    @property
    def leaves_parameters_unused(self) -> bool:
        return self.image_model not in BUILT_IN

    def check(self) -> None:
        super().check()
        self.check_data()
        require(self, at_least(2, "images to tell apart"), "batch_size")
        require(self, at_least(1), "hidden", "dim")
        require(self, POSITIVE, "temperature")
        require(self, SHARE_BELOW_ONE, "drop_path")


class Encoder(ImageTower):
    """uint8 images [B, 3, H, W] to embeddings [B, D]: a backbone, whose features are the aim, and a head, by default an
    MLP, above features of the width that `make_head` is given."""

    def __init__(
        self, config: SelfSupervisedConfig, norm: bool = False, *, make_head: Callable[[int], nn.Module] | None = None,
        any_size: bool = False,
    ) -> None:  # fmt: skip
        inverted = config.data == "openmoji"
        super().__init__(
            config.image_model, config.image_size, config.dim, inverted=inverted, any_size=any_size,
            drop_path=config.drop_path,
        )  # fmt: skip
        if config.data == "mnist":  # the ground of a digit is zero already
            self.mean.zero_()
            self.std.fill_(1)
        head = make_head(self.width) if make_head else mlp(self.width, config.hidden, config.dim, norm=norm)
        self.head = head  # type: ignore[assignment]


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them; with `norm` each is followed by BatchNorm."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers.append(nn.Linear(before, after, bias=not norm))
        layers += [nn.BatchNorm1d(after)] if norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])


class Method(nn.Module):
    """An encoder and how views of a batch are compared: a batch to (loss, metrics)."""

    encoder: Encoder

    @property
    def evaluated(self) -> Encoder:
        """Whose features are the run's result."""
        return self.encoder

    def synchronise(self, device: torch.device) -> None:
        """Normalise over several processes as over one."""
        batch_norm.synchronise(self, device)

    def parameter_groups(self, config: SelfSupervisedConfig) -> list[dict[str, Any]]:
        """What the optimizer is given."""
        return parameter_groups(self, config.lr, config.weight_decay)

    def before_training(self, batches: Iterator[Batch]) -> None:
        """What a new run starts with; the batches are an epoch's."""

    def before_step(self, number: int, groups: list[dict[str, Any]]) -> None:
        """What a schedule sets for an optimizer step, counted from 1; the groups are the optimizer's."""

    def after_backward(self, number: int) -> None:
        """What the method does to the gradients of a step."""

    def after_step(self, number: int) -> None:
        """What the method does after an optimizer step."""


class MomentumMethod(Method):
    """An encoder with a momentum teacher, whose momentum rises from `momentum` to 1 at the last of `steps` steps."""

    def __init__(self, encoder: Encoder, momentum: float, steps: int) -> None:
        super().__init__()
        self.encoder, self.teacher = encoder, ModelEma(encoder)
        keep_all_paths(self.teacher)
        self.momentum, self.steps = momentum, steps

    def momentum_at(self, number: int) -> float:
        """The momentum of the update after a step, counted from 1."""
        return cosine_momentum(number, self.steps, self.momentum)

    def after_step(self, number: int) -> None:
        self.teacher.update(self.encoder, self.momentum_at(number))
