"""Ranks that call differently, are killed or are stuck: nobody hangs, and the message names them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from processes import run_processes

FAILURES = (
    "differences_raise_everywhere",
    "a_rank_that_is_gone_is_named",
    "a_rank_that_is_stuck_is_named",
    "different_groups_are_named",
    "the_rank_that_holds_the_store_is_gone",
    "the_rank_that_holds_the_store_is_stuck",
)


def test_failures(tmp_path: Path) -> None:
    """All at once, for most of it is waiting."""
    with ThreadPoolExecutor(len(FAILURES)) as threads:
        runs = {name: threads.submit(run, name, tmp_path / name) for name in FAILURES}
    errors = [f"{name}: {error}" for name, done in runs.items() if (error := done.exception())]
    assert not errors, "\n".join(errors)


def run(name: str, folder: Path) -> None:
    folder.mkdir()
    run_processes(f"import failures; failures.{name}(rank, world)", folder, 3, rank_0_holds_the_store="store" in name)
