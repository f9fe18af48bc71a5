"""What a command is to embed: images or captions by name, from files, tables, shards or what is built in."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from torch import Tensor

from ssl_kernels.trainers.data import digits, files, openmoji, shard_names, tars, trees
from ssl_kernels.trainers.data.faults import Fault, Faults, place
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.image_sets import Images, read_folder
from ssl_kernels.trainers.data.pairs import ImageTextPairs
from ssl_kernels.trainers.data.text_files import open_text, told
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.use.command import ReadConfig

DRAWN = ("openmoji", "mnist")  # data that come as packages
LeftOut = list[tuple[str, str]]  # names of what cannot be used, and why


class Item(NamedTuple):
    """An image, as a file, encoded or as pixels, or a caption; and how it is named."""

    name: str
    source: Path | bytes | Tensor | str


@dataclass
class Items:
    """Items in their order, which can be gone through again; `labels` [N] are indices of `classes`, or -1.

    Each time they are read, `missing` has what should be among them and is not by then. `found` is what is known of
    them before.
    """

    read: Callable[[], Iterator[Item]]
    count: int | None  # None where they are not counted before they are read
    fingerprint: str
    labels: Tensor | None = None
    classes: Sequence[str] = ()
    missing: LeftOut = field(default_factory=list)
    found: Found | None = None

    @classmethod
    def listed(cls, names: Sequence[str], sources: Sequence[Path | Tensor | str]) -> Items:
        """Items that are known one by one."""

        def read() -> Iterator[Item]:
            return map(Item, names, sources)

        return cls(read, len(names), hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest())

    def told(self, found: Found, faults: Faults) -> Items:
        """The same with what was found on the way to them."""
        self.found, self.missing = found, [(fault.where, fault.reason) for fault in faults]
        return self

    def tell(self, console: Console) -> None:
        """Say what was found; what is missing is said at the end."""
        if self.found is not None and self.found.holds:
            self.found.print(console)


def images_of(data: str, size: int, options: ReadConfig) -> Items:
    """The images that an argument names: a folder, a .txt list, a table, shards, an image, or built-in data."""
    path, found, faults = Path(data).expanduser(), Found(place(data)), Faults(max_bad=1, flag="DATA")
    if data == "openmoji":
        pairs = openmoji.load(size * 3 // 2, size)  # as training and evaluation have them
        return Items.listed(pairs.captions, list(pairs.images))
    if data == "mnist":
        return of_images(digit_images(), data)
    if shard_names.is_shards(data):
        return _shards(data, options.encoding, caption=False)
    if path.is_dir():
        return of_images(read_folder(path, found, faults), data).told(found, faults)
    if not path.is_file():
        kinds = f"a folder of images, a list, a table, shards or {' or '.join(DRAWN)}"
        raise UserError(f"DATA: expected {kinds}, got {data!r}")
    if path.suffix.lower() == ".txt":
        listed = [_placed(line, path.parent) for line in _lines(path, options.encoding)]
        return Items.listed([str(file) for file in listed], listed)
    if path.suffix.lower() in trees.endings():
        return Items.listed([data], [path])
    pairs = _pairs(path, options, faults, found)
    return of_images(Images(pairs.images), str(path.parent)).told(found, faults)


def of_images(images: Images, folder: str) -> Items:
    """Images with their labels, which are named as they lie in a folder."""
    if isinstance(images.images, Tensor):
        items = Items.listed([f"{folder} {i}" for i in range(len(images))], list(images.images))
    else:
        root = os.path.abspath(os.path.expanduser(folder))
        names = [os.path.join(folder, os.path.relpath(file, root)) for file in images.images]
        items = Items.listed(names, images.images)
    items.labels, items.classes = images.labels, images.classes
    return items


def digit_images() -> Images:
    """The built-in digits."""
    return Images(*digits.load(), classes=[str(digit) for digit in range(10)])


def captions_of(data: str, options: ReadConfig) -> Items:
    """The captions that an argument names: the lines of a .txt file, the captions of a table, of shards or of emoji."""
    path, found, faults = Path(data).expanduser(), Found(place(data)), Faults(max_bad=1, flag="DATA")
    if shard_names.is_shards(data):
        return _shards(data, options.encoding, caption=True)
    if data == "openmoji":
        captions = openmoji.load(32, 32).captions
    elif path.suffix.lower() == ".txt" and path.is_file():
        captions = _lines(path, options.encoding)
    elif path.exists():
        captions = _pairs(files.table_path(data, "DATA"), options, faults, found).captions
    else:
        kinds = "a .txt file of captions, a table, shards or openmoji"
        raise UserError(f"DATA: expected with --text {kinds}, got {data!r}")
    return Items.listed(captions, captions).told(found, faults)


def _pairs(path: Path, options: ReadConfig, faults: Faults, found: Found) -> ImageTextPairs:
    return files.read_table(
        path, options.image_column, options.caption_column, "DATA",
        encoding=options.encoding, faults=faults, found=found,
    )  # fmt: skip


def _shards(data: str, encoding: str, *, caption: bool) -> Items:
    names = shard_names.expand(data, "DATA")

    def read() -> Iterator[Item]:
        items.missing.clear()
        for shard in names:
            found: list[Fault] = []
            for image, captions, where in tars.samples(shard, found, encoding=encoding):
                yield Item(captions[0], captions[0]) if caption else Item(where, image)
            items.missing.extend((fault.where, fault.reason) for fault in found)

    items = Items(read, None, hashlib.sha256("\0".join(names).encode()).hexdigest())
    return items


def _lines(path: Path, encoding: str) -> list[str]:
    with told(path, "DATA"), open_text(path, encoding) as file:
        lines = [line.strip() for line in file if line.strip()]
    if not lines:
        raise UserError(f"DATA: {path} is empty; expected a line to each item")
    return lines


def _placed(name: str, folder: Path) -> Path:
    """Of a list, paths are relative to the list, or else to the working directory, as `find` writes them."""
    beside = folder / Path(name).expanduser()
    return beside if beside.exists() else Path(name).expanduser()
