"""Image-text pairs in memory or on disk, and the batches made of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_kernels.trainers.data.batches import Batch, ShuffledBatches
from ssl_kernels.trainers.data.faults import Fault, Faults
from ssl_kernels.trainers.data.fingerprint import digest, names_within
from ssl_kernels.trainers.data.identity import keys_of, shared_ids
from ssl_kernels.trainers.data.images import (
    centre_crop,
    image_seeds,
    load_images,
    load_readable,
    open_image,
    random_crop,
)
from ssl_kernels.trainers.data.pixels import WHITE, Colour
from ssl_kernels.trainers.processes import ALONE, Share

Tokenize = Callable[[Sequence[str]], dict[str, Tensor]]

# Prompts of zero-shot classification.
TEMPLATES = ("{}", "a picture of {}", "an emoji of {}")

# Enough to keep a small model from learning drawings by heart. Colour is left alone: a skin tone is part of the name.
_ROTATION_DEGREES, _SCALE, _SHIFT = 8.0, 0.12, 0.12


@dataclass
class ImageTextPairs:
    """Images with a caption each; `categories` ("" where unknown) and the held-out `subsets` are optional.

    Where images have several captions, `captions` has the first of each, by which it is evaluated, and `others` the
    rest. Images of one number in `contents` are equal.
    """

    images: Tensor | list[Path]  # uint8 [N, 3, H, W], or files
    captions: list[str]
    categories: list[str] | None = None
    subsets: list[str] | None = None
    background: Colour = WHITE  # of transparent files
    others: list[tuple[str, ...]] | None = None
    contents: list[int] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, indices: Sequence[int]) -> ImageTextPairs:
        def pick(values: list[Any] | None) -> Any:
            return None if values is None else [values[i] for i in indices]

        images = self.images[list(indices)] if isinstance(self.images, Tensor) else pick(self.images)
        return replace(
            self, images=images, captions=pick(self.captions), categories=pick(self.categories),
            subsets=pick(self.subsets), others=pick(self.others), contents=pick(self.contents),
        )  # fmt: skip

    def load(self, indices: Sequence[int], size: int) -> Tensor:
        """The images as evaluation sees them: uint8 [n, 3, size, size], resized and cropped around the centre."""
        return load_images(self.images, indices, size, self.background)

    def load_readable(self, indices: Sequence[int], size: int, faults: Faults) -> tuple[Tensor, list[int]]:
        """The same of those that can be read, and which these are; `faults` is told of the others."""
        return load_readable(self.images, indices, size, self.background, faults)


def jitter(
    images: Tensor, size: int, rng: np.random.Generator, *, n: int | None = None, own: slice = slice(None)
) -> Tensor:
    """Rotate, scale and shift every image of a uint8 batch by its own small amount, on a white ground.

    The images are the part `own` of a batch of `n`.
    """
    n = len(images) if n is None else n
    angle = np.deg2rad(rng.uniform(-_ROTATION_DEGREES, _ROTATION_DEGREES, n))
    zoom = rng.uniform(1 - _SCALE, 1 + _SCALE, n)
    shift = rng.uniform(-_SHIFT, _SHIFT, (n, 2))
    cos, sin = np.cos(angle) * zoom, np.sin(angle) * zoom
    theta = np.stack([np.stack([cos, -sin, shift[:, 0]], 1), np.stack([sin, cos, shift[:, 1]], 1)], 1)  # [n, 2, 3]
    grid = F.affine_grid(torch.from_numpy(theta[own]).float(), [len(images), 3, size, size], align_corners=False)
    inverted = 255.0 - images.float()  # zero padding is white then
    return (255.0 - F.grid_sample(inverted, grid, align_corners=False)).round().to(torch.uint8)


class Batches(ShuffledBatches):
    """Batches of pairs: images [B, 3, H, W] uint8, text (the tokenizer's tensors), ids [B] or None.

    Of an image's several captions each epoch draws one.

    With probability `label_captions` the words of a pair's category are added to its caption: that is label
    supervision, and reports must say so. In the first such pair of each category in a batch they replace it, in one of
    the `TEMPLATES`; a second time in the same batch, they would name images that count as each other's negatives.
    """

    def __init__(
        self, pairs: ImageTextPairs, tokenize: Tokenize, *, size: int, batch_size: int, seed: int,
        augment: bool = True, label_captions: float = 0.0, workers: int = 0, share: Share = ALONE,
        faults: Faults | None = None,
    ) -> None:  # fmt: skip
        super().__init__(len(pairs), batch_size=batch_size, seed=seed, workers=workers, share=share, faults=faults)
        self.pairs, self.tokenize, self.size = pairs, tokenize, size
        self.augment, self.label_captions = augment, label_captions

    @property
    def fingerprint(self) -> str:
        """What a resumed run must find again: captions and image files, in order, wherever these lie."""
        names = names_within(self.pairs.images) if isinstance(self.pairs.images, list) else []
        others = [caption for own in self.pairs.others or [] for caption in own]
        return digest([*self.pairs.captions, *others, *names])

    @property
    def in_memory(self) -> bool:
        return isinstance(self.pairs.images, Tensor)

    def make(self, indices: list[int], own: slice, rng: np.random.Generator, found: list[Fault]) -> Batch:
        captions = self._captions(indices, rng)
        paths = self.pairs.images
        if isinstance(paths, Tensor):
            return make_batch(self._drawings(paths, indices, own, rng), captions, indices, self.tokenize, own)
        asked = list(indices)
        images = self._files(paths, indices, own, rng, found)
        captions = [
            caption if index == before else self.pairs.captions[index]
            for caption, index, before in zip(captions, indices, asked, strict=True)
        ]
        numbers = self.pairs.contents
        sources: list[Hashable] = [paths[i] if numbers is None else numbers[i] for i in indices]
        batch = make_batch(images, captions, sources, self.tokenize, own)
        if self.share.world > 1:  # no process knows what the others have replaced
            batch["ids"] = keys_of(captions[own], sources[own])
        return batch

    def _captions(self, indices: Sequence[int], rng: np.random.Generator) -> list[str]:
        captions = [self.pairs.captions[i] for i in indices]
        if self.pairs.others is not None:
            for place, draw in enumerate(rng.random(len(indices))):
                every = (captions[place], *self.pairs.others[indices[place]])
                captions[place] = every[int(draw * len(every))]
        named: set[str] = set()
        for place in np.flatnonzero(rng.random(len(indices)) < self.label_captions).tolist():
            category = self.pairs.categories[indices[place]] if self.pairs.categories else ""
            if category:
                prompt = TEMPLATES[rng.integers(len(TEMPLATES))].format(category)
                captions[place] = f"{captions[place]} {category}" if category in named else prompt
                named.add(category)
        return captions

    def _drawings(self, images: Tensor, indices: list[int], own: slice, rng: np.random.Generator) -> Tensor:
        if not self.augment:
            return self.pairs.load(indices[own], self.size)
        return jitter(images[indices[own]], self.size, rng, n=len(indices), own=own)

    def _files(
        self, paths: list[Path], indices: list[int], own: slice, rng: np.random.Generator, found: list[Fault]
    ) -> Tensor:
        """Images of the part `own`; `indices` then names those that were taken in the place of bad ones."""

        def open_pair(index: int) -> Image.Image:
            return open_image(paths[index], self.pairs.background)

        crops, spares = image_seeds(rng, len(indices)), image_seeds(rng, len(indices))
        images = []
        for place in range(len(indices))[own]:
            picture = self.readable(indices, place, spares[place], open_pair, found)
            images.append(
                random_crop(picture, self.size, crops[place]) if self.augment else centre_crop(picture, self.size)
            )
        return torch.stack(images)


def make_batch(
    images: Tensor, captions: Sequence[str], sources: Sequence[Hashable], tokenize: Tokenize, own: slice = slice(None)
) -> Batch:
    """Collate the part `own` of a batch, of which there are the images, and captions and sources of the whole.

    `ids` is None unless pairs of the batch share a caption or an image: those are not negatives.
    """
    ids = shared_ids(captions, sources)
    return {"images": images, "text": tokenize(captions[own]), "ids": None if ids is None else ids[own]}
