"""An image tower and a text tower that meet in a contrastive loss: the model that CLIP and SigLIP share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ssl_kernels import use_backend
from ssl_kernels.distributed import gather_rows
from ssl_kernels.ema import ModelEma
from ssl_kernels.losses.in_group import LossInGroup
from ssl_kernels.ops.unit_rows import unit_rows
from ssl_kernels.trainers import chunks
from ssl_kernels.trainers.data import Batch, DataConfig
from ssl_kernels.trainers.data.identity import ids_of_keys
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.loop_config import LoopConfig
from ssl_kernels.trainers.models import TowerConfig
from ssl_kernels.trainers.processes import own_share
from ssl_kernels.trainers.ranges import SHARE_BELOW_ONE, require
from ssl_kernels.trainers.spread import spread
from ssl_kernels.trainers.text_towers import some_captions
from ssl_kernels.trainers.trunks import BUILT_IN

CHECKED = 1024  # pairs of a batch
WATCHED = 256  # of them, whose spread is logged


@dataclass
class TwoTowerConfig(TowerConfig, DataConfig, chunks.ChunkConfig, LoopConfig):
    """What the command lines of image-text trainers have in common."""

    loss_backend: Literal["auto", "reference", "eager", "cpu", "triton"] = "auto"
    """Which code computes the loss; `reference` is plain PyTorch with the whole matrix of logits."""
    check_loss: bool = True
    """Compare every batch's loss, over its first 1,024 pairs, with the reference (and the reference, where it trains,
    with `auto`) and log both."""

    ema: float = 0.0
    """Momentum of a moving average of the towers' weights, which is then what is evaluated, such as 0.999; 0 keeps
    none. In the first steps the average follows faster."""

    @property
    def leaves_parameters_unused(self) -> bool:
        return self.image_model not in BUILT_IN

    def check(self) -> None:
        super().check()
        self.check_data()
        self.check_towers()
        self.check_chunks()
        require(self, SHARE_BELOW_ONE, "ema")


class Towers(nn.Module):
    """An image tower and a text tower, and their normalised embeddings."""

    def __init__(self, image: ImageTower, text: nn.Module) -> None:
        super().__init__()
        self.image, self.text = image, text

    def encode_image(self, images: Tensor) -> Tensor:
        return unit_rows(self.image(images))

    def encode_text(self, text: dict[str, Tensor]) -> Tensor:
        return unit_rows(self.text(**text))


class TwoTowerModel(Towers, ABC):
    """Two towers and a loss; a method adds its learned scalars and says how a batch is contrasted."""

    log_scale: nn.Parameter  # [1], for FSDP2 takes no parameter without dimension

    def __init__(
        self, image: ImageTower, text: nn.Module, loss: LossInGroup, backend: str = "auto", check: bool = False
    ) -> None:
        super().__init__(image, text)
        self.loss, self.backend, self.check = loss, backend, check
        self.average: ModelEma | None = None  # of the towers

    @abstractmethod
    def contrast(self, x: Tensor, y: Tensor, ids: Tensor | None, *learned: Tensor) -> Tensor:
        """The loss of normalised embeddings [B, D]; pairs that share an id are each other's positives."""

    def learned(self) -> tuple[Tensor, ...]:
        """The scalars that the loss takes."""
        return (self.log_scale,)

    def scalars(self, log_scale: Tensor, *_: Tensor) -> dict[str, Tensor]:
        """The same, as they are logged."""
        return {"logit_scale": log_scale.detach().exp()}

    def keep_average(self, momentum: float) -> None:
        """From now on keep a moving average of the towers, of this momentum."""
        self.average = ModelEma(Towers(self.image, self.text), momentum)

    @property
    def evaluated(self) -> Towers:
        """The towers that are the run's result."""
        return self if self.average is None else cast(Towers, self.average.module)

    def after_step(self, number: int) -> None:
        """What the method does after an optimizer step, counted from 1. At first the average follows faster, or short
        runs would be averaged with their random start."""
        if self.average is not None:
            momentum = min(self.average.momentum, number / (number + 9))
            self.average.update(Towers(self.image, self.text), momentum)

    def forward(self, batch: Batch, embed_alone: bool = False) -> tuple[Any, ...]:
        """The loss and what is logged; or the embeddings and the scalars, of which the loss is made elsewhere."""
        x, y = self.encode_image(batch["images"]), self.encode_text(batch["text"])
        return (x, y, *self.learned()) if embed_alone else self.measure(batch, x, y, *self.learned())

    def part(self, batch: Batch, rows: slice) -> Batch:
        return {"images": batch["images"][rows], "text": some_captions(batch["text"], rows)}

    def measure(self, batch: Batch, *embedded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, y, *learned = embedded
        ids = batch["ids"]
        if ids is not None and ids.ndim == 2:
            ids = ids_of_keys(ids)
        loss = self.contrast_by(self.backend, x, y, ids, *learned)
        metrics = {**self.scalars(*learned), **spread_of(x, y)}
        if self.check:
            with torch.no_grad():
                own = max(0, CHECKED - own_share().rank * len(x))  # of the first pairs of the batch
                x, y, ids = x[:own], y[:own], None if ids is None else ids[:own]
                checked = "auto" if self.backend == "reference" else self.backend
                metrics["loss_check"] = self.contrast_by(checked, x, y, ids, *learned)
                metrics["loss_reference"] = self.contrast_by("reference", x, y, ids, *learned)
        return loss, metrics

    def contrast_by(self, backend: str, x: Tensor, y: Tensor, ids: Tensor | None, *learned: Tensor) -> Tensor:
        with _backend(backend):
            return self.contrast(x, y, ids, *learned)


@torch.no_grad()
def spread_of(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """How far the images and the texts of the first pairs of a batch are spread, and in how many directions."""
    own = max(0, WATCHED - own_share().rank * len(x))
    both = gather_rows(torch.stack([x[:own], y[:own]], 1))
    spreads = {side: spread(both[:, i]) for i, side in enumerate(("image", "text"))}
    return {name.replace("embedding", side): value for side, named in spreads.items() for name, value in named.items()}


def _backend(name: str) -> AbstractContextManager[None]:
    return nullcontext() if name == "auto" else use_backend(name)  # `auto` leaves SSL_KERNELS_BACKEND in force
