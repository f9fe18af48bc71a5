"""Parameters of which `make test` runs a small part that covers the rest, and `make test-all` runs every one.

A bug that two parameters bring about together shows as soon as these two meet; a third rarely matters. So of a product
of parameters the tests run combinations in which every two values meet once; all others are marked slow. For a test
with three parameters or more this happens by itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple
from typing import Any

import pytest


def covering(strength: int, **axes: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize by the product of ``axes``. Any ``strength`` values of different axes meet in one that is not slow.

    A strength of 1 is for parameters that have little to do with each other: each value occurs once.
    """
    rows = list(itertools.product(*map(tuple, axes.values())))
    chosen = cover(rows, strength)
    marked = [row if i in chosen else pytest.param(*row, marks=pytest.mark.slow) for i, row in enumerate(rows)]
    return pytest.mark.parametrize(tuple(axes), marked, ids=str)


def covering_cases(
    strength: int, cases: Sequence[Any], also: Callable[[Any], object] = lambda case: None
) -> pytest.MarkDecorator:
    """The same for dataclasses, whose fields are the axes: of what meets in any of them, all meets in one not slow.

    Every value that ``also`` makes of a case occurs as well.
    """
    chosen = cover([astuple(case) for case in cases], strength, [also(case) for case in cases])
    marked = [case if i in chosen else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]
    return pytest.mark.parametrize("case", marked, ids=str)


def mark_all_but_pairs(items: Iterable[pytest.Item]) -> None:
    """Mark tests slow whose every two parameters meet in another one as well, unless they say themselves which are.

    Tests on a GPU stay as they are: `make gpu-check` chooses by the time that is left.
    """
    functions: dict[tuple[object, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and item.path.parent.name != "gpu":
            functions.setdefault((item.parent, item.originalname), []).append(item)
    for same in functions.values():
        if not any(item.get_closest_marker("slow") for item in same):
            chosen = cover([tuple(item.callspec.params.values()) for item in same], 2)
            for i, item in enumerate(same):
                if i not in chosen and len(item.callspec.params) > 2:
                    item.add_marker(pytest.mark.slow)


def mark_all_but_each(items: Iterable[pytest.Item]) -> None:
    """Of tests with two parameters or more, mark slow what is not needed for each value of each to occur once."""
    functions: dict[tuple[object, str], list[pytest.Function]] = {}
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            functions.setdefault((item.parent, item.originalname), []).append(item)
    for same in functions.values():
        chosen = cover([tuple(item.callspec.params.values()) for item in same], 1)
        for i, item in enumerate(same):
            if i not in chosen:
                item.add_marker(pytest.mark.slow)


def cover(rows: Sequence[tuple[Any, ...]], strength: int, also: Sequence[object] = ()) -> set[int]:
    """The numbers of few rows in which all meetings of ``strength`` values occur that occur in any row; greedily.

    >>> rows = list(itertools.product("ab", "xy", (0, 1)))
    >>> [rows[i] for i in sorted(cover(rows, 2))]
    [('a', 'x', 0), ('a', 'y', 1), ('b', 'x', 1), ('b', 'y', 0)]
    """
    meetings = [_meetings(row, strength) for row in rows]
    for found, value in zip(meetings, also, strict=False):
        found.add((("also", str(value)),))
    larger = [_meetings(row, strength + 1) for row in rows]  # of rows with as many new ones, the most varied is taken
    missing, unseen = set().union(*meetings), set().union(*larger)
    chosen: set[int] = set()
    while missing:
        best = max(range(len(rows)), key=lambda i: (len(meetings[i] & missing), len(larger[i] & unseen)))
        chosen.add(best)
        missing -= meetings[best]
        unseen -= larger[best]
    return chosen


def _meetings(row: tuple[Any, ...], strength: int) -> set[tuple[Any, ...]]:
    return set(itertools.combinations([(i, str(value)) for i, value in enumerate(row)], strength))
