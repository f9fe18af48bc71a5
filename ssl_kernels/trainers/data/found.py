"""What a run tells of its data before it trains: how much there is, how it was read, and what is left out and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from ssl_kernels.trainers.data.faults import Faults
from ssl_kernels.trainers.errors import UserError

_SHOWN = 3  # places of each kind


@dataclass
class Tally:
    """How often something occurred, and where first."""

    count: int = 0
    places: list[str] = field(default_factory=list)

    def add(self, count: int, where: str) -> None:
        self.count += count
        if where and len(self.places) < _SHOWN:
            self.places.append(where)

    def line(self, what: str) -> str:
        """The same in words."""
        more = f" and {self.count - len(self.places):,} more" if self.count > len(self.places) else ""
        return f"{self.count:,} {what}" + (f": {', '.join(self.places)}{more}" if self.places else "")


@dataclass
class Found:
    """What is known of the data that a run was given."""

    source: str
    holds: dict[str, int] = field(default_factory=dict)  # how many of what: pairs, images, captions, classes, shards
    remarks: list[str] = field(default_factory=list)  # how it was read
    oddities: dict[str, Tally] = field(default_factory=dict)  # what is used, but not as it stands
    left_out: dict[str, Tally] = field(default_factory=dict)  # what is not used for a good reason; faults come on top
    suspicions: list[str] = field(default_factory=list)  # why a result would be worth little
    uses: dict[str, int] = field(default_factory=dict)  # how many are trained on, and held out
    held_out: Found | None = None  # what there is in data of its own for evaluation

    def odd(self, what: str, where: str = "", count: int = 1) -> None:
        """Count something that is used in another way than it stands."""
        self.oddities.setdefault(what, Tally()).add(count, where)

    def leave_out(self, what: str, count: int = 1, where: str = "") -> None:
        """Count something that is not used and is no fault of the data's."""
        self.left_out.setdefault(what, Tally()).add(count, where)

    def tell_of_several_captions(self, images: int) -> None:
        """Note how many images have more than one caption."""
        if images:
            self.remarks.append(f"{images:,} images have several captions, of which each epoch draws one")

    def suspect(self, why: str) -> None:
        """Note something that makes the data look wrong as a whole."""
        self.suspicions.append(why)

    def check(self, flag: str, *, allow: bool) -> None:
        """Raise `UserError` if the data look wrong, unless that is allowed."""
        if self.suspicions and not allow:
            raise UserError(f"{flag} {self.source}: {'; '.join(self.suspicions)} (--allow-suspicious goes on)")

    def check_size(self, count: int, what: str, batch_size: int, faults: Faults) -> None:
        """Raise `UserError` if there are too few examples for a batch."""
        if count < batch_size:
            reasons = "; ".join(self.reasons(faults))
            raise UserError(
                f"--batch-size: {batch_size} is more than the {count} {what} of --data {self.source}"
                + (f" (left out: {reasons})" if reasons else "")
            )

    def reasons(self, faults: Faults | None = None) -> list[str]:
        """What is left out and why, a phrase to each reason."""
        own = [tally.line(what) for part in (self, self.held_out) if part for what, tally in part.left_out.items()]
        return own + ([] if faults is None else faults.lines())

    def lines(self, faults: Faults | None = None) -> list[str]:
        """All of it for people."""
        lines, parts = [], [part for part in (self, self.held_out) if part]
        for part in parts:
            holds = ", ".join(f"{count:,} {what}" for what, count in part.holds.items())
            lines.append(f"found in {part.source}: {'; '.join([holds, *part.remarks])}")
        if reasons := self.reasons(faults):
            lines.append(f"left out: {'; '.join(reasons)}")
        if oddities := [tally.line(what) for part in parts for what, tally in part.oddities.items()]:
            lines.append(f"odd, but used: {'; '.join(oddities)}")
        lines += [f"suspicious: {why}" for why in self.suspicions]
        if self.uses:
            lines.append(", ".join(f"{what}: {count:,}" for what, count in self.uses.items()))
        return lines

    def print(self, console: Console, faults: Faults | None = None) -> None:
        """Show all of it."""
        for line in self.lines(faults):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def as_dict(self) -> dict[str, Any]:
        """All of it but faults for programs, in types that JSON knows."""
        counts = {name: {what: tally.count for what, tally in tallies.items()}
                  for name, tallies in (("left_out", self.left_out), ("odd", self.oddities))}  # fmt: skip
        return {
            "source": self.source, "holds": self.holds, "remarks": self.remarks, **counts,
            "suspicious": self.suspicions, "uses": self.uses,
            "held_out": None if self.held_out is None else self.held_out.as_dict(),
        }  # fmt: skip
