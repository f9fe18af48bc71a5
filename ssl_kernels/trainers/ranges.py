"""Which values the settings of a command line may have."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ssl_kernels.trainers.errors import UserError


class Range(NamedTuple):
    """The values that a setting may have, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


SHARE = Range("a number in [0, 1]", lambda value: 0 <= value <= 1)
SHARE_BELOW_ONE = Range("a number in [0, 1)", lambda value: 0 <= value < 1)
LAYER_DECAY = Range("a number in (0, 1]", lambda value: 0 < value <= 1)
POSITIVE = Range("a finite number > 0", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("a finite number >= 0", lambda value: 0 <= value < math.inf)


def at_least(low: int, of: str = "") -> Range:
    """Numbers from `low` on; `of` says of what, and why so many."""
    return Range(f"at least {low} {of}".rstrip(), lambda value: value >= low)


def require(config: object, allowed: Range, *names: str) -> None:
    """Refuse a value outside of its range, of the settings of these names, by the name of its flag."""
    for name in names:
        value = getattr(config, name)
        if not allowed.holds(value):
            raise UserError(f"--{name.replace('_', '-')}: expected {allowed.expected}, got {value}")
