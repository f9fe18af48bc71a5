"""What the trainers that learn from images alone share: the encoder, the run and its report."""

from __future__ import annotations

import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from ssl_kernels.trainers import loop, probes, report
from ssl_kernels.trainers.data import openmoji
from ssl_kernels.trainers.data.pairs import Batch
from ssl_kernels.trainers.data.views import ImageConfig, ImageData, load
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.models import TINY, ImageTower


@dataclass
class SelfSupervisedConfig(ImageConfig, loop.LoopConfig):
    """What the command lines of trainers on images alone have in common."""

    epochs: int = 14
    """Passes over the training images."""
    batch_size: int = 128
    """Images per forward pass, each seen in two views."""
    lr: float = 2e-3
    """Peak learning rate."""
    image_model: str = TINY
    """The built-in `tiny-resnet`, or any timm model by name, such as resnet50 or vit_small_patch16_224."""
    hidden: int = 256
    """Width of the heads' hidden layers. Heads are dropped after training; what is evaluated is the net below them."""
    dim: int = 128
    """Size of the embedding in which views are contrasted."""
    temperature: float = 0.2
    """Divides the cosines of embeddings."""

    def check(self) -> None:
        super().check()
        self.check_data()
        if self.batch_size < 2:
            raise UserError(f"--batch-size: expected at least 2 images to tell apart, got {self.batch_size}")
        for name in ("hidden", "dim"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"--temperature: expected a finite number > 0, got {self.temperature}")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("WORLD_SIZE: this trainer runs in one process; features are not exchanged between several")


class Encoder(ImageTower):
    """uint8 images [B, 3, H, W] to embeddings [B, D]: a backbone, whose features are the aim, and an MLP head."""

    def __init__(self, config: SelfSupervisedConfig, norm: bool = False) -> None:
        super().__init__(config.image_model, config.image_size, config.dim, inverted=config.data == "openmoji")
        if config.data == "mnist":  # the ground of a digit is zero already
            self.mean.zero_()
            self.std.fill_(1)
        assert isinstance(self.head, nn.Linear)
        self.head = mlp(self.head.in_features, config.hidden, config.dim, norm=norm)  # type: ignore[assignment]


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them; with `norm` each is followed by BatchNorm."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers.append(nn.Linear(before, after, bias=not norm))
        layers += [nn.BatchNorm1d(after)] if norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])


class Method(nn.Module):
    """An encoder and how two views of a batch are contrasted: a batch to (loss, metrics)."""

    encoder: Encoder

    def before_training(self, batches: Iterator[Batch]) -> None:
        """What a new run starts with; the batches are an epoch's."""

    def after_step(self, number: int) -> None:
        """What the method does after an optimizer step."""


def train(
    name: str, make_method: Callable[[ImageData, int], Method], config: SelfSupervisedConfig, console: Console
) -> None:
    """Train what `make_method` builds for the data and a number of steps, and set its features beside the baselines."""
    begun = time.perf_counter()
    fabric = loop.make_fabric(config)
    data = load(config, batch_size=config.batch_size, seed=config.seed, workers=config.workers)
    method = make_method(data, loop.steps_per_epoch(data.batches, config) * config.epochs)
    initial = copy.deepcopy(method.encoder)
    optimizer = torch.optim.AdamW(loop.parameter_groups(method, config.lr, config.weight_decay), betas=config.betas)
    wrapped, wrapped_optimizer = fabric.setup(method, optimizer)
    if config.resume is None:
        with fabric.autocast():  # an epoch that training does not reach has other views
            method.before_training(map(fabric.to_device, data.batches.batches(config.epochs)))

    result = loop.fit(
        fabric, wrapped, wrapped_optimizer, data.batches, config, after_step=method.after_step, console=console
    )

    folder = config.output_dir
    report.plot_curves(folder / "curves.png", result.records)
    figures = evaluate(fabric, method.encoder, initial, data, config)
    total_s = time.perf_counter() - begun
    report.write_summary(folder / "summary.json", result, figures, total_s)
    title = f"{name} on {config.data}, seed {config.seed}, {config.evaluate_on} images"
    probes.print_table(console, title, result, figures, total_s)
    if not figures:
        console.print("not evaluated: no image is held out; --held-out is a share of each class, rounded")
    if config.data == "openmoji":
        console.print(openmoji.CREDIT)
    files = (loop.CHECKPOINT, loop.METRICS, "config.json", "tensorboard", "curves.png", "summary.json")
    console.print("written:", *(str(folder / file) for file in files), highlight=False, soft_wrap=True)


def evaluate(
    fabric: Fabric, trained: Encoder, initial: Encoder, data: ImageData, config: SelfSupervisedConfig
) -> list[probes.Figure]:
    def features(encoder: Encoder) -> probes.Encode:
        encoder.to(trained.mean).eval()

        @torch.no_grad()
        def encode(images: Tensor) -> Tensor:
            with fabric.autocast():
                return encoder.features(fabric.to_device(images)).float().cpu()

        return encode

    return probes.report_card(
        features(trained), features(initial), data.train, data.held_out, data.view, config.image_size, config.split_seed
    )
