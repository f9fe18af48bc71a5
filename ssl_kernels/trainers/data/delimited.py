"""Rows of text whose cells a character separates, quoted by the rules of CSV where they keep to them.

A quotation mark that no other closes would swallow the rows that follow it. It is found in three ways: the text after
the next mark breaks the rules, the row grows beyond `MOST_LINES`, or one of the lines that it takes up is a whole row
by itself. Such a mark is read as a letter then, and the row says so.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
MOST_LINES = 1000  # of one row, whose cells may hold line breaks

_QUOTED = re.compile(r'\s*"((?:[^"]|"")*)"\s*')


class Cells(NamedTuple):
    """A row: the number of its first line, its cells, and whether a quotation mark in it had to be read as a letter."""

    line: int
    cells: list[str]
    stray_mark: bool = False


def separator_of(header: str, is_known: Callable[[str], bool]) -> str:
    """The separator between the cells of a first line: the one that leaves most cells known, then the most cells."""

    def score(separator: str) -> tuple[int, int]:
        cells = split(header, separator)
        return sum(map(is_known, cells)), len(cells)

    return max(SEPARATORS, key=score)


def split(line: str, separator: str) -> list[str]:
    """The cells of one line; a quotation mark counts only where it opens a cell and another closes it."""
    try:
        return next(_reader(iter([line]), separator), [])
    except csv.Error:
        cells = line.rstrip("\r\n").split(separator)
        return [match[1].replace('""', '"') if (match := _QUOTED.fullmatch(cell)) else cell for cell in cells]


def read(lines: Iterable[str], separator: str, is_row: Callable[[list[str]], bool]) -> Iterator[Cells]:
    """The rows of lines that keep their ends; blank lines are none. `is_row` knows the cells of a line that is one."""
    csv.field_size_limit(2**31 - 1)  # what one row may hold is limited by its lines
    source = _Lines(lines)
    reader = _reader(source, separator)
    while True:
        source.taken.clear()
        first = source.number + 1
        try:
            cells = next(reader)
            stray = any(is_row(split(line, separator)) for line in source.taken[1:])
        except StopIteration:
            return
        except csv.Error:
            stray = True
        if stray:
            source.put_back()
            cells = split(source.taken[0], separator)
        if any(map(str.strip, cells)):
            yield Cells(first, cells, stray)


def _reader(lines: Iterator[str], separator: str) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=True)


class _Lines(Iterator[str]):
    """Lines of which those `taken` for a row can be put back, but for its first."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.lines, self.number = iter(lines), 0
        self.taken: list[str] = []
        self.waiting: deque[str] = deque()

    def __next__(self) -> str:
        if len(self.taken) == MOST_LINES:
            raise csv.Error
        line = self.waiting.popleft() if self.waiting else next(self.lines)
        self.taken.append(line)
        self.number += 1
        return line

    def put_back(self) -> None:
        self.waiting.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1
        del self.taken[1:]
