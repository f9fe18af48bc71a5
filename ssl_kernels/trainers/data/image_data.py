"""Images without captions as a configuration names them, split into what is trained on and what is held out."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ssl_kernels.trainers.data import digits, openmoji
from ssl_kernels.trainers.data.faults import EVALUATION, TRAINING, Faults, ReadingConfig, place
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.image_sets import Images, read_parts, split
from ssl_kernels.trainers.data.images import try_some
from ssl_kernels.trainers.data.pixels import parse_colour
from ssl_kernels.trainers.data.views import DrawingView, PhotoView, View, ViewBatches
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.processes import ALONE, Share
from ssl_kernels.trainers.ranges import SHARE_BELOW_ONE, at_least, require


@dataclass
class ImageConfig(ReadingConfig):
    """Which images to learn from and to evaluate on."""

    data: str = "mnist"
    """`mnist` (5,000 digits), `openmoji` (3,798 emoji), or a folder of images. The names of its subfolders, if it has
    any, are labels: they are never trained on, only evaluated with. If these are train and val or test, one is trained
    on and the other evaluated with."""
    image_size: int = 32
    """Height and width of the images in pixels."""
    held_out: float = 0.1
    """Share of a folder's images that is held out; of each class, if it has subfolders. A folder that is split into
    train and val or test keeps its split."""
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
class ImageData:
    """Batches to train on, the images they come from, the images held out, how to distort one, what of the data cannot
    be used, and what there is."""

    batches: ViewBatches
    train: Images
    held_out: Images
    view: View
    faults: Faults = dataclasses.field(default_factory=Faults)
    found: Found = dataclasses.field(default_factory=lambda: Found(""))


def load(
    config: ImageConfig, *, batch_size: int, seed: int, workers: int, crops: tuple[int, int] = (0, 0),
    share: Share = ALONE,
) -> ImageData:  # fmt: skip
    """The images that a configuration names, split into what is trained on and what is held out."""
    view: View = PhotoView()
    faults, found = config.faults(config.data), Found(place(config.data))
    if config.data == "mnist":
        images = Images(*digits.load())
        found.holds = {"images": len(images), "classes": 10}
        view = DrawingView(degrees=25, scale=1.25, shift=0.075, shear=0.2)
        train, held_out = split(images, 0.2, config.split_seed)
    elif config.data == "openmoji":
        # Half as large again as the model sees: rotating and scaling then costs no sharpness.
        pairs = openmoji.load(config.image_size * 3 // 2, config.image_size)
        found.holds = {"images": len(pairs)}
        view = DrawingView(degrees=15, scale=1.25, shift=0.07, shear=0.05, brightness=0.05, ground=255.0)
        train, held_out = (Images(part.images) for part in openmoji.hold_out(pairs, config.split_seed))
    else:
        train, held_out = (
            replace(part, background=parse_colour(config.background))
            for part in read_parts(_folder(config.data), config.held_out, config.split_seed, found, faults)
        )
    if config.evaluate_on == "validation":
        train, held_out = split(train, 0.2, config.split_seed + 1, found)
    found.uses = {"training images": len(train), "held out": len(held_out)}
    found.check_size(len(train), "training images", batch_size, faults)
    for part, use in ((train, TRAINING), (held_out, EVALUATION)):
        if isinstance(part.images, list):
            try_some(part.images, faults, use)
    batches = ViewBatches(
        train, view, size=config.image_size, batch_size=batch_size, seed=seed, workers=workers, crops=crops,
        share=share, faults=faults,
    )  # fmt: skip
    return ImageData(batches, train, held_out, view, faults, found)


def _folder(name: str) -> Path:
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        raise UserError(f"--data: expected mnist, openmoji or a folder of images, got {name!r}")
    return folder
