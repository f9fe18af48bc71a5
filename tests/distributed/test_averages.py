"""Averages of models that are wrapped, compiled and sharded are those of the models below."""

from __future__ import annotations

from pathlib import Path

from processes import run_processes


def test_however_models_are_laid_out(tmp_path: Path) -> None:
    run_processes("import averages; averages.however_models_are_laid_out(rank, world)", tmp_path)
