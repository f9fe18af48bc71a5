"""Images without captions, and the random views of each that self-supervised learning compares."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_kernels.trainers.data.batches import Batch, ShuffledBatches
from ssl_kernels.trainers.data.faults import Fault, Faults
from ssl_kernels.trainers.data.fingerprint import digest, names_within
from ssl_kernels.trainers.data.image_sets import Images
from ssl_kernels.trainers.data.image_sets import read_folder as read_folder
from ssl_kernels.trainers.data.images import image_seeds, open_image, torch_draws_from
from ssl_kernels.trainers.processes import ALONE, Share


class View(Protocol):
    """Random views of the part `own` of the chosen images, uint8 [n, 3, size, size].

    They are drawn from `rng` alone, and each part is as it is among all.
    """

    def __call__(
        self, images: Images, indices: Sequence[int], size: int, rng: np.random.Generator, own: slice = slice(None)
    ) -> Tensor: ...

    def local(self) -> View: ...


@dataclass(frozen=True)
class DrawingView:
    """For digits and drawings in memory: rotate, scale, shear, shift and brighten each by its own amount.

    What photographs need besides would take away what such images are about: a mirrored digit is none, a crop of one
    may be another, and an emoji's colours are part of its meaning.
    """

    degrees: float  # of rotation, either way
    scale: float  # largest factor, of growing as of shrinking
    shift: float  # share of the width, either way
    shear: float
    brightness: float = 0.0
    ground: float = 0.0  # the pixel value outside of the image
    window: float = 1.0  # share of the width that a view shows

    def local(self) -> DrawingView:
        """Views of half the width, from anywhere in the image."""
        return dataclasses.replace(self, window=0.5, shift=0.25)

    def __call__(
        self, images: Images, indices: Sequence[int], size: int, rng: np.random.Generator, own: slice = slice(None)
    ) -> Tensor:
        assert isinstance(images.images, Tensor)
        x = images.images[list(indices)[own]].float() - self.ground  # zero padding is the ground then
        n = len(indices)
        angle = np.deg2rad(rng.uniform(-self.degrees, self.degrees, n))
        # The map goes from places in the view to places in the image; a logarithm makes growing as likely as shrinking.
        zoom = self.window * np.exp(rng.uniform(-np.log(self.scale), np.log(self.scale), n))
        shear, shift = rng.uniform(-self.shear, self.shear, n), rng.uniform(-2 * self.shift, 2 * self.shift, (n, 2))
        cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
        theta = np.stack([cos, shear * cos - sin, shift[:, 0], sin, shear * sin + cos, shift[:, 1]], 1)
        theta = theta.reshape(n, 2, 3)[own]
        grid = F.affine_grid(torch.from_numpy(theta).float(), [len(x), 3, size, size], align_corners=False)
        factor = torch.from_numpy(rng.uniform(1 - self.brightness, 1, n)[own]).float().view(-1, 1, 1, 1)
        warped = F.grid_sample(x, grid, align_corners=False) * factor + self.ground
        return warped.round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class PhotoView:
    """MoCo v2's augmentation for photographs (Chen 2020, arXiv 2003.04297): crop, colour, grey, blur, mirror."""

    scale: tuple[float, float] = (0.2, 1.0)  # share of the area that a view shows

    def local(self) -> PhotoView:
        """Views of small parts of the image, as DINO's (Caron 2021, arXiv 2104.14294)."""
        return PhotoView((0.05, 0.25))

    def __call__(
        self, images: Images, indices: Sequence[int], size: int, rng: np.random.Generator, own: slice = slice(None)
    ) -> Tensor:
        assert isinstance(images.images, list)
        chosen = [images.images[i] for i in list(indices)[own]]
        seeds = image_seeds(rng, len(indices))[own]
        pictures = (open_image(path, images.background) for path in chosen)
        return torch.stack([self.show(picture, size, seed) for picture, seed in zip(pictures, seeds, strict=True)])

    def show(self, picture: Image.Image, size: int, seed: int) -> Tensor:
        """A view of an image, uint8 [3, size, size], drawn from `seed` alone."""
        with torch_draws_from(seed):
            view: Tensor = _photo_transform(self.scale, size)(picture)
        return view


@functools.lru_cache
def _photo_transform(scale: tuple[float, float], size: int) -> Any:
    from torchvision.transforms import v2

    blur = v2.GaussianBlur(kernel_size=max(3, size // 20 * 2 + 1), sigma=(0.1, 2.0))
    return v2.Compose([
        v2.PILToTensor(), v2.RandomResizedCrop(size, scale=scale, antialias=True),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), v2.RandomGrayscale(p=0.2),
        v2.RandomApply([blur], p=0.5), v2.RandomHorizontalFlip(),
    ])  # fmt: skip


class ViewBatches(ShuffledBatches):
    """Batches of two views of each image, then `crops[0]` local ones of `crops[1]` pixels a side."""

    def __init__(
        self, images: Images, view: View, *, size: int, batch_size: int, seed: int, workers: int = 0,
        crops: tuple[int, int] = (0, 0), share: Share = ALONE, faults: Faults | None = None,
    ) -> None:  # fmt: skip
        super().__init__(len(images), batch_size=batch_size, seed=seed, workers=workers, share=share, faults=faults)
        self.images, self.view, self.size, self.crops = images, view, size, crops

    @property
    def fingerprint(self) -> str:
        """What a resumed run must find again: the pixels, or the files' names in order, wherever these lie."""
        images = self.images.images
        if isinstance(images, Tensor):
            return hashlib.sha256(images.numpy().tobytes()).hexdigest()
        return digest(names_within(images))

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images.images, Tensor)

    def make(self, indices: list[int], own: slice, rng: np.random.Generator, found: list[Fault]) -> Batch:
        views = [(self.view, self.size)] * 2 + [(self.view.local(), self.crops[1])] * self.crops[0]
        if self.in_memory:
            return {"views": tuple(view(self.images, indices, size, rng, own) for view, size in views)}
        return {"views": self._photographs(views, indices, own, rng, found)}

    def _photographs(
        self, views: list[tuple[View, int]], indices: list[int], own: slice, rng: np.random.Generator,
        found: list[Fault],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """As the views make them one after the other, but each file is opened once."""
        paths = self.images.images
        assert isinstance(paths, list)
        seeds = [image_seeds(rng, len(indices)) for _ in views]
        spares = image_seeds(rng, len(indices))
        shown: list[list[Tensor]] = [[] for _ in views]
        for number in range(len(indices))[own]:
            picture = self.readable(
                indices, number, spares[number], lambda i: open_image(paths[i], self.images.background), found
            )
            for (view, size), own_seeds, done in zip(views, seeds, shown, strict=True):
                assert isinstance(view, PhotoView)
                done.append(view.show(picture, size, own_seeds[number]))
        return tuple(torch.stack(done) for done in shown)
