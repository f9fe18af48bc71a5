"""The measure of peak memory: what it counts, and that an old process does not change it."""

from __future__ import annotations

import random

import pytest
import torch
from memory import linux_only, peak_mb
from torch import Tensor

pytestmark = linux_only


def tiles(megabytes: list[float]) -> None:
    """One after the other; a tile is freed before the next one is asked for."""
    for size in megabytes:
        torch.ones(int(size * 2**18))


@pytest.fixture
def heap_with_gaps() -> list[Tensor]:
    draw = random.Random(0)
    blocks = [torch.ones(draw.randint(2**14, 2**20)) for _ in range(200)]
    draw.shuffle(blocks)
    return blocks[:100]


def test_it_sees_what_is_kept_and_what_was_freed() -> None:
    assert peak_mb(lambda: torch.ones(10 * 2**20)) == pytest.approx(40, abs=1)
    assert peak_mb(lambda: tiles([8, 24, 2])) == pytest.approx(24, abs=1)
    assert peak_mb(lambda: torch.empty(10 * 2**20)) < 1  # never touched


def test_gaps_in_the_heap_change_nothing(heap_with_gaps: list[Tensor]) -> None:
    sizes = [4 - i / 16 for i in range(48)]  # each fits another gap; together they are 120 MB
    assert peak_mb(lambda: tiles(sizes)) == pytest.approx(4, abs=1)
