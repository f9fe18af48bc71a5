"""The benchmarks run, compare outputs, and their report renders; at sizes that say nothing about speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


# Inductor's compiling of the formulas would take most of the time; without it they are traced all the same.
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_benchmarks_and_their_report(tmp_path: Path, backend: str) -> None:
    for peer in ("open_clip", "lightly", "pytorch_metric_learning", "transformers"):
        pytest.importorskip(peer, reason=f"{peer} is not installed")
    results = tmp_path / "benchmarks.json"
    arguments = ["-m", "pytest", "benchmarks", "--quick", "--benchmark-only", f"--benchmark-json={results}", "-q"]
    arguments += ["--compile-backend", backend]
    for command in (arguments, ["benchmarks/report.py", str(results)]):
        # pytest-benchmark measures nothing where it believes that it shares the machine with other workers.
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        run = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=900
        )
        assert run.returncode == 0, run.stdout + run.stderr
    infos = [entry["extra_info"] for entry in json.loads(results.read_text())["benchmarks"]]
    tables = (tmp_path / "benchmarks.md").read_text()
    ops = {info["op"] for info in infos}
    assert ops == {
        "sigmoid",
        "clip",
        "nt_xent",
        "info_nce",
        "queue",
        "ema",
        "koleo",
        "vicreg",
        "barlow_twins",
        "dino",
        "ibot",
        "sinkhorn",
        "small",
    }
    for op in ops:
        providers = {info["provider"] for info in infos if info["op"] == op}
        assert "ours" in providers
        assert len(providers) >= (2 if op == "small" else 3)
        assert f"## {op}\n" in tables
        assert (tmp_path / f"{op}.png").stat().st_size > 5_000
    assert tables.count("| forward+backward | B=64 D=16 | ours |") == 4  # SigLIP and CLIP, and each as "large" batch
