"""What of the data is left out, and why: each file, row or sample is counted once, and too many of them stop the run.

Whoever reads data adds what it cannot use. A loader's worker sends what it has found with its batch, and all processes
of a run are told of it, so that they count alike and stop in the same step.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ssl_kernels.trainers.data.pixels import parse_colour
from ssl_kernels.trainers.errors import UserError

FORGIVEN = 10  # of any data, however small, unless --max-bad is 0
TRAINING, EVALUATION = "training", "evaluation"


class Fault(NamedTuple):
    """Something that cannot be used."""

    where: str  # the file, row or sample
    reason: str  # one of few, by which faults are counted: "cut short", "no caption"
    lost: int = 1  # examples; more than one where a shard cannot be read
    of: str = TRAINING  # or EVALUATION: what it was to be used for
    name: str = ""  # the same as `where`, but within the data, so that a copy that lies elsewhere has it too


@dataclass(kw_only=True)
class ReadingConfig:
    """How images are read, and what is done about those that cannot be."""

    on_error: Literal["skip", "stop"] = "skip"
    """What to do about an image or a sample that cannot be read. `skip` puts another example in its place, which
    depends on --seed alone, and counts it; the evaluation leaves it out. `stop` ends the run with its name."""
    max_bad: str = "1%"
    """Largest share of the training data that may be unreadable, such as 1% or 0.01; beyond it the run stops with a
    list. Ten examples are always forgiven, unless the share is 0."""
    background: str = "white"
    """Colour behind transparent images: R,G,B such as 128,128,128, or a name."""

    def check_reading(self) -> None:
        """Refuse values that cannot work."""
        parse_share(self.max_bad)
        parse_colour(self.background)

    def faults(self, *data: str) -> Faults:
        """None yet in these data, with these limits."""
        return Faults(stop=self.on_error == "stop", max_bad=parse_share(self.max_bad), roots=roots_of(*data))


def parse_share(text: str) -> float:
    """The value of --max-bad."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"--max-bad: expected a share of the data such as 1% or 0.01, got {text!r}")
    return share


def place(path: Path | str) -> str:
    """A file's name in one line that any console can show."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def roots_of(*data: str) -> dict[str, str]:
    """The folders of data that a user names, each with what stands for it in the names of faults."""
    roots: dict[str, str] = {}
    files = (name for name in data if not name.startswith("pipe:") and "://" not in name)
    for number, part in enumerate(part for name in files for part in name.split("::") if part):
        for path in (part, os.path.abspath(os.path.expanduser(part))):
            folder = path.rstrip("/") if os.path.isdir(path) else os.path.dirname(path)
            roots.setdefault(place(folder), f"{number}:" if number else "")
    return roots


@dataclass
class Faults:
    """What was found to be unusable, each place once, and how much of it may be."""

    stop: bool = False  # at the first
    max_bad: float = 0.01  # share of the training examples
    flag: str = "--data"  # how the user calls the data
    roots: dict[str, str] = field(default_factory=dict)  # as `roots_of` has them
    found: dict[str, Fault] = field(default_factory=dict)  # by their names
    seen: dict[str, int] = field(default_factory=dict)  # examples of each use, good ones among them

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Fault]:
        return iter(list(self.found.values()))

    def add(self, reason: str, where: str, lost: int = 1, of: str = TRAINING) -> None:
        """Count something that is left out; a place that is known already is not counted again."""
        self.update([Fault(where, reason, lost, of)])

    def update(self, faults: Iterable[Fault]) -> None:
        """Count several. Raises `UserError` with the first new one if the run is to stop for it."""
        for fault in map(self.named, faults):
            if self.stop and fault.name not in self.found:
                raise UserError(
                    f"{self.flag}: cannot read {fault.where}: {fault.reason} (--on-error skip goes on without)"
                )
            self.found.setdefault(fault.name, fault)

    def named(self, fault: Fault) -> Fault:
        """The fault with its name, which an earlier run on these data, lying elsewhere, may have given it."""
        roots = "|".join(re.escape(root) for root in sorted(self.roots, key=len, reverse=True) if root)
        if fault.name or not roots:
            return fault._replace(name=fault.name or fault.where)
        inside = rf"(?<![^(])({roots})/"  # at the start, or in brackets
        return fault._replace(name=re.sub(inside, lambda found: self.roots[found[1]], fault.where))

    def lost(self, of: str = "") -> int:
        """How many examples are left out, of all or of those for training or evaluation."""
        return sum(self.counts(of).values())

    def counts(self, of: str = "") -> dict[str, int]:
        """The same by reason, the most frequent first."""
        counts: dict[str, int] = {}
        for fault in self:
            if of in ("", fault.of):
                counts[fault.reason] = counts.get(fault.reason, 0) + fault.lost
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def lines(self, of: str = "", most: int = 3) -> list[str]:
        """The same in words, a line to each reason, with some of the places."""
        lines = []
        for reason, count in self.counts(of).items():
            places = [fault.where for fault in self if fault.reason == reason and of in ("", fault.of)]
            more = f" and {len(places) - most:,} more" if len(places) > most else ""
            lines.append(f"{count:,} {reason}: {', '.join(places[:most])}{more}")
        return lines

    def check(self, seen: int, of: str = TRAINING) -> None:
        """Raise `UserError` with the list if too many are left out of the examples `seen` so far."""
        self.seen[of] = seen = max(seen, self.seen.get(of, 0))
        lost, allowed = self.lost(of), (FORGIVEN if self.max_bad else 0) + int(self.max_bad * seen)
        if lost > allowed:
            raise UserError(
                f"--max-bad {100 * self.max_bad:.4g}%: {lost:,} of {max(lost, seen):,} {of} examples cannot be used,"
                f" and at most {allowed:,} may be left out: {'; '.join(self.lines(of))}"
            )
