"""The samples in WebDataset shards: tar files in which the members of a sample have one name and different endings.

The name ends at the first dot after the last slash. A sample has an image of any ending in `images.SUFFIXES` and a
caption: the first that is not empty of its members `.txt`, `.text`, `.caption`, `.json` (its "caption") and `.cls`.
Members of a sample need not follow each other; where they do not, what is still incomplete waits in memory.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import IO, Any, NamedTuple

import webdataset as wds

from ssl_kernels.trainers.data.faults import TRAINING, Fault, place
from ssl_kernels.trainers.data.images import SUFFIXES
from ssl_kernels.trainers.errors import UserError

ENDINGS = (".tar", ".tgz", ".tar.gz")
CAPTIONS = ("txt", "text", "caption", "json", "cls")
_IMAGES = {suffix[1:] for suffix in SUFFIXES}
_SCHEMES = ("http://", "https://", "gs://", "hf://")  # that webdataset opens by programs such as curl


class Sample(NamedTuple):
    image: bytes  # encoded
    caption: str
    where: str  # the shard and the name in it


class _CutShortError(Exception):
    """The shard ends, or turns into something else, before its end; the message says how."""


def is_shards(name: str) -> bool:
    """Whether the name is one of shards: of files, by a pattern; of a folder that has some; or of a stream."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return bool(_in_folder(path))
    is_url = "://" in name and any(ending in name.lower() for ending in ENDINGS)
    return name.startswith("pipe:") or is_url or name.lower().endswith(ENDINGS)


def _in_folder(path: str) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(e.path for e in entries if e.name.lower().endswith(ENDINGS) and not e.name.startswith("."))


def expand(name: str, flag: str = "--data") -> list[str]:
    """The shards of a folder, a glob or a pattern such as "shards-{000..099}.tar"; local ones must exist."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return _in_folder(path)
    try:
        every = [name] if name.startswith("pipe:") else wds.shardlists.expand_urls(path)
    except ValueError as error:  # braces that do not close
        raise UserError(f"{flag}: {name}: {error}") from None
    names: list[str] = []
    for each in every:
        if each.startswith(("pipe:", *_SCHEMES)):
            names.append(each)
        elif "://" in each:
            raise UserError(
                f"{flag}: cannot read {each}: expected a file, one of {', '.join(_SCHEMES)}, or pipe:COMMAND,"
                " such as pipe:aws s3 cp s3://bucket/0.tar -"
            )
        else:
            names += _files(each, flag)
    return names


def _files(name: str, flag: str) -> list[str]:
    found = [name] if os.path.lexists(name) else sorted(glob.glob(name))
    if not found and glob.has_magic(name):
        raise UserError(f"{flag}: no shard is named like {name}")
    for each in found or [name]:
        try:
            open(each, "rb").close()
        except OSError as error:
            raise UserError(f"{flag}: cannot read the shard {place(each)}: {error.strerror}") from None
    return found


def samples(
    shard: str, found: list[Fault], *, of: str = TRAINING, expected: int | None = None, encoding: str = "utf-8"
) -> Iterator[Sample]:
    """The samples of a shard in their order; `found` is told of those that are incomplete and of a shard cut short.

    A shard of which a part is lost is the last of these, and counts as the samples that are missing to the number that
    is `expected` of it; as 0 if that is not known. Captions, but for JSON, are in `encoding`.
    """
    waiting: dict[str, dict[str, bytes]] = {}
    given: set[str] = set()
    last, reason = "", ""
    try:
        for key, ending, content in _members(shard):
            if key != last and last in waiting:
                yield from _complete(shard, last, waiting, given, found, of, encoding)
            last = key
            if key not in given:
                waiting.setdefault(key, {}).setdefault(ending, content)
            elif ending in _IMAGES:
                found.append(Fault(f"{place(shard)}:{place(key)} again", "with the name of another", 1, of))
    except _CutShortError as error:
        reason = str(error)
    if last in waiting:
        yield from _complete(shard, last, waiting, given, found, of, encoding)
    if reason:
        waiting.pop(last, None)  # cut in two
    for key, members in waiting.items():
        missing = "caption" if _IMAGES & members.keys() else "image"
        found.append(Fault(f"{place(shard)}:{place(key)}", f"without {missing}", 1, of))
    if reason:
        where = f"{place(shard)} after {len(given):,} samples" if given else place(shard)
        found.append(Fault(where, reason, 0 if expected is None else max(1, expected - len(given)), of))


class Losses:
    """What is left out of several shards that are read for the first time, when it is not known how long they are."""

    def __init__(self) -> None:
        self.whole: list[int] = []  # samples
        self.cut: list[tuple[Fault, int]] = []

    def of(self, found: list[Fault], count: int) -> list[Fault]:
        """What was found in a shard that had `count` samples, but for the loss of a part of it."""
        if not found or found[-1].lost:
            self.whole.append(count)
            return found
        self.cut.append((found[-1], count))
        return found[:-1]

    @property
    def expected(self) -> int:
        """Samples of a shard."""
        return round(sum(self.whole) / max(1, len(self.whole)))

    def of_parts(self) -> list[Fault]:
        """The shards of which a part is lost, each with the samples that are missing to the others' mean."""
        return [fault._replace(lost=max(1, self.expected - count)) for fault, count in self.cut]


def _complete(
    shard: str, key: str, waiting: dict[str, dict[str, bytes]], given: set[str], found: list[Fault], of: str,
    encoding: str,
) -> Iterator[Sample]:  # fmt: skip
    """The sample of this name, unless something of it is missing that may come."""
    members = waiting[key]
    image = next((members[ending] for ending in members if ending in _IMAGES), None)
    where = f"{place(shard)}:{place(key)}"
    try:
        caption = _caption(members, encoding)
    except UnicodeDecodeError:
        caption, fault = "", f"with a caption that is not {encoding.upper()}"
    except ValueError:
        caption, fault = "", "with a .json that is none"
    else:
        fault = ""
    if fault or image == b"":
        found.append(Fault(where, fault or "with an empty image", 1, of))
    elif image is None or not caption:
        return
    else:
        yield Sample(image, caption, where)
    given.add(key)
    del waiting[key]


def _caption(members: dict[str, bytes], encoding: str) -> str:
    for ending in CAPTIONS:
        text = members.get(ending, b"").decode(encoding if ending != "json" else "utf-8").removeprefix("\ufeff")
        if ending == "json" and text.strip():
            text = _text_in(json.loads(text))
        if text.strip():
            return text.strip()
    return ""


def _text_in(content: Any) -> str:
    """The caption in a .json; the first of several."""
    caption = content.get("caption") if isinstance(content, dict) else None
    if isinstance(caption, list) and caption:
        caption = caption[0]
    return caption if isinstance(caption, str) else ""


def _members(shard: str) -> Iterator[tuple[str, str, bytes]]:
    """Names, endings and contents of images and captions. Raises `_CutShortError` where the shard ends too early."""
    tar: Any = None
    try:
        with _open(shard) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
            for member in tar:
                tar.members = []  # else all of them stay in memory
                folder, slash, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                ending = ending.lower()
                is_read = member.isreg() and bool({ending, ending.rpartition(".")[2]} & _READ)
                if not is_read or not stem or stem.startswith("__"):  # what webdataset keeps for itself
                    continue
                content = tar.extractfile(member)
                yield folder + slash + stem, ending, content.read()
            if not tar.has_ended:
                raise _CutShortError("lost from a shard that is cut short")
    except tarfile.TarError as error:
        if tar is None:
            raise _CutShortError("lost from a shard that is empty" if "empty" in str(error) else _NO_TAR) from None
        raise _CutShortError("lost from a shard that is cut short") from None
    except (EOFError, zlib.error):
        raise _CutShortError("lost from a shard that is cut short") from None
    except OSError as error:
        status = re.search(r"exit (-?\d+)", str(error))  # webdataset's words about a program
        reason = f"its command failed with status {status[1]}" if status else error.strerror or type(error).__name__
        raise _CutShortError(f"lost from a shard that cannot be read ({reason})") from None


_NO_TAR = "lost from a shard that is no tar file"
_READ = _IMAGES | set(CAPTIONS)


def _open(shard: str) -> AbstractContextManager[IO[bytes]]:
    if shard.startswith("pipe:") or "://" in shard:
        stream: AbstractContextManager[IO[bytes]] = wds.gopen(shard)
        return stream
    return open(shard, "rb")


class _Header(tarfile.TarInfo):
    """A member's header that tells the archive whether it ended as it should: tarfile takes any end for the end."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> _Header:
        tar.has_ended = False
        try:
            return super().fromtarfile(tar)
        except tarfile.TarError as error:
            tar.has_ended = type(error).__name__ == "EOFHeaderError"  # a block of zeros
            raise
