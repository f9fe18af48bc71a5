"""Real data: a CSV, TSV or JSONL file of image paths and captions."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

from ssl_kernels.trainers.data.pairs import Fingerprints, ImageTextPairs, link
from ssl_kernels.trainers.errors import UserError

SUFFIXES = (".csv", ".tsv", ".jsonl")
MOST_HELD_OUT = 5_000  # evaluation compares every held-out image with every held-out caption


def read_table(path: Path, image_column: str, caption_column: str, flag: str = "--data") -> ImageTextPairs:
    """The pairs of a table; image paths are relative to it. A column `category`, if there, labels them."""
    images: list[Path] = []
    captions: list[str] = []
    categories: list[str] = []
    for line, row in _rows(path, flag):
        for column in (image_column, caption_column):
            if column not in row:
                raise UserError(
                    f"{flag}: {path}:{line} has no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}"
                    f" (--image-column and --caption-column choose)"
                )
            if not str(row[column] or "").strip():
                raise UserError(f"{flag}: {path}:{line}: the column {column!r} is empty")
        image = path.parent / str(row[image_column]).strip()
        if not image.is_file():
            raise UserError(f"{flag}: {path}:{line}: no such image: {image}")
        images.append(image)
        captions.append(str(row[caption_column]).strip())
        categories.append(str(row.get("category") or "").strip())
    if not images:
        raise UserError(f"{flag}: {path} holds no pairs")
    return ImageTextPairs(images, captions, categories if any(categories) else None)


def _rows(path: Path, flag: str) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix == ".jsonl":
                for line, text in enumerate(file, 1):
                    if text.strip():
                        row = json.loads(text)
                        if not isinstance(row, dict):
                            raise UserError(f"{flag}: {path}:{line}: expected a JSON object, got {text.strip()[:40]!r}")
                        yield line, row
            else:
                plain = path.suffix == ".tsv"  # tabs separate, and a quotation mark is a letter like any other
                reader = csv.DictReader(
                    file, delimiter="\t" if plain else ",", quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL
                )
                for row in reader:
                    if None in row:
                        raise UserError(
                            f"{flag}: {path}:{reader.line_num} has more fields than the header; a caption with a comma"
                            " needs quotation marks"
                        )
                    yield reader.line_num, row
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{flag}: cannot read {path}: {error}") from None


def groups(pairs: ImageTextPairs) -> list[int]:
    """A number for every pair, the same for two pairs that share a caption or an image (path or file content)."""
    return link(pairs.captions, _contents(pairs))


def _contents(pairs: ImageTextPairs) -> list[Hashable]:
    """Something equal for equal image files. Only files of one size can be equal, so few are read."""
    paths = [path.resolve() for path in _paths(pairs)]
    by_size: dict[int, set[Path]] = defaultdict(set)
    for path in paths:
        by_size[path.stat().st_size].add(path)
    digests = {
        path: hashlib.sha256(path.read_bytes()).digest() for same in by_size.values() if len(same) > 1 for path in same
    }
    return [digests.get(path, path) for path in paths]


def split(pairs: ImageTextPairs, share: float, seed: int) -> tuple[ImageTextPairs, ImageTextPairs]:
    """Hold out a share of the pairs' groups, so that no held-out image or caption occurs in training.

    Groups are drawn by a hash of their first caption and the seed. One pair of each held-out group is kept: a gallery
    with two captions of one image would call a right answer wrong.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups(pairs)):
        members[group].append(index)

    def drawn(group: int) -> bytes:
        return hashlib.sha256(f"{seed}:{pairs.captions[members[group][0]]}".encode()).digest()

    chosen = set(sorted(members, key=drawn)[: min(round(share * len(members)), MOST_HELD_OUT)])
    train = [i for group, own in members.items() if group not in chosen for i in own]
    return pairs.select(sorted(train)), pairs.select(sorted(members[group][0] for group in chosen))


def one_per_group(pairs: ImageTextPairs) -> ImageTextPairs:
    """The first pair of each group, for a gallery in which an answer is right or wrong."""
    first: dict[int, int] = {}
    for index, group in enumerate(groups(pairs)):
        first.setdefault(group, index)
    return pairs.select(sorted(first.values()))


def fingerprints(pairs: ImageTextPairs) -> Fingerprints:
    """What marks the pairs of a held-out table."""
    marks = Fingerprints()
    for caption, image in zip(pairs.captions, _paths(pairs), strict=True):
        marks.add(caption, image.read_bytes())
    return marks


def without(pairs: ImageTextPairs, held_out: Fingerprints) -> ImageTextPairs:
    """The pairs that share neither a caption nor an image with the held-out ones."""
    paths = _paths(pairs)
    return pairs.select([i for i, path in enumerate(paths) if not held_out.match(pairs.captions[i], path)])


def _paths(pairs: ImageTextPairs) -> list[Path]:
    assert isinstance(pairs.images, list)
    return pairs.images
