"""The benchmarks run, compare outputs, and their report renders; at sizes that say nothing about speed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_benchmarks_and_their_report(tmp_path: Path) -> None:
    pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    results = tmp_path / "sigmoid.json"
    arguments = ["-m", "pytest", "benchmarks", "--quick", "--benchmark-only", f"--benchmark-json={results}", "-q"]
    for command in (arguments, ["benchmarks/report.py", str(results)]):
        run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stdout + run.stderr
    entries = json.loads(results.read_text())["benchmarks"]
    providers = {entry["extra_info"]["provider"] for entry in entries}
    assert providers == {"ours", "open_clip", "eager", "compile"}
    table = (tmp_path / "sigmoid.md").read_text()
    assert table.count("| forward+backward | 64 | 16 |") == 1
    assert (tmp_path / "sigmoid.png").stat().st_size > 5_000
