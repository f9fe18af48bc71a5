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
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels import SigLipLoss, use_backend
from ssl_kernels.trainers import command, evaluate, loop, report
from ssl_kernels.trainers.data import Batch, DataConfig, load, openmoji
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.models import ImageTower, TowerConfig, text_tower, tokenizer


@dataclass
class SigLipConfig(TowerConfig, DataConfig, loop.LoopConfig):
    """Train an image tower and a text tower with the sigmoid loss. The defaults learn OpenMoji in a few minutes."""

    loss_backend: Literal["auto", "reference", "eager", "cpu", "triton"] = "auto"
    """Implementation of the loss; `reference` is plain PyTorch with the whole matrix of logits."""
    check_loss: bool = True
    """Compare every batch's loss, over its first 1,024 pairs, with the reference (and the reference, where it trains,
    with `auto`) and log both."""

    def check(self) -> None:
        super().check()
        self.check_data()
        self.check_towers()


class SigLip(nn.Module):
    """Two towers, a learned scale and a learned bias."""

    def __init__(
        self, image: ImageTower, text: nn.Module, loss: nn.Module, backend: str = "auto", check: bool = False
    ) -> None:
        super().__init__()
        self.image, self.text, self.loss, self.backend, self.check = image, text, loss, backend, check
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image(images), dim=-1)

    def encode_text(self, text: dict[str, Tensor]) -> Tensor:
        return F.normalize(self.text(**text), dim=-1)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, y, ids = self.encode_image(batch["images"]), self.encode_text(batch["text"]), batch["ids"]
        loss = self.contrast(x, y, ids, self.backend)
        metrics = {"logit_scale": self.log_scale.detach().exp(), "logit_bias": self.bias.detach()}
        if self.check:
            with torch.no_grad():
                x, y, ids = x[:1024], y[:1024], None if ids is None else ids[:1024]
                checked = "auto" if self.backend == "reference" else self.backend
                metrics["loss_check"] = self.contrast(x, y, ids, checked)
                metrics["loss_reference"] = self.contrast(x, y, ids, "reference")
        return loss, metrics

    def contrast(self, x: Tensor, y: Tensor, ids: Tensor | None, backend: str) -> Tensor:
        with _backend(backend):
            if ids is None:
                loss: Tensor = self.loss(x, y, self.log_scale.exp(), self.bias)
            else:  # pairs that share a caption or an image are each other's positives: no false negatives
                loss = K.sigmoid_contrastive_loss(x, y, self.log_scale.exp(), self.bias, x_ids=ids, y_ids=ids)
        return loss


def _backend(name: str) -> AbstractContextManager[None]:
    return nullcontext() if name == "auto" else use_backend(name)  # `auto` leaves SSL_KERNELS_BACKEND in force


def parameter_groups(model: SigLip, config: SigLipConfig) -> list[dict[str, object]]:
    """A pretrained trunk may learn slower than the rest, then without weight decay: it would forget what it knows."""
    trunk = model.image.trunk
    slow = config.image_lr_factor < 1
    others = nn.ModuleList([model.image.head, model.text])
    return [
        *loop.parameter_groups(trunk, config.lr * config.image_lr_factor, 0.0 if slow else config.weight_decay),
        *loop.parameter_groups(others, config.lr, config.weight_decay),
        {"params": [model.log_scale, model.bias], "lr": config.lr, "peak_lr": config.lr, "weight_decay": 0.0},
    ]


def make_loss(config: SigLipConfig, fabric: Fabric) -> SigLipLoss:
    """The loss, tried once: a backend that this device or precision lacks is refused before anything is written."""
    try:
        # From torchrun rather than from Fabric, which runs one device here: W processes would be W runs in one folder.
        loss = SigLipLoss(rank=int(os.environ.get("RANK", 0)), world_size=int(os.environ.get("WORLD_SIZE", 1)))
    except NotImplementedError as error:
        raise UserError(str(error)) from None
    features = torch.ones(
        1, config.dim, device=fabric.device, dtype=torch.float64 if config.precision == "64-true" else None
    )
    try:
        with _backend(config.loss_backend):
            loss(features, features, 1.0, 0.0)
    except ValueError as error:
        raise UserError(f"--loss-backend: {error}") from None
    return loss


def train(config: SigLipConfig, console: Console) -> None:
    begun = time.perf_counter()
    fabric = loop.make_fabric(config)
    loss = make_loss(config, fabric)
    tokenize = tokenizer(config)
    data = load(config, tokenize, batch_size=config.batch_size, seed=config.seed, workers=config.workers)
    image = ImageTower(
        config.image_model, config.image_size, config.dim, pretrained=config.pretrained,
        inverted=config.data == "openmoji" and not config.pretrained, locked=config.image_lr_factor == 0,
    )  # fmt: skip
    model = SigLip(image, text_tower(config), loss, config.loss_backend, config.check_loss)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), betas=config.betas)
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)

    result = loop.fit(fabric, wrapped, wrapped_optimizer, data.batches, config, console=console)

    folder = config.output_dir
    figures: list[evaluate.Figure] = []
    credit = openmoji.CREDIT if config.data == "openmoji" else ""
    files = [loop.CHECKPOINT, loop.METRICS, "config.json", "tensorboard", "curves.png", "summary.json"]
    report.plot_curves(folder / "curves.png", result.records)
    if data.held_out is not None:
        encoder = evaluate.Encoder(fabric, model, tokenize, config.image_size)
        supervised = config.label_captions > 0
        figures, similarity = evaluate.report_card(encoder, data.train, data.held_out, supervised)
        report.plot_retrieval(folder / "retrieval.png", data.held_out, similarity, config.image_size, credit)
        files.append("retrieval.png")
    total_s = time.perf_counter() - begun
    report.write_summary(folder / "summary.json", result, figures, total_s)
    report.closing_table(console, f"SigLIP on {config.data}, {config.evaluate_on} pairs", result, figures, total_s)
    if credit:
        console.print(credit)
    console.print("written:", *(str(folder / name) for name in files), highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None, prog: str = "python -m ssl_kernels.trainers.siglip") -> int:
    return command.run(SigLipConfig, train, argv, prog)


if __name__ == "__main__":
    raise SystemExit(main())
