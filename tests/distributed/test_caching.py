"""Gradient caching over two processes: the gradients of one, and one reduction a step."""

from __future__ import annotations

from pathlib import Path

from processes import run_processes


def test_in_two_processes(tmp_path: Path) -> None:
    run_processes("import caching; caching.check(rank, world)", tmp_path)
