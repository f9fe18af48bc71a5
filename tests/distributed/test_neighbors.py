"""KoLeo over several processes is that of one process with the whole batch, and so is what processes have in common."""

from __future__ import annotations

from pathlib import Path

from processes import run_processes


def test_two_processes(tmp_path: Path) -> None:
    calls = "neighbors.losses_are_those_of_one_process(rank, world); neighbors.groups_of_dinov3(rank, world)"
    run_processes(f"import neighbors; {calls}", tmp_path)


def test_three_processes_and_groups_of_them(tmp_path: Path) -> None:
    calls = "losses_are_those_of_one_process", "ties_hubs_and_options", "parts_of_the_world"
    code = "; ".join(f"neighbors.{call}(rank, world)" for call in calls)
    code += "; groups.what_processes_share_is_that_of_one(rank, world)"
    run_processes(f"import groups, neighbors; {code}", tmp_path, 3)
