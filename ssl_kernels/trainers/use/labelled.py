"""Images in a subfolder to each class: what probes and classifiers are trained and tested with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ssl_kernels.trainers.data import image_sets
from ssl_kernels.trainers.data.faults import Faults, place
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.image_sets import Images
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.use.command import UseConfig
from ssl_kernels.trainers.use.embedding import Encode, all_images
from ssl_kernels.trainers.use.items import Item, digit_images, of_images
from ssl_kernels.trainers.use.trained import Trained


@dataclass
class Part:
    """Images that could be read, what an encoder makes of them, and their labels."""

    items: list[Item]
    vectors: Tensor  # [n, D]
    labels: Tensor  # [n]


def read_parts(
    model: Trained, data: str, held_out_data: str, held_out: float, seed: int, encode: Encode, options: UseConfig,
    console: Console,
) -> tuple[list[str], Part, Part]:  # fmt: skip
    """The classes, the images to train on and those to test on.

    These are data of their own, or those that the folders of `data` hold out, or else a share of each class. Equal
    images are on one side.
    """
    found, faults = Found(place(data)), Faults(max_bad=1, flag="DATA")
    if held_out_data:
        train, test = _images(data, "DATA", console), _images(held_out_data, "--held-out-data", console)
    elif data == "mnist":
        train, test = image_sets.split(digit_images(), held_out, seed)
    else:
        train, test = image_sets.read_parts(_folder(data, "DATA"), held_out, seed, found, faults)
        found.print(console, faults)
    test_name, test_flag = (held_out_data, "--held-out-data") if held_out_data else (data, "DATA")
    train, test = _labelled(train, data, "DATA"), _labelled(test, test_name, test_flag)
    if len(test) == 0 or len(train) == 0:
        raise UserError(
            f"--held-out: {held_out} of each class of {data} leaves nothing to train or nothing to test on; it has"
            f" {len(train) + len(test)} images of {len(train.classes)} classes"
        )
    parts = (
        _part(model, images, name, train.classes, encode, options, console)
        for images, name in ((train, data), (test, test_name))
    )
    return (list(train.classes), *parts)  # type: ignore[return-value]


def _images(data: str, flag: str, console: Console) -> Images:
    if data == "mnist":
        return digit_images()
    found, faults = Found(place(data)), Faults(max_bad=1, flag=flag)
    images = image_sets.read_folder(_folder(data, flag), found, faults)
    found.print(console, faults)
    return images


def _folder(name: str, flag: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise UserError(f"{flag}: expected a folder with a subfolder to each class, or mnist, got {name!r}")
    return path


def _labelled(images: Images, data: str, flag: str) -> Images:
    if images.labels is None and len(images):
        raise UserError(f"{flag}: {data} has no labels; expected a folder with a subfolder to each class, or mnist")
    return images.labelled()


def _part(
    model: Trained, images: Images, data: str, classes: Sequence[str], encode: Encode, options: UseConfig,
    console: Console,
) -> Part:  # fmt: skip
    unknown = sorted(set(images.classes) - set(classes))
    if unknown:
        raise UserError(f"--held-out-data: the class {unknown[0]!r} is not in DATA, which has {', '.join(classes[:5])}")
    items = of_images(images, data)
    found = all_images(model, items, encode, options, console, "features")
    place_of = torch.tensor([list(classes).index(name) for name in images.classes])
    assert images.labels is not None
    listed = list(items.read())
    return Part([listed[i] for i in found.kept.tolist()], found.vectors, place_of[images.labels[found.kept]])
