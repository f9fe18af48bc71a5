"""What processes hold in common, in parts of the world: queues, centres, assignments."""

from __future__ import annotations

from pathlib import Path

from processes import run_processes


def test_what_processes_share_is_that_of_one(tmp_path: Path) -> None:
    run_processes("import groups; groups.what_processes_share_is_that_of_one(rank, world)", tmp_path, 3)
