"""The pairs of a table: images on disk, each with one caption or several."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssl_kernels.trainers.data import columns, contents, tables
from ssl_kernels.trainers.data.cells import captions_of, image_path, text_of
from ssl_kernels.trainers.data.faults import TRAINING, Faults, place
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.pairs import ImageTextPairs
from ssl_kernels.trainers.errors import UserError

NO_CAPTION, NO_IMAGE, ABSENT, BROKEN = "without caption", "without image", "with a missing file", "broken"

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # of a folder, as Hugging Face's datasets has them

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def metadata(folder: Path) -> list[Path]:
    """The tables in a folder that say what its images are."""
    return [folder / name for name in METADATA if (folder / name).is_file()]


def table_path(name: str, flag: str) -> Path:
    """The table of this name, or in the folder of this name."""
    path = Path(os.path.expanduser(name))
    if path.is_file():
        return path
    if not path.is_dir():
        if path.suffix.lower() in (*tables.SUFFIXES, ".gz"):
            raise UserError(f"{flag}: no such file: {place(path)}")
        kinds = f"a table ({', '.join(tables.SUFFIXES)}), a folder with {METADATA[0]}, or .tar shards"
        raise UserError(f"{flag}: expected openmoji, {kinds}, got {name!r}")
    own = metadata(path)
    if len(own) == 1:
        return own[0]
    if own:
        names = ", ".join(each.name for each in own)
        raise UserError(f"{flag}: expected one table in {place(path)}, got {names}; name one")
    parts = sorted({table.parent.name for each in METADATA for table in path.glob(f"*/{each}")})
    if parts:
        named = f"{', '.join(map(place, parts))}; name one, such as {place(path / parts[-1])}"
        raise UserError(f"{flag}: {place(path)} has tables in {named}")
    others = sorted(each.name for each in path.iterdir() if each.suffix.lower() in tables.SUFFIXES)
    raise UserError(
        f"{flag}: {place(path)} is a folder without {METADATA[0]} or other metadata, and without shards"
        + (f"; it holds {', '.join(map(place, others[:5]))}, which can be named" if others else "")
    )


class _Pair(NamedTuple):
    where: str
    image: Path
    captions: list[str]
    category: str


def read_table(
    path: Path, image_column: str = "", caption_column: str = "", flag: str = "--data", *, encoding: str = "utf-8",
    faults: Faults | None = None, of: str = TRAINING, found: Found | None = None,
) -> ImageTextPairs:  # fmt: skip
    """The pairs of a table; image paths are relative to it. A column `category`, if there, labels them.

    Columns that are not named are found by their usual names. Rows that cannot be used are added to `faults` as
    examples `of` training or evaluation; without `faults` the first of them is an error. `found` is told what the table
    holds.
    """
    faults = Faults(stop=True) if faults is None else faults
    found = Found(place(path)) if found is None else found
    folder = Path(os.path.abspath(path.parent))
    named = {columns.normal(name) for name in (image_column, caption_column) if name}
    table = tables.read(
        path, flag, encoding=encoding,
        is_column=lambda name: columns.is_known(name) or columns.normal(name) in named,
        is_image=lambda name: os.path.isfile(image_path(folder, name)),
    )  # fmt: skip
    own = columns.find(table.columns, image_column, caption_column, f"{flag}: {place(path)}") if table.columns else None
    drafts, seen = [], 0
    before = place(path) + (":" if table.unit == "line" else f", {table.unit} ")
    for row in table.rows:
        seen += 1
        where = f"{before}{row.number}"
        if row.oddity:
            found.odd(row.oddity, where)
        assert own is not None  # a table with rows has columns
        draft = _pair(row, own, folder, where, flag)
        if isinstance(draft, str):
            faults.add(draft, f"{where} ({row.fault})" if row.fault else where, of=of)
        else:
            drafts.append(draft)
    stats = contents.stats([draft.image for draft in drafts])
    if drafts and not any(stats) and os.path.isfile(name := os.path.relpath(drafts[0].image, folder)):
        raise UserError(
            f"{flag}: {place(path)}: expected paths relative to the table's folder, got {name!r}, which is there"
            " relative to the working directory; move the table there"
        )
    for pair, stat in zip(drafts, stats, strict=True):
        if stat is None:
            faults.add(ABSENT, f"{pair.where} ({place(pair.image)})", of=of)
    faults.check(seen, of)
    there = [(pair, stat) for pair, stat in zip(drafts, stats, strict=True) if stat is not None]
    if not there:
        reasons = "; ".join(faults.lines(of))
        raise UserError(f"{flag}: {place(path)} holds no pairs" + (f" that can be used: {reasons}" if reasons else ""))
    pairs = _collect([pair for pair, _ in there], [stat for _, stat in there])
    _tell(found, pairs, table, own)
    return pairs


def _pair(row: tables.Row, own: columns.Columns, folder: Path, where: str, flag: str) -> _Pair | str:
    """What a row says, or why it cannot be used."""
    if row.fault:
        return BROKEN
    name, captions = row.cells.get(own.image), captions_of(row.cells.get(own.caption))
    if isinstance(name, dict | bytes):
        raise UserError(f"{flag}: {where}: expected a path in the column {own.image!r}, got {str(name)[:40]}")
    name = text_of(name)
    if not name:
        return NO_IMAGE
    if _URL.match(name) and not name.lower().startswith("file://"):
        raise UserError(
            f"{flag}: {where}: expected the path of an image, got the URL {name[:80]!r}; download the images first, or"
            " name another column by --image-column"
        )
    if not captions:
        return NO_CAPTION
    category = "" if own.category is None else text_of(row.cells.get(own.category))
    return _Pair(where, image_path(folder, name), captions, category)


def _collect(pairs: list[_Pair], stats: Sequence[contents.Stat | None]) -> ImageTextPairs:
    images = [pair.image for pair in pairs]
    several = any(len(pair.captions) > 1 for pair in pairs)
    return ImageTextPairs(
        images,
        [pair.captions[0] for pair in pairs],
        [pair.category for pair in pairs] if any(pair.category for pair in pairs) else None,
        others=[tuple(pair.captions[1:]) for pair in pairs] if several else None,
        contents=contents.same(images, stats),
    )


def _tell(found: Found, pairs: ImageTextPairs, table: tables.Table, own: columns.Columns | None) -> None:
    captions = {*pairs.captions, *(caption for others in pairs.others or [] for caption in others)}
    found.holds.update(pairs=len(pairs), images=len(set(pairs.contents or [])), captions=len(captions))
    if pairs.categories:
        found.holds["categories"] = len({category for category in pairs.categories if category})
    assert own is not None
    found.remarks.append(f"{table.kind}; images from the column {own.image!r}, captions from {own.caption!r}")
    found.tell_of_several_captions(sum(map(bool, pairs.others or [])))
