"""Images in a subfolder to each class: what probes and classifiers are trained and tested with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from ssl_kernels.trainers.data import digits
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.use.command import UseConfig
from ssl_kernels.trainers.use.embedding import Encode, all_images
from ssl_kernels.trainers.use.items import Item, Items, images_of
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
    """The classes, the images to train on, and those to test on: data of their own, or else a share of each class."""
    items = labelled(data, model.size)
    train = _part(model, items, items.classes, encode, options, console)
    if held_out_data:
        other = labelled(held_out_data, model.size, "--held-out-data")
        return items.classes, train, _part(model, other, items.classes, encode, options, console)
    kept, tested = digits.split(train.labels, held_out, seed)
    if len(tested) == 0 or len(kept) == 0:
        raise UserError(
            f"--held-out: {held_out} of each class of {data} leaves nothing to train or nothing to test on; it has"
            f" {len(train.labels)} images of {len(items.classes)} classes"
        )
    return items.classes, _select(train, kept), _select(train, tested)


def labelled(data: str, size: int, flag: str = "DATA") -> Items:
    """The images that have labels, or an error that says where labels come from."""
    items = images_of(data, size)
    if items.labels is None:
        raise UserError(f"{flag}: {data} has no labels; expected a folder with a subfolder to each class, or mnist")
    if bool((items.labels < 0).any()):
        chosen = [item for item, label in zip(items.read(), items.labels, strict=True) if label >= 0]
        names, sources = zip(*chosen, strict=True)
        return Items.listed(names, sources, items.labels[items.labels >= 0], items.classes)
    return items


def _part(
    model: Trained, items: Items, classes: list[str], encode: Encode, options: UseConfig, console: Console
) -> Part:
    unknown = sorted(set(items.classes) - set(classes))
    if unknown:
        raise UserError(f"--held-out-data: the class {unknown[0]!r} is not in DATA, which has {', '.join(classes[:5])}")
    found = all_images(model, items, encode, options, console, "features")
    place = torch.tensor([classes.index(name) for name in items.classes])
    assert items.labels is not None
    listed = list(items.read())
    return Part([listed[i] for i in found.kept.tolist()], found.vectors, place[items.labels[found.kept]])


def _select(part: Part, chosen: Tensor) -> Part:
    return Part([part.items[i] for i in chosen.tolist()], part.vectors[chosen], part.labels[chosen])
