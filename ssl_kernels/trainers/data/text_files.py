"""Text in any encoding, perhaps gzipped, and errors in reading it as one line for the user."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TextIO

from ssl_kernels.trainers.data.faults import place
from ssl_kernels.trainers.errors import UserError, first_line

_MARKS = {  # the longer ones first: that of UTF-32 begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_GZIP = b"\x1f\x8b"


def check_encoding(name: str) -> None:
    """Refuse a value of --encoding that Python does not know."""
    try:
        "".encode(name)
    except LookupError:
        raise UserError(f"--encoding: expected an encoding that Python knows, such as latin-1, got {name!r}") from None


@contextlib.contextmanager
def told(path: Path, flag: str) -> Iterator[None]:
    """Errors in opening or reading a table become one line that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        where, byte = _undecodable(path, error)
        what = f"{where} is not {error.encoding.upper()} (it has the byte 0x{byte:02x})"
        raise UserError(
            f"{flag}: cannot read {place(path)}: {what};"
            " --encoding names another encoding, such as latin-1, which files of older Windows and Excel have"
        ) from None
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{flag}: cannot read {place(path)}: {first_line(error)}") from None


def _undecodable(path: Path, error: UnicodeDecodeError) -> tuple[str, int]:
    """The first line that is not in the encoding that failed, and its first byte that is not."""
    if error.encoding.startswith(("utf-16", "utf-32")):
        return "it", error.object[error.start]
    for number, line in enumerate(re.split(rb"\r\n|\r|\n", _bytes(path).read()), 1):
        try:
            line.decode(error.encoding)
        except UnicodeDecodeError as own:
            return f"line {number}", line[own.start]
    return "its last line", error.object[error.start]


def _bytes(path: Path) -> IO[bytes]:
    with open(path, "rb") as file:
        zipped = file.read(2) == _GZIP
    return gzip.open(path) if zipped else open(path, "rb")  # type: ignore[return-value]


def open_text(path: Path, encoding: str) -> TextIO:
    """The text of a file, whose line ends are left as they are."""
    file = _bytes(path)
    head = file.read(256)
    file.seek(0)
    marked = next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)
    for first, name in ((1, "utf-16-le"), (0, "utf-16-be")):  # such text has a NUL in every second place
        if marked is None and head[first::2].count(0) > len(head) / 4:
            marked = name
    return io.TextIOWrapper(file, encoding=marked or encoding, newline="")
