"""Ranks that call differently, are killed or are stuck: nobody hangs, and the message names them."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes


@pytest.mark.parametrize(
    "name",
    [
        "differences_raise_everywhere",
        "a_rank_that_is_gone_is_named",
        "a_rank_that_is_stuck_is_named",
        "different_groups_are_named",
        "the_rank_that_holds_the_store_is_gone",
        "the_rank_that_holds_the_store_is_stuck",
    ],
)
def test_failures(name: str, tmp_path: Path) -> None:
    run_processes(f"import failures; failures.{name}(rank, world)", tmp_path, 3, rank_0_holds_the_store="store" in name)
