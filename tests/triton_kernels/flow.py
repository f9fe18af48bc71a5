"""What it takes to follow a program's control flow without its data: shared by the interpreters of sass.py and gcn.py.

A kernel of tiles decides where it goes by program number, sizes and strides, which a launch gives as integers. An
interpreter steps one lane of each warp through the machine code with these at hand and does the arithmetic of integers
and predicates that leads to them; whatever comes from memory or is floating point stays unknown. So loops run as often
as they would, and tiles on an edge or a diagonal go their own way, in the code that ships.

Where a branch depends on data, it goes the way on which fewer instructions lead to where both meet again: fallbacks for
extreme data are what is longer here. Such branches are kept in ``Executed.undecided``. An opcode without a rule leaves
its results unknown, which can make a branch undecided but never wrong.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

MASK_32 = 0xFFFFFFFF
MASK_64 = 0xFFFFFFFFFFFFFFFF
MOST_STEPS = 2_000_000


class UnknownError(Exception):
    """A value that cannot be known was needed."""


@dataclass
class Executed:
    """Instructions that the warps of one block issue, those whose predicate is false included."""

    opcodes: collections.Counter[str] = field(default_factory=collections.Counter)  # with modifiers
    phases: collections.Counter[str] = field(default_factory=collections.Counter)  # "before", "loop" and "after"
    undecided: set[int] = field(default_factory=set)  # branches on data, by their place in the code
    stores: list[tuple[int | None, int | None]] = field(default_factory=list)  # (address, value) where known

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    def count(self, pattern: str) -> int:
        """Instructions whose opcode, modifiers included, matches ``pattern`` from its start."""
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))

    def add(self, opcodes: Sequence[str], trace: Sequence[int], products: str) -> None:
        """Count what one warp issued, given the opcodes of the code and the places that it went through.

        Up to the last matrix product (``products``) or instruction that repeats, from the first of these on, is "loop".
        """
        often = collections.Counter(trace)
        in_loop = {at for at, times in often.items() if times > 1 or re.match(products, opcodes[at])}
        first = next((step for step, at in enumerate(trace) if at in in_loop), len(trace))
        last = next((step for step in range(len(trace) - 1, -1, -1) if trace[step] in in_loop), len(trace))
        for at, times in often.items():
            self.opcodes[opcodes[at]] += times
        self.phases["before"] += first
        self.phases["loop"] += last + 1 - first if first < len(trace) else 0
        self.phases["after"] += len(trace) - last - 1 if first < len(trace) else 0


def signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) & 1 else value


def shorter_way(successors: Callable[[int], tuple[int, ...]], at: int) -> int:
    """Of the two ways behind the branch at ``at``, the one with fewer instructions to where they meet, or else to an
    end. One that only leads back to the branch waits for something, which is taken to have come."""
    ways = {start: _distances(successors, start, at) for start in successors(at)}
    meeting = set.intersection(*map(set, ways.values()))
    goals = meeting or {place for distances in ways.values() for place in distances if not successors(place)}
    return min(ways, key=lambda start: min((d for place, d in ways[start].items() if place in goals), default=math.inf))


def _distances(successors: Callable[[int], tuple[int, ...]], start: int, avoid: int) -> dict[int, int]:
    distance, frontier = {start: 0}, collections.deque([start])
    while frontier:
        here = frontier.popleft()
        for there in successors(here) if here != avoid else ():
            if there not in distance and there != avoid:
                distance[there] = distance[here] + 1
                frontier.append(there)
    return distance
