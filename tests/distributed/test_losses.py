"""Losses over several processes: the value and the gradients of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_losses_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    run_processes("import losses; losses.losses_are_those_of_one_process(rank, world)", tmp_path, world)
