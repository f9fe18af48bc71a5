"""Which columns of a table hold the images, the captions and the categories."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from ssl_kernels.trainers.errors import UserError

# In this order, and without regard to case, spaces, hyphens and underscores.
IMAGE = (
    "image", "images", "filepath", "file_name", "image_path", "image_file", "image_file_path", "image_name",
    "img_path", "img", "photo", "picture", "path", "file",
)  # fmt: skip
CAPTION = (
    "caption", "captions", "title", "text", "txt", "description", "sentence", "sentences", "prompt", "alt_text", "alt",
    "comment",
)  # fmt: skip
CATEGORY = ("category",)


class Columns(NamedTuple):
    """The names of a table's columns as the table spells them."""

    image: str
    caption: str
    category: str | None


def normal(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


_KNOWN = {normal(name) for name in (*IMAGE, *CAPTION, *CATEGORY)}


def is_known(name: str) -> bool:
    """Whether a table's first line with this cell may be its header."""
    return normal(name) in _KNOWN


def find(names: Sequence[str], image: str, caption: str, where: str) -> Columns:
    """The columns of a table with these column names; `image` and `caption`, where given, decide."""
    own = {normal(name): name for name in reversed(names)}  # of two with one name the first
    categories = (own[normal(name)] for name in CATEGORY if normal(name) in own)
    return Columns(
        _find(own, names, image, IMAGE, "image", where),
        _find(own, names, caption, CAPTION, "caption", where),
        next(categories, None),
    )


def _find(
    own: dict[str, str], names: Sequence[str], asked: str, usual: Sequence[str], what: str, where: str
) -> str:  # fmt: skip
    if asked and asked in names:
        return asked
    for name in [asked] if asked else usual:
        if normal(name) in own:
            return own[normal(name)]
    expected = repr(asked) if asked else f"of {what}s, such as {', '.join(map(repr, usual[:4]))}"
    raise UserError(
        f"{where} has no column {expected}; it has {', '.join(map(repr, names)) or 'none'}"
        f" (--image-column and --caption-column choose)"
    )
