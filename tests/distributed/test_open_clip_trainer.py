"""open_clip's own trainer over two processes, its losses replaced in one line, trains as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import free_port

RUNS = ("clip ours", "siglip ours")


def launch(folder: Path, world: int, *names: str) -> dict[str, Any]:
    port = free_port()
    file, workers = folder / f"{world}.json", []
    for rank in range(world):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(Path(__file__).with_name("open_clip_runs.py")), str(file), *names]
        with (folder / f"{world} processes, rank {rank}").open("w") as log:
            environment = os.environ | {name: str(value) for name, value in told.items()}
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    for rank, worker in enumerate(workers):
        assert worker.wait(timeout=280) == 0, (folder / f"{world} processes, rank {rank}").read_text()[-3000:]
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    pytest.importorskip("open_clip_train", reason="open_clip_torch is not installed")
    alone = launch(tmp_path, 1, *RUNS)
    two = launch(tmp_path, 2, *RUNS, "clip theirs", "siglip theirs")
    for run in RUNS:
        expected = alone[run]
        assert len(expected["losses"]) == 20
        assert expected["losses"][-1] < expected["losses"][0]
        for name in (run, run.replace("ours", "theirs")):
            assert two[name]["losses"] == pytest.approx(expected["losses"], rel=1e-5), name
            assert two[name]["weights"] == pytest.approx(expected["weights"], rel=1e-5, abs=1e-6), name
