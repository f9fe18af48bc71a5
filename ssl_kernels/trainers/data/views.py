"""Images without captions, and the random views of each that self-supervised learning compares."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_kernels.trainers.data import digits, openmoji
from ssl_kernels.trainers.data.batches import Batch, ShuffledBatches
from ssl_kernels.trainers.data.faults import EVALUATION, TRAINING, Fault, Faults, ReadingConfig
from ssl_kernels.trainers.data.fingerprint import digest, names_within
from ssl_kernels.trainers.data.images import (
    image_seeds,
    load_images,
    load_readable,
    open_image,
    torch_draws_from,
    try_some,
)  # fmt: skip
from ssl_kernels.trainers.data.pixels import WHITE, Colour, parse_colour
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.processes import ALONE, Share
from ssl_kernels.trainers.ranges import SHARE_BELOW_ONE, at_least, require


@dataclass
class ImageConfig(ReadingConfig):
    """Which images to learn from and to evaluate on."""

    data: str = "mnist"
    """`mnist` (5,000 digits), `openmoji` (3,798 emoji), or a folder of images. The names of its subfolders, if it has
    any, are labels: they are never trained on, only evaluated with."""
    image_size: int = 32
    """Height and width of the images in pixels."""
    held_out: float = 0.1
    """Share of a folder's images that is held out; of each class, if it has subfolders."""
    split_seed: int = 0
    """Seed of the held-out split and of the evaluation's distortions; independent of --seed."""
    evaluate_on: Literal["held-out", "validation"] = "held-out"
    """`validation` holds a second split out of the training images and evaluates on that: use it to choose settings."""

    def check_data(self) -> None:
        """Refuse values that cannot work."""
        require(self, SHARE_BELOW_ONE, "held_out")
        require(self, at_least(8), "image_size")
        require(self, at_least(0), "split_seed")
        self.check_reading()

    def find_data(self) -> None:
        """Refuse a folder that is not there, before anything that takes long."""
        if self.data not in ("mnist", "openmoji"):
            _folder(self.data)


@dataclass
class Images:
    """Images in memory or on disk; `labels` [N] where they are known."""

    images: Tensor | list[Path]  # uint8 [N, 3, H, W], or files
    labels: Tensor | None = None
    background: Colour = WHITE  # of transparent files

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Sequence[int] | Tensor) -> Images:
        chosen = torch.as_tensor(indices, dtype=torch.long)
        labels = None if self.labels is None else self.labels[chosen]
        if isinstance(self.images, Tensor):
            return replace(self, images=self.images[chosen], labels=labels)
        return replace(self, images=[self.images[i] for i in chosen.tolist()], labels=labels)

    def load(self, indices: Sequence[int], size: int) -> Tensor:
        """The images as evaluation sees them: uint8 [n, 3, size, size], resized and cropped around the centre."""
        return load_images(self.images, indices, size, self.background)

    def load_readable(self, indices: Sequence[int], size: int, faults: Faults) -> tuple[Tensor, list[int]]:
        """The same of those that can be read, and which these are; `faults` is told of the others."""
        return load_readable(self.images, indices, size, self.background, faults)

    def readable(self, faults: Faults) -> Images:
        """Those that can be read; `faults` is told of the others."""
        if isinstance(self.images, Tensor):
            return self
        kept = [i for i in range(len(self)) if self.load_readable([i], 8, faults)[1]]
        return self if len(kept) == len(self) else self.select(kept)


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
        """What a resumed run must find again: the pixels, or the files' names, in order."""
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
        for place in range(len(indices))[own]:
            picture = self.readable(
                indices, place, spares[place], lambda i: open_image(paths[i], self.images.background), found
            )
            for (view, size), own_seeds, done in zip(views, seeds, shown, strict=True):
                assert isinstance(view, PhotoView)
                done.append(view.show(picture, size, own_seeds[place]))
        return tuple(torch.stack(done) for done in shown)


@dataclass
class ImageData:
    """Batches to train on, the images they come from, the images held out, and how to distort one."""

    batches: ViewBatches
    train: Images
    held_out: Images
    view: View
    faults: Faults = dataclasses.field(default_factory=Faults)  # what of the data cannot be used


def load(
    config: ImageConfig, *, batch_size: int, seed: int, workers: int, crops: tuple[int, int] = (0, 0),
    share: Share = ALONE,
) -> ImageData:  # fmt: skip
    """The images that a configuration names, split into what is trained on and what is held out."""
    view: View = PhotoView()
    faults = config.faults()
    if config.data == "mnist":
        images = Images(*digits.load())
        view = DrawingView(degrees=25, scale=1.25, shift=0.075, shear=0.2)
        train, held_out = _split(images, 0.2, config.split_seed)
    elif config.data == "openmoji":
        # Half as large again as the model sees: rotating and scaling then costs no sharpness.
        pairs = openmoji.load(config.image_size * 3 // 2, config.image_size)
        view = DrawingView(degrees=15, scale=1.25, shift=0.07, shear=0.05, brightness=0.05, ground=255.0)
        train, held_out = (Images(part.images) for part in openmoji.hold_out(pairs, config.split_seed))
    else:
        images = replace(read_folder(_folder(config.data)), background=parse_colour(config.background))
        train, held_out = _split(images, config.held_out, config.split_seed)
    if config.evaluate_on == "validation":
        train, held_out = _split(train, 0.2, config.split_seed + 1)
    if len(train) < batch_size:
        raise UserError(
            f"--batch-size: {batch_size} is more than the {len(train)} training images of --data {config.data}"
        )
    for part, use in ((train, TRAINING), (held_out, EVALUATION)):
        if isinstance(part.images, list):
            try_some(part.images, faults, use)
    batches = ViewBatches(
        train, view, size=config.image_size, batch_size=batch_size, seed=seed, workers=workers, crops=crops,
        share=share, faults=faults,
    )  # fmt: skip
    return ImageData(batches, train, held_out, view, faults)


def _folder(name: str) -> Path:
    folder = Path(name)
    if not folder.is_dir():
        raise UserError(f"--data: expected mnist, openmoji or a folder of images, got {name!r}")
    return folder


def read_folder(folder: Path) -> Images:
    """Every image below a folder, in the order of their paths, labelled by its first subfolder if all are in one.

    What is hidden is left out: an editor's or a desktop's copies are neither more images nor a class of their own.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files, places = [], []
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and path.suffix.lower() in IMG_EXTENSIONS and path.is_file():
            files.append(path)
            places.append(parts)
    if not files:
        raise UserError(f"--data: no images in {folder}; expected files such as {', '.join(IMG_EXTENSIONS[:3])}")
    classes = sorted({parts[0] for parts in places})
    if len(classes) < 2 or any(len(parts) < 2 for parts in places):
        return Images(files)
    if {"train", "val", "validation", "test"} & set(classes):
        raise UserError(
            f"--data: the folders of {folder} are splits, not classes ({', '.join(classes)}); name one of them"
        )
    return Images(files, torch.tensor([classes.index(parts[0]) for parts in places]))


def _split(images: Images, share: float, seed: int) -> tuple[Images, Images]:
    labels = torch.zeros(len(images), dtype=torch.long) if images.labels is None else images.labels
    kept, held_out = digits.split(labels, share, seed)
    return images.select(kept), images.select(held_out)
