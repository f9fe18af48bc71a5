"""A classifier on top of a run's image tower, and the batches that it learns from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kernels.trainers import inputs as described
from ssl_kernels.trainers.data import fingerprint
from ssl_kernels.trainers.data.batches import Batch, ShuffledBatches
from ssl_kernels.trainers.data.faults import Fault, Faults
from ssl_kernels.trainers.data.images import image_seeds, open_image, random_crop
from ssl_kernels.trainers.data.pixels import WHITE, Colour
from ssl_kernels.trainers.processes import ALONE, Share
from ssl_kernels.trainers.use.items import Item
from ssl_kernels.trainers.use.labelled import Part
from ssl_kernels.trainers.use.pixels import to_pixels
from ssl_kernels.trainers.use.trained import Trained


class Classifier(nn.Module):
    """The image tower of a run with a linear classifier in the place of its head: a batch to (loss, metrics)."""

    def __init__(self, model: Trained, classes: int, *, freeze: bool, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.tower = described.image_tower({**model.inputs["image"], "head": None, "dim": None})
        self.tower.trunk.load_state_dict(model.image.trunk.state_dict())
        self.tower.head = nn.Linear(self.tower.width, classes)
        nn.init.zeros_(self.tower.head.weight)  # all classes are alike at first
        nn.init.zeros_(self.tower.head.bias)
        self.tower.locked, self.label_smoothing = freeze, label_smoothing
        self.tower.trunk.requires_grad_(not freeze)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        logits = self.tower(batch["images"])
        loss = F.cross_entropy(logits, batch["labels"], label_smoothing=self.label_smoothing)
        return loss, {"accuracy": (logits.argmax(1) == batch["labels"]).float().mean()}


class LabelledBatches(ShuffledBatches):
    """Batches of images uint8 [B, 3, S, S] with their labels [B]; files are cropped at random with `augment`."""

    def __init__(
        self, part: Part, *, size: int, batch_size: int, seed: int, augment: bool = True, mirror: bool = False,
        workers: int = 0, share: Share = ALONE, faults: Faults | None = None, background: Colour = WHITE,
    ) -> None:  # fmt: skip
        count = len(part.items)
        super().__init__(count, batch_size=batch_size, seed=seed, workers=workers, share=share, faults=faults)
        self.items, self.labels, self.size, self.background = part.items, part.labels, size, background
        self.augment, self.mirror = augment, mirror

    @property
    def fingerprint(self) -> str:
        """What a resumed run must find again: the images' names, in order, and their labels."""
        return fingerprint_of(self.items, self.labels)

    @property
    def in_memory(self) -> bool:
        return not any(isinstance(item.source, Path) for item in self.items)

    def make(self, indices: list[int], own: slice, rng: np.random.Generator, found: list[Fault]) -> Batch:
        crops, spares = image_seeds(rng, len(indices)), image_seeds(rng, len(indices))
        images = []
        for place in range(len(indices))[own]:
            show = functools.partial(self._image, seed=crops[place])
            images.append(self.readable(indices, place, spares[place], show, found))
        return {"images": torch.stack(images), "labels": self.labels[indices[own]]}

    def _image(self, index: int, seed: int) -> Tensor:
        name, source = self.items[index]
        assert not isinstance(source, str)
        if self.augment and isinstance(source, Path):
            image = random_crop(open_image(source, self.background), self.size, seed)
        else:
            image = to_pixels(source, self.size, self.background, name)
        return image.flip(-1) if self.mirror and seed % 2 else image


def fingerprint_of(items: Sequence[Item], labels: Tensor) -> str:
    """What tells whether labelled images are what they were, wherever they lie now."""
    return fingerprint.digest([*fingerprint.names_within([item.name for item in items]), *map(str, labels.tolist())])
