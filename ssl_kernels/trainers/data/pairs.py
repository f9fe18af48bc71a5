"""Image-text pairs in memory or on disk, and the batches made of them.

A batch is a pure function of (seed, epoch, number of the batch): order, augmentation and caption choice are drawn
from a generator seeded with these three alone. That is what lets a run continue bit-exactly in mid-epoch, with any
number of loader workers.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from ssl_kernels.trainers.errors import UserError

Batch = dict[str, Any]  # images [B, 3, H, W] uint8, text (the tokenizer's tensors), ids [B] or None
Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]

# Prompts of zero-shot classification.
TEMPLATES = ("{}", "a picture of {}", "an emoji of {}")

# Enough to keep a small model from learning drawings by heart. Colour is left alone: a skin tone is part of the name.
_ROTATION_DEGREES, _SCALE, _SHIFT = 8.0, 0.12, 0.12


@dataclass
class ImageTextPairs:
    """Images with one caption each; `categories` ("" where unknown) and the held-out `subsets` are optional."""

    images: Tensor | list[Path]  # uint8 [N, 3, H, W], or files
    captions: list[str]
    categories: list[str] | None = None
    subsets: list[str] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, indices: Sequence[int]) -> ImageTextPairs:
        def pick(values: list[Any] | None) -> Any:
            return None if values is None else [values[i] for i in indices]

        images = self.images[list(indices)] if isinstance(self.images, Tensor) else pick(self.images)
        return ImageTextPairs(images, pick(self.captions), pick(self.categories), pick(self.subsets))

    def load(self, indices: Sequence[int], size: int) -> Tensor:
        """The images as evaluation sees them: uint8 [n, 3, size, size], resized and cropped around the centre."""
        if isinstance(self.images, Tensor):
            return resize(self.images[list(indices)], size)
        return torch.stack([centre_crop(open_image(self.images[i]), size) for i in indices])


def open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--data: cannot read the image {path}: {error}") from None


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """uint8 [3, size, size]: the shorter side resized, the middle kept."""
    cropped: Tensor = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])(image)
    return cropped


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, 3, H, W] at another size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), size=(size, size), mode="area").round().to(torch.uint8)


def jitter(images: Tensor, size: int, rng: np.random.Generator) -> Tensor:
    """Rotate, scale and shift every image of a uint8 batch by its own small amount, on a white ground."""
    n = len(images)
    angle = np.deg2rad(rng.uniform(-_ROTATION_DEGREES, _ROTATION_DEGREES, n))
    zoom = rng.uniform(1 - _SCALE, 1 + _SCALE, n)
    shift = rng.uniform(-_SHIFT, _SHIFT, (n, 2))
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    theta = np.stack([np.stack([cos, -sin, shift[:, 0]], 1), np.stack([sin, cos, shift[:, 1]], 1)], 1)  # [n, 2, 3]
    grid = F.affine_grid(torch.from_numpy(theta).float(), [n, 3, size, size], align_corners=False)
    inverted = 255.0 - images.float()  # zero padding is white then
    return (255.0 - F.grid_sample(inverted, grid, align_corners=False)).round().to(torch.uint8)


class Batches(Dataset[Batch]):
    """Batches of pairs; an item is the batch `number` of the epoch `epoch`.

    With probability `label_captions` the words of a pair's category are added to its caption: that is label
    supervision, and reports must say so. In the first such pair of each category in a batch they replace it, in one of
    the `TEMPLATES`; a second time in the same batch, they would name images that count as each other's negatives.
    """

    def __init__(
        self, pairs: ImageTextPairs, tokenize: Tokenize, *, size: int, batch_size: int, seed: int,
        augment: bool = True, label_captions: float = 0.0, workers: int = 0,
    ) -> None:  # fmt: skip
        self.pairs, self.tokenize, self.size, self.batch_size, self.seed = pairs, tokenize, size, batch_size, seed
        self.augment, self.label_captions, self.workers = augment, label_captions, workers
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch that is being read

    def __len__(self) -> int:
        return len(self.pairs) // self.batch_size

    @property
    def fingerprint(self) -> str:
        """What a resumed run must find again: captions and image files, in order."""
        names = [str(path) for path in self.pairs.images] if isinstance(self.pairs.images, list) else []
        return hashlib.sha256("\0".join([*self.pairs.captions, *names]).encode()).hexdigest()

    def indices(self, epoch: int, number: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.pairs)))
        return self._order[1][number * self.batch_size : (number + 1) * self.batch_size]

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        epoch, number = item
        rng = np.random.default_rng((self.seed, epoch, number + 1))
        indices = [int(i) for i in self.indices(epoch, number)]
        captions = self._captions(indices, rng)
        sources: Sequence[Hashable] = indices
        if isinstance(self.pairs.images, list):
            sources = [self.pairs.images[i] for i in indices]
        return make_batch(self._images(indices, rng), captions, sources, self.tokenize)

    def _captions(self, indices: Sequence[int], rng: np.random.Generator) -> list[str]:
        captions = [self.pairs.captions[i] for i in indices]
        named: set[str] = set()
        for place in np.flatnonzero(rng.random(len(indices)) < self.label_captions).tolist():
            category = self.pairs.categories[indices[place]] if self.pairs.categories else ""
            if category:
                prompt = TEMPLATES[rng.integers(len(TEMPLATES))].format(category)
                captions[place] = f"{captions[place]} {category}" if category in named else prompt
                named.add(category)
        return captions

    def _images(self, indices: list[int], rng: np.random.Generator) -> Tensor:
        if not self.augment:
            return self.pairs.load(indices, self.size)
        if isinstance(self.pairs.images, Tensor):
            return jitter(self.pairs.images[indices], self.size, rng)
        paths = self.pairs.images
        return torch.stack([random_crop(open_image(paths[i]), self.size, rng) for i in indices])

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; `workers` processes prepare them ahead."""
        items = [(epoch, number) for number in range(start, len(self))]
        return iter(loader(self, self.workers, sampler=items))


def loader(dataset: Dataset[Batch], workers: int, **options: Any) -> DataLoader[Batch]:
    """A loader of whole batches. Its own generator keeps it from drawing from torch's global one at every start."""
    return DataLoader(
        dataset, batch_size=None, num_workers=workers, worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C, a scheduler and `timeout` signal a whole process group: a worker has one of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Tensor:
    """A random resized crop; torchvision draws from torch's global generator, which is left as it was."""
    crop = v2.Compose([v2.RandomResizedCrop(size, scale=(0.6, 1.0)), v2.PILToTensor()])
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**62)))
        cropped: Tensor = crop(image)
    return cropped


def link(*keys: Sequence[Hashable]) -> list[int]:
    """Number items so that two that share any key, directly or through others, get one number: [n] from k lists [n]."""
    parent = list(range(len(keys[0])))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for column in keys:
        first: dict[Hashable, int] = {}
        for i, key in enumerate(column):
            parent[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(parent))]


class Fingerprints:
    """What marks held-out pairs, so that training data can be searched for them: captions and image contents."""

    def __init__(self) -> None:
        self.captions: set[str] = set()
        self.digests: set[bytes] = set()
        self.sizes: set[int] = set()

    def add(self, caption: str, image: bytes) -> None:
        self.captions.add(caption)
        self.digests.add(hashlib.sha256(image).digest())
        self.sizes.add(len(image))

    def match(self, caption: str, image: bytes | Path) -> bool:
        """Whether this caption or this image is held out. A file is only read where its size makes it possible."""
        if caption in self.captions:
            return True
        size = image.stat().st_size if isinstance(image, Path) else len(image)
        if size not in self.sizes:
            return False
        content = image.read_bytes() if isinstance(image, Path) else image
        return hashlib.sha256(content).digest() in self.digests


def make_batch(images: Tensor, captions: Sequence[str], sources: Sequence[Hashable], tokenize: Tokenize) -> Batch:
    """Collate. `ids` is None unless pairs of the batch share a caption or an image: those are not negatives."""
    ids = link(captions, sources)
    repeated = len(set(ids)) < len(ids)
    return {"images": images, "text": tokenize(captions), "ids": torch.tensor(ids) if repeated else None}
