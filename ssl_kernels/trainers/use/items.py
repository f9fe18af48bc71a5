"""What a command is to embed: images or captions by name, from files, tables, shards or what is built in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ssl_kernels.trainers.data import digits, files, openmoji, tables, tars
from ssl_kernels.trainers.data.faults import Fault
from ssl_kernels.trainers.data.views import read_folder
from ssl_kernels.trainers.errors import UserError

DRAWN = ("openmoji", "mnist")  # data that come as packages


LeftOut = list[tuple[str, str]]  # names of what cannot be used, and why


class Item(NamedTuple):
    """An image, as a file, encoded or as pixels, or a caption; and how it is named."""

    name: str
    source: Path | bytes | Tensor | str


@dataclass
class Items:
    """Items in their order, which can be gone through again; `labels` [N] are indices of `classes`, or -1.

    Each time they are read, `missing` has what should be among them and is not by then.
    """

    read: Callable[[], Iterator[Item]]
    count: int | None  # None where they are not counted before they are read
    fingerprint: str
    labels: Tensor | None = None
    classes: list[str] = field(default_factory=list)
    missing: LeftOut = field(default_factory=list)

    @classmethod
    def listed(
        cls, names: Sequence[str], sources: Sequence[Path | Tensor | str], labels: Tensor | None = None,
        classes: Sequence[str] = (),
    ) -> Items:  # fmt: skip
        """Items that are known one by one."""

        def read() -> Iterator[Item]:
            return map(Item, names, sources)

        digest = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()
        return cls(read, len(names), digest, labels, list(classes))


def images_of(data: str, size: int) -> Items:
    """The images that an argument names: a folder, a .txt list, a table, shards, an image, or built-in data."""
    path = Path(data).expanduser()
    if data == "openmoji":
        pairs = openmoji.load(size * 3 // 2, size)  # as training and evaluation have them
        return Items.listed(pairs.captions, list(pairs.images))
    if data == "mnist":
        pixels, labels = digits.load()
        names = [f"digit {i} of {len(labels)}" for i in range(len(labels))]
        return Items.listed(names, list(pixels), labels, [str(digit) for digit in range(10)])
    if tars.is_shards(data):
        return _shards(data, caption=False)
    if path.is_dir():
        return folder_of(path)
    if not path.is_file():
        raise UserError(
            f"DATA: expected a folder of images, a list, a table, shards or {' or '.join(DRAWN)}, got {data!r}"
        )
    if _is_table(path):
        found = files.read_table(path, flag="DATA").images
        return Items.listed([str(file) for file in found], list(found))
    if path.suffix == ".txt":
        found = [_placed(line, path.parent) for line in _lines(path)]
        return Items.listed([str(file) for file in found], found)
    return Items.listed([data], [path])


def folder_of(folder: Path) -> Items:
    """All images below a folder, with the labels that its subfolders give."""
    found = read_folder(folder)
    assert isinstance(found.images, list)
    return Items.listed([str(file) for file in found.images], found.images, found.labels, found.classes)


def _is_table(path: Path) -> bool:
    """A .txt file is a list here."""
    return path.suffix.lower() in (*tables.SUFFIXES, ".gz") and path.suffix.lower() != ".txt"


def captions_of(data: str) -> Items:
    """The captions that an argument names: the lines of a .txt file, the captions of a table, of shards or of emoji."""
    path = Path(data).expanduser()
    if tars.is_shards(data):
        return _shards(data, caption=True)
    if data == "openmoji":
        captions = openmoji.load(32, 32).captions
    elif _is_table(path) and path.is_file():
        captions = files.read_table(path, flag="DATA").captions
    elif path.suffix == ".txt" and path.is_file():
        captions = _lines(path)
    else:
        raise UserError(
            f"DATA: expected with --text a .txt file of captions, a table, shards or openmoji, got {data!r}"
        )
    return Items.listed(captions, captions)


def _shards(data: str, *, caption: bool) -> Items:
    names = tars.expand(data, "DATA")

    def read() -> Iterator[Item]:
        items.missing.clear()
        for shard in names:
            found: list[Fault] = []
            for image, text, where in tars.samples(shard, found):
                yield Item(text, text) if caption else Item(where, image)
            items.missing.extend((fault.where, fault.reason) for fault in found)

    items = Items(read, None, hashlib.sha256("\0".join(names).encode()).hexdigest())
    return items


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"DATA: cannot read {path}: {error}") from None
    if not lines:
        raise UserError(f"DATA: {path} is empty; expected a line to each item")
    return lines


def _placed(name: str, folder: Path) -> Path:
    """Of a list, paths are relative to the list, or else to the working directory, as `find` writes them."""
    beside = folder / Path(name).expanduser()
    return beside if beside.exists() else Path(name).expanduser()
