"""All images below a folder.

Files with the ending of a format that Pillow reads, in any case, are images. Links are followed; each folder is read
once, so that links in a circle do no harm. What is hidden and what systems leave in folders is left out.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ssl_kernels.trainers.data.faults import Faults, place
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.images import SUFFIXES

_SYSTEM = {
    "thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin", "system volume information",
    "lost+found",
}  # fmt: skip
_STUBS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # formats that Pillow names and needs other programs for

Folders = tuple[str, ...]  # names of folders, each in the one before


class File(NamedTuple):
    """An image, and the folders that lead to it."""

    path: Path
    folders: Folders


@dataclass
class Tree:
    """All that is below a folder: images in the order of their names, and the folders that hold nothing else."""

    files: list[File] = field(default_factory=list)
    folders: set[Folders] = field(default_factory=set)

    def below(self, folders: Folders) -> Tree:
        """The part of it below one of its folders."""
        n = len(folders)
        return Tree(
            [File(path, own[n:]) for path, own in self.files if own[:n] == folders],
            {own[n:] for own in self.folders if own[:n] == folders and len(own) > n},
        )

    def by_folder(self) -> Counter[str]:
        """How many images each folder at the top holds, those that hold none included, in the order of their names."""
        counts = Counter(own[0] for _, own in self.files if own)
        return Counter({name: counts[name] for name in sorted({own[0] for own in self.folders})})


@functools.cache
def endings() -> frozenset[str]:
    """The endings of image files, in small letters."""
    Image.init()
    readable = {end for end, kind in Image.registered_extensions().items() if kind in Image.OPEN and kind not in _STUBS}
    return frozenset(readable | set(SUFFIXES))


def read(folder: Path, found: Found, faults: Faults) -> Tree:
    """Every image below a folder. `found` is told what is left out, and `faults` what should be there and is not."""
    tree, known = Tree(), set[tuple[int, int]]()
    waiting: list[tuple[str, Folders]] = [(os.path.abspath(folder), ())]
    links: list[tuple[str, Folders]] = []
    while waiting or links:  # links last, so that a folder keeps the name that it has itself
        path, folders = waiting.pop() if waiting else links.pop(0)
        if _identity(path) in known or (folders and _leads_up(path)):
            found.leave_out("links to folders that are read already", 1, place(path))
            continue
        known.add(_identity(path))
        tree.folders.add(folders)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            faults.add(f"folder that cannot be read ({error.strerror})", place(path))
            continue
        for entry in entries:
            own = (*folders, entry.name)
            if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
                found.leave_out("hidden and system files", 1, place(entry.path))
            elif entry.is_dir(follow_symlinks=False):
                waiting.append((entry.path, own))
            elif os.path.isdir(entry.path):
                links.append((entry.path, own))
            elif os.path.splitext(entry.name)[1].lower() not in endings():
                found.leave_out("other files", 1, place(entry.path))
            elif os.path.isfile(entry.path):
                tree.files.append(File(Path(entry.path), folders))
            else:
                faults.add("link to nothing", place(entry.path))
    tree.folders.discard(())
    tree.files.sort(key=lambda file: (file.folders, file.path.name))
    return tree


def _identity(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _leads_up(link: str) -> bool:
    """Whether this is a link to a folder that it lies in."""
    target = os.path.realpath(link)
    return os.path.islink(link) and os.path.commonpath([target, os.path.realpath(os.path.dirname(link))]) == target
