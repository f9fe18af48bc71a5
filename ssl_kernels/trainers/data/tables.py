"""Tables as people have them. What a file holds says how it is read, never the ending of its name.

Text is UTF-8 with or without a mark at its start, UTF-16 or UTF-32 with one, or what `--encoding` says; gzip may wrap
it. Its rows are separated cells under a header, JSON objects a line each, or a JSON list of them. Parquet is read too.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from ssl_kernels.trainers.data import delimited, text_files
from ssl_kernels.trainers.data.faults import place
from ssl_kernels.trainers.errors import UserError

SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet")  # told to the user, never asked for

_NOT_TABLES = {
    b"PK\x03\x04": "an Excel workbook or a zip archive; save the table as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save the table as CSV",
    b"BZh": "compressed by bzip2; compress it by gzip or not at all",
    b"\xfd7zXZ": "compressed by xz; compress it by gzip or not at all",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; compress it by gzip or not at all",
}
STRAY_MARK, NUL = (
    "with a quotation mark that nothing closes, read as a letter",
    "with NUL characters, read without them",
)
_PEEKED = 100  # JSON objects, whose keys together are the columns


class Row(NamedTuple):
    """A row as it stands in a table: where, its cells by the names of their columns, and what is odd about it."""

    number: int
    cells: dict[str, Any]
    fault: str = ""  # why the row cannot be used
    oddity: str = ""  # what had to be guessed, or left out of it


@dataclass
class Table:
    """The rows of a table, the names of its columns, and in words how it was read and what numbers its rows."""

    columns: list[str]
    rows: Iterator[Row]
    kind: str
    unit: str = "line"


def read(
    path: Path, flag: str, *, encoding: str, is_column: Callable[[str], bool], is_image: Callable[[str], bool]
) -> Table:  # fmt: skip
    """The table in a file.

    `is_column` knows the names of columns and `is_image` those of files that are there: they tell a header from a row,
    and a row from a line of text within one.
    """
    with text_files.told(path, flag):
        with open(path, "rb") as file:
            head = file.read(8)
        for magic, what in _NOT_TABLES.items():
            if head.startswith(magic):
                raise UserError(f"{flag}: {place(path)} is {what}")
        if head.startswith(b"PAR1"):
            table = _parquet(path)
        else:
            text = text_files.open_text(path, encoding)
            table = _text(text, is_column, is_image)
            table.kind += f" in {text.encoding.removesuffix('-sig').upper()}"
    table.rows = _guarded(table.rows, path, flag)
    return table


def _guarded(rows: Iterator[Row], path: Path, flag: str) -> Iterator[Row]:
    with text_files.told(path, flag):
        yield from rows


def _text(text: TextIO, is_column: Callable[[str], bool], is_image: Callable[[str], bool]) -> Table:
    start = text.read(4096).lstrip()
    text.seek(0)
    if start.startswith("["):
        return _objects("a JSON list", (Row(n, *_object(value)) for n, value in enumerate(json.load(text), 1)), "row")
    if start.startswith("{"):
        return _objects("JSON lines", _json_lines(text), "line")
    return _delimited(text, is_column, is_image)


def _json_lines(text: TextIO) -> Iterator[Row]:
    for number, line in enumerate(text, 1):  # a file's lines end at \n, \r or both; U+2028 is a letter like any other
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                yield Row(number, {}, f"it is not JSON ({error.msg})")
            else:
                yield Row(number, *_object(value))


def _object(value: Any) -> tuple[dict[str, Any], str]:
    """The cells of a row in JSON, and why they are none."""
    if isinstance(value, dict):
        return value, ""
    return {}, f"expected a JSON object, got {json.dumps(value)[:40]}"


def _objects(kind: str, rows: Iterator[Row], unit: str) -> Table:
    """The table of rows that bring the names of their columns with them."""
    first = list(itertools.islice(rows, _PEEKED))
    columns = list(dict.fromkeys(name for row in first for name in row.cells))
    if first and not columns:
        raise ValueError(f"{unit} {first[0].number}: {first[0].fault}")
    return Table(columns, itertools.chain(first, rows), kind, unit)


def _delimited(text: TextIO, is_column: Callable[[str], bool], is_image: Callable[[str], bool]) -> Table:
    def is_cell(name: str) -> bool:
        return is_column(name) or is_image(name)

    blank = list(itertools.takewhile(lambda line: not line.strip(" \t\r\n"), iter(text.readline, "")))
    text.seek(0)
    header = next(itertools.islice(text, len(blank), None), "").replace("\0", "")
    text.seek(0)
    separator = delimited.separator_of(header, is_cell)
    odd: set[str] = set()  # what is odd about the lines since the last row

    def lines() -> Iterator[str]:
        for line in text:
            if "\0" in line:
                odd.add(NUL)
            yield line.replace("\0", "")

    def is_row(cells: list[str]) -> bool:
        return len(cells) == len(columns) and any(map(is_image, cells))

    columns: list[str] = []
    read = delimited.read(lines(), separator, is_row)
    first = next(read, delimited.Cells(1, []))
    columns += [name.strip() for name in first.cells]
    kind = f"{delimited.SEPARATORS[separator]} between cells"
    held: Iterator[delimited.Cells] = read
    if len(columns) == 2 and not any(map(is_column, columns)) and is_image(columns[0]) != is_image(columns[1]):
        held = itertools.chain([first], read)
        columns[:] = ["image", "caption"] if is_image(columns[0]) else ["caption", "image"]
        kind += " and no header"

    def rows() -> Iterator[Row]:
        for line, cells, stray in held:
            if stray and separator != "\t":  # where tabs separate, such a mark is mostly meant as a letter
                odd.add(STRAY_MARK)
            oddity = "; ".join(sorted(odd))
            odd.clear()
            if len(cells) < len(columns) or any(map(str.strip, cells[len(columns) :])):
                yield Row(line, {}, f"it has {len(cells)} cells, and the header {len(columns)}", oddity)
            else:
                yield Row(line, dict(zip(reversed(columns), reversed(cells[: len(columns)]), strict=True)), "", oddity)

    return Table(columns, rows(), kind)


def _parquet(path: Path) -> Table:
    try:
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{place(path)}: Parquet needs the package pyarrow; install: pip install pyarrow") from None

    file = parquet.ParquetFile(path)

    def rows() -> Iterator[Row]:
        with file:
            number = itertools.count(1)
            for batch in file.iter_batches():
                for cells in batch.to_pylist():
                    yield Row(next(number), cells)

    return Table(list(file.schema_arrow.names), rows(), "Parquet", "row")
