"""What of the data is left out, and why: each file, row or sample is counted once, and too many of them stop the run.

Whoever reads data adds what it cannot use. A loader's worker sends what it has found with its batch, and all processes
of a run are told of it, so that they count alike and stop in the same step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from ssl_kernels.trainers.errors import UserError

LEFT_OUT = "left_out.jsonl"  # of a run's folder: a line to each fault
FORGIVEN = 10  # of any data, however small, unless --max-bad is 0
TRAINING, EVALUATION = "training", "evaluation"


class Fault(NamedTuple):
    """Something that cannot be used."""

    where: str  # the file, row or sample
    reason: str  # one of few, by which faults are counted: "cut short", "no caption"
    lost: int = 1  # examples; more than one where a whole shard cannot be read
    of: str = TRAINING  # or EVALUATION: what it was to be used for


@dataclass(kw_only=True)
class ReadingConfig:
    """How images are read, and what is done about those that cannot be."""

    on_error: Literal["skip", "stop"] = "skip"
    """What to do about an image or a sample that cannot be read. `skip` puts another example in its place, which
    depends on --seed alone, and counts it; in the evaluation it is left out. `stop` ends the run with its name."""
    max_bad: str = "1%"
    """Largest share of the training data that may be unreadable, such as 1% or 0.01; beyond it the run stops with a
    list. Ten examples are always forgiven, unless the share is 0."""

    def check_reading(self) -> None:
        """Refuse values that cannot work."""
        parse_share(self.max_bad)

    def faults(self) -> Faults:
        """Nothing yet, with these limits."""
        return Faults(stop=self.on_error == "stop", max_bad=parse_share(self.max_bad))


def parse_share(text: str) -> float:
    """The value of --max-bad."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UserError(f"--max-bad: expected a share of the data such as 1% or 0.01, got {text!r}")
    return share


@dataclass
class Faults:
    """What was found to be unusable, each place once, and how much of it may be."""

    stop: bool = False  # at the first
    max_bad: float = 0.01  # share of the training examples
    found: dict[tuple[str, str], Fault] = field(default_factory=dict)  # by what they are of, and where

    def __len__(self) -> int:
        return len(self.found)

    def __iter__(self) -> Iterator[Fault]:
        return iter(list(self.found.values()))

    def add(self, reason: str, where: str, lost: int = 1, of: str = TRAINING) -> None:
        """Count something that is left out; a place that is known already is not counted again."""
        self.update([Fault(where, reason, lost, of)])

    def update(self, faults: Iterable[Fault]) -> None:
        """Count several. Raises `UserError` with the first new one if the run is to stop for it."""
        for fault in faults:
            fault = Fault(*fault)  # a loader may have made a list of it
            if self.stop and (fault.of, fault.where) not in self.found:
                raise UserError(f"--data: cannot read {fault.where}: {fault.reason} (--on-error skip goes on without)")
            self.found.setdefault((fault.of, fault.where), fault)

    def lost(self, of: str = TRAINING) -> int:
        """How many examples are left out."""
        return sum(fault.lost for fault in self if fault.of == of)

    def counts(self, of: str = TRAINING) -> dict[str, int]:
        """Examples by reason, the most frequent first."""
        counts: dict[str, int] = {}
        for fault in self:
            if fault.of == of:
                counts[fault.reason] = counts.get(fault.reason, 0) + fault.lost
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def lines(self, of: str = TRAINING, most: int = 3) -> list[str]:
        """A line to each reason: how many examples, and the first places."""
        lines = []
        for reason, count in self.counts(of).items():
            places = [fault.where for fault in self if (fault.of, fault.reason) == (of, reason)]
            more = f" and {len(places) - most:,} more" if len(places) > most else ""
            lines.append(f"{count:,} {reason}: {', '.join(places[:most])}{more}")
        return lines

    def check(self, seen: int) -> None:
        """Raise `UserError` with the list if too much of the `seen` training examples is left out."""
        lost = self.lost()
        allowed = (FORGIVEN if self.max_bad else 0) + int(self.max_bad * seen)
        if lost > allowed:
            raise UserError(
                f"--max-bad {self.max_bad:.4g}: {lost:,} of {max(lost, seen):,} training examples cannot be used, and"
                f" at most {allowed:,} may: {'; '.join(self.lines())}"
            )


def read_faults(path: Path) -> list[Fault]:
    """What a run has written of its faults; a last line that a kill cut short is left out."""
    faults = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            faults.append(Fault(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return faults


def json_line(fault: Fault) -> str:
    return json.dumps(fault._asdict()) + "\n"
