"""Images without captions, in memory or on disk: read from a folder with their labels, and split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ssl_kernels.trainers.data import contents, digits, folders, splits, trees
from ssl_kernels.trainers.data.faults import Faults, place
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.images import SUFFIXES, load_images, load_readable
from ssl_kernels.trainers.data.pixels import WHITE, Colour
from ssl_kernels.trainers.errors import UserError

COPIES = "copies of held-out images"


@dataclass
class Images:
    """Images in memory or on disk; `labels` [N] where they are known, -1 for images without one, of the `classes`.

    Images of one number in `contents` are equal.
    """

    images: Tensor | list[Path]  # uint8 [N, 3, H, W], or files
    labels: Tensor | None = None
    classes: Sequence[str] = ()
    contents: list[int] | None = None
    split: str = ""  # the name of a folder's part
    background: Colour = WHITE  # of transparent files

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Sequence[int] | Tensor) -> Images:
        chosen = torch.as_tensor(indices, dtype=torch.long)
        labels = None if self.labels is None else self.labels[chosen]
        if isinstance(self.images, Tensor):
            return replace(self, images=self.images[chosen], labels=labels)
        own = chosen.tolist()
        contents = None if self.contents is None else [self.contents[i] for i in own]
        return replace(self, images=[self.images[i] for i in own], labels=labels, contents=contents)

    def load(self, indices: Sequence[int], size: int) -> Tensor:
        """The images as evaluation sees them: uint8 [n, 3, size, size], resized and cropped around the centre."""
        return load_images(self.images, indices, size, self.background)

    def load_readable(self, indices: Sequence[int], size: int, faults: Faults) -> tuple[Tensor, list[int]]:
        """The same of those that can be read, and which these are; `faults` is told of the others."""
        return load_readable(self.images, indices, size, self.background, faults)

    def labelled(self) -> Images:
        """Those with a label, where any has one."""
        return self if self.labels is None else self.select((self.labels != folders.UNLABELLED).nonzero()[:, 0])

    def readable(self, faults: Faults) -> Images:
        """Those that can be read; `faults` is told of the others."""
        if isinstance(self.images, Tensor):
            return self
        kept = [i for i in range(len(self)) if self.load_readable([i], 8, faults)[1]]
        return self if len(kept) == len(self) else self.select(kept)


def read_folder(folder: Path, found: Found | None = None, faults: Faults | None = None) -> Images:
    """Every image below a folder, in the order of their names, with its label (see `folders`).

    Raises `UserError` for a folder that is split into parts, and, without `faults`, for an image that is not there.
    """
    found, faults = found or Found(place(folder)), Faults(stop=True) if faults is None else faults
    parts = _parts(folder, found, faults)
    if len(parts) > 1:
        names = ", ".join(part.split for part in parts)
        raise UserError(
            f"{faults.flag}: the folders of {place(folder)} are splits, not classes ({names}); name one of them"
        )
    return parts[0]


def read_parts(folder: Path, share: float, seed: int, found: Found, faults: Faults) -> tuple[Images, Images]:
    """The images below a folder to train on and to evaluate with: as its folders split them, or else by `share`."""
    parts = _parts(folder, found, faults)
    if len(parts) == 1:
        return split(parts[0], share, seed, found)
    train, held_out = parts
    numbers = contents.same([*_paths(train), *_paths(held_out)])
    train.contents, held_out.contents = numbers[: len(train)], numbers[len(train) :]
    first = {number: i for i, number in reversed(list(enumerate(held_out.contents)))}
    kept = [i for i, number in enumerate(train.contents) if number not in first]
    left_out = len(train) - len(kept) + len(held_out) - len(first)
    if left_out:
        found.leave_out(COPIES, left_out)
    return train.select(kept), held_out.select(sorted(first.values()))


def split(images: Images, share: float, seed: int, found: Found | None = None) -> tuple[Images, Images]:
    """Hold out the same share of each class, or of all images without labels; of copies all are on one side."""
    labels = torch.zeros(len(images), dtype=torch.long) if images.labels is None else images.labels
    if images.contents is None:
        train, held_out = (images.select(part) for part in digits.split(labels, share, seed))
        return train, held_out
    chosen = splits.stratified(labels.tolist(), images.contents, share, seed, never=folders.UNLABELLED)
    train, held_out = (images.select(part) for part in chosen)
    if found is not None:
        _tell(found, images, train, held_out)
    return train, held_out


def _tell(found: Found, images: Images, train: Images, held_out: Images) -> None:
    if left_out := len(images) - len(train) - len(held_out):
        found.leave_out(COPIES, left_out)
    if images.labels is not None and held_out.labels is not None and len(held_out):
        without = [images.classes[i] for i in sorted({*images.labels.tolist()} - {*held_out.labels.tolist()}) if i >= 0]
        if without:
            names = ", ".join(map(place, without[:10])) + (", ..." if len(without) > 10 else "")
            found.remarks.append(f"no image is held out of the classes {names}")


def _parts(folder: Path, found: Found, faults: Faults) -> list[Images]:
    tree = trees.read(folder, found, faults)
    if not tree.files:
        reasons = "; ".join(found.reasons(faults))
        raise UserError(
            f"{faults.flag}: no images in {place(folder)}; expected files such as {', '.join(SUFFIXES[:3])}"
            + (f" ({reasons})" if reasons else "")
        )
    faults.check(len(tree.files) + faults.lost())
    parts = [
        Images(part.paths, None if part.labels is None else torch.tensor(part.labels), part.classes, split=part.name)
        for part in folders.parts(tree, found)
    ]
    if len(parts) == 1:
        parts[0].contents = contents.same(_paths(parts[0]))
        if copies := len(parts[0]) - len(set(parts[0].contents)):
            found.remarks.append(f"{copies:,} {'is a copy' if copies == 1 else 'are copies'} of others")
        _tell_of_contradictions(parts[0], found)
    return parts


def _tell_of_contradictions(images: Images, found: Found) -> None:
    first: dict[int, int] = {}
    labels = [] if images.labels is None else images.labels.tolist()
    for path, label, number in zip(_paths(images), labels, images.contents or [], strict=False):
        if first.setdefault(number, label) != label and folders.UNLABELLED not in (label, first[number]):
            found.odd("copies of an image of another class", place(path))


def _paths(images: Images) -> list[Path]:
    assert isinstance(images.images, list)
    return images.images
