"""What a step over several processes costs: memory that does not grow with them, and bytes as documented."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory import linux_only
from processes import run_processes


@linux_only
@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_memory_does_not_grow_with_the_ranks(world: int, tmp_path: Path) -> None:
    run_processes("import resources; resources.memory_does_not_grow_with_the_ranks(rank, world)", tmp_path, world)


def test_bytes_are_those_of_the_formula(tmp_path: Path) -> None:
    run_processes("import resources; resources.bytes_are_those_of_the_formula(rank, world)", tmp_path, 3)
