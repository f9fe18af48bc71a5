"""Which pairs are no negatives of each other, or not to be trained on: those that share a caption or an image."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ssl_kernels.distributed import gather_rows
from ssl_kernels.trainers.processes import own_share


def link(*keys: Sequence[Hashable]) -> list[int]:
    """Number items so that two that share any key, directly or through others, get one number: [n] from k lists [n]."""
    parent = list(range(len(keys[0])))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for column in keys:
        first: dict[Hashable, int] = {}
        for i, key in enumerate(column):
            parent[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(parent))]


class Fingerprints:
    """What marks held-out pairs, so that training data can be searched for them: captions and image contents."""

    def __init__(self) -> None:
        self.captions: set[str] = set()
        self.digests: set[bytes] = set()
        self.sizes: set[int] = set()

    def add(self, captions: Iterable[str], image: bytes) -> None:
        self.captions.update(captions)
        self.digests.add(hashlib.sha256(image).digest())
        self.sizes.add(len(image))

    def match(self, captions: Iterable[str], image: bytes | Path) -> bool:
        """Whether one of these captions, or this image, is held out. A file is read only if its size allows it."""
        if not self.captions.isdisjoint(captions):
            return True
        try:
            size = image.stat().st_size if isinstance(image, Path) else len(image)
            content = b"" if size not in self.sizes else image.read_bytes() if isinstance(image, Path) else image
        except OSError:  # whoever decodes the image will say so
            return False
        return size in self.sizes and hashlib.sha256(content).digest() in self.digests


def shared_ids(*keys: Sequence[Hashable]) -> Tensor | None:
    """Numbers [n] of n items that `link` has given, None if no two share any."""
    ids = link(*keys)
    return torch.tensor(ids) if len(set(ids)) < len(ids) else None


def keys_of(captions: Sequence[str], sources: Sequence[Hashable]) -> Tensor:
    """Keys [n, 2] of captions and images: a process that knows its part of a batch alone can compare them."""
    return torch.tensor([[_key(caption), _key(source)] for caption, source in zip(captions, sources, strict=True)])


def _key(name: Hashable) -> int:
    content = name if isinstance(name, bytes) else str(name).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def ids_of_keys(keys: Tensor) -> Tensor | None:
    """Of this process's part of a batch whose captions and images have these keys [n, 2]; None where nobody has any."""
    everyones = gather_rows(keys)
    ids = shared_ids(*everyones.t().tolist())
    return None if ids is None else ids[own_share().of(len(ids))].to(keys.device)
