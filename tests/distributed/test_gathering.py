"""The losses of retrieval and of recommenders over several processes."""

from __future__ import annotations

from pathlib import Path

from processes import run_processes


def test_gathering(tmp_path: Path) -> None:
    calls = ("as_the_peers_gather", "two_towers_share_a_batch")
    run_processes("import retrieval; " + "; ".join(f"retrieval.{call}(rank, world)" for call in calls), tmp_path)
