"""What tells whether data is what it was, wherever it lies now."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def digest(texts: Iterable[str]) -> str:
    """Of texts in their order, which may be names that are not UTF-8."""
    return hashlib.sha256("\0".join(texts).encode(errors="surrogatepass")).hexdigest()


def names_within(files: Sequence[Path | str]) -> list[str]:
    """The names of files relative to the folder that all are in: the same for a copy of that folder elsewhere."""
    paths = [os.fspath(file) for file in files]
    if len({os.path.isabs(path) for path in paths}) > 1:
        paths = [os.path.abspath(path) for path in paths]
    common = os.path.commonprefix([min(paths, default=""), max(paths, default="")])  # noqa: RUF071 (cut below)
    start = common.rfind("/") + 1
    return [path[start:] for path in paths]


def of_pairs(captions: Sequence[str], images: object) -> str:
    """Of captions and of the files of their images, if these are files."""
    return digest([*captions, *names_within(images if isinstance(images, list) else [])])
