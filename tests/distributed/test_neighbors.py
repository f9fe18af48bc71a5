"""KoLeo over several processes is that of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes

CALLS = {
    1: "losses_are_those_of_one_process",
    2: "losses_are_those_of_one_process groups_of_dinov3",
    3: "losses_are_those_of_one_process ties_hubs_and_options parts_of_the_world",
}


@pytest.mark.parametrize("world", CALLS)
def test_losses_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    calls = "; ".join(f"neighbors.{name}(rank, world)" for name in CALLS[world].split())
    run_processes(f"import neighbors; {calls}", tmp_path, world)
