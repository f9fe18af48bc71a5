"""Which files are there, and which of them are copies of each other, without reading most of them."""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple, TypeVar

_BLOCK, _THREADS = 256, 16  # files a task, and tasks at a time: a network's disk answers slowly, but many at once
_TAIL = 4096  # bytes at the end of a file, where even photographs of one camera differ


class Stat(NamedTuple):
    """What the file system says of a file: which one it is, and how long."""

    device: int
    inode: int
    size: int


Item = TypeVar("Item")
Answer = TypeVar("Answer")


def stats(paths: Sequence[Path]) -> list[Stat | None]:
    """What the file system says of each file, through links; None where there is no such file."""
    return _in_threads(_stat, paths)


def same(paths: Sequence[Path], found: Sequence[Stat | None] | None = None) -> list[int]:
    """A number for every file, the same for two files that hold the same bytes; `found` is what `stats` says of them.

    Only files of one size can be equal, so few are opened, and of these only the ends are read unless they are equal
    too. Empty files and files that cannot be read are equal to themselves alone.
    """
    found = stats(paths) if found is None else found
    numbers = list(range(len(paths)))
    first: dict[Stat, int] = {}
    for i, stat in enumerate(found):
        if stat is not None:
            numbers[i] = first.setdefault(stat, i)  # one file under several names
    sizes = {i: stat.size for stat, i in first.items()}
    candidates = _alike(sizes, lambda i: (sizes[i],) if sizes[i] else None)
    candidates = _alike(candidates, lambda i: _digest(paths[i], sizes[i], _TAIL))
    equal: dict[int, int] = {}
    for whole in _groups(candidates, lambda i: _digest(paths[i], sizes[i], sizes[i])):
        equal.update(dict.fromkeys(whole, whole[0]))
    return [equal.get(number, number) for number in numbers]


def _alike(indices: Iterable[int], key: Callable[[int], Hashable]) -> list[int]:
    """Those indices whose key another has too."""
    return sorted(itertools.chain.from_iterable(_groups(list(indices), key)))


def _groups(indices: Sequence[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for i, own in zip(indices, _in_threads(key, indices), strict=True):
        if own is not None:
            groups[own].append(i)
    return [group for group in groups.values() if len(group) > 1]


def _stat(path: Path) -> Stat | None:
    try:
        found = path.stat()
    except (OSError, ValueError):  # a name with a NUL is a ValueError
        return None
    return Stat(found.st_dev, found.st_ino, found.st_size) if S_ISREG(found.st_mode) else None


def _digest(path: Path, size: int, last: int) -> tuple[int, bytes] | None:
    """The size and a digest of the last bytes of a file; None if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, size - last))
            return size, hashlib.sha256(file.read()).digest()
    except OSError:
        return None


def _in_threads(answer: Callable[[Item], Answer], items: Sequence[Item]) -> list[Answer]:
    """The answer for every item, in order."""
    if len(items) <= _BLOCK:
        return [answer(item) for item in items]
    blocks = [items[start : start + _BLOCK] for start in range(0, len(items), _BLOCK)]
    with ThreadPoolExecutor(_THREADS) as pool:
        return [own for block in pool.map(lambda block: [answer(item) for item in block], blocks) for own in block]
