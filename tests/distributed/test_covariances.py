"""VICReg and Barlow Twins over several processes are those of one process with the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes

CALLS = {
    2: "losses_are_those_of_one_process panels_backends_and_numerics modules_and_peers compiled",
    3: "losses_are_those_of_one_process modules_and_peers parts_of_the_world_and_errors",
}


@pytest.mark.parametrize("world", CALLS)
def test_losses_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    calls = "; ".join(f"covariances.{name}(rank, world)" for name in CALLS[world].split())
    run_processes(f"import covariances; {calls}", tmp_path, world)
