"""The members of a tar file or stream, one after the other, and whether it ended as it should."""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager
from typing import IO, Any

import webdataset as wds


class CutShortError(Exception):
    """A tar file ends, or turns into something else, before its end; the message says how."""


def members(shard: str, endings: Collection[str]) -> Iterator[tuple[str, str, bytes]]:
    """Names up to the first dot after the last slash, endings in lower case, and contents.

    Of members whose ending is, or ends in, one of `endings`. Raises `CutShortError` where the file ends too early.
    """
    tar: Any = None
    try:
        with _open(shard) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
            for member in tar:
                tar.members = []  # else all of them stay in memory
                folder, slash, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                ending = ending.lower()
                is_read = member.isreg() and (ending in endings or ending.rpartition(".")[2] in endings)
                if is_read and stem and not stem.startswith("__"):  # which webdataset keeps for itself
                    yield folder + slash + stem, ending, tar.extractfile(member).read()
            if not tar.has_ended:
                raise CutShortError("that is cut short")
    except tarfile.TarError as error:
        if tar is not None:
            raise CutShortError("that is cut short") from None
        raise CutShortError("that is empty" if "empty" in str(error) else "that is no tar file") from None
    except (EOFError, zlib.error):
        raise CutShortError("that is cut short") from None
    except OSError as error:
        status = re.search(r"exit (-?\d+)", str(error))  # webdataset's words about a program
        reason = f"its command failed with status {status[1]}" if status else error.strerror or type(error).__name__
        raise CutShortError(f"that cannot be read ({reason})") from None


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
