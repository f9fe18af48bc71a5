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


def launch(folder: Path, world: int, *names: str, batch: int = 16) -> dict[str, Any]:
    port = free_port()
    file, workers = folder / f"{world}.json", []
    for rank in range(world):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(Path(__file__).with_name("open_clip_runs.py")), str(file), str(batch), *names]
        with (folder / f"{world} processes, rank {rank}").open("w") as log:
            environment = os.environ | {name: str(value) for name, value in told.items()}
            workers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    for rank, worker in enumerate(workers):
        assert worker.wait(timeout=280) == 0, (folder / f"{world} processes, rank {rank}").read_text()[-3000:]
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow  # tests/examples/ has its trainer in one process, and this folder the loss over ranks
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


@pytest.mark.slow
def test_siglip_at_a_global_batch_of_2048(tmp_path: Path) -> None:
    """The same losses in a process and in two, and the memory of either loss; run it with ``-s`` to read that."""
    pytest.importorskip("open_clip_train", reason="open_clip_torch is not installed")
    found = {
        (world, whose): launch(tmp_path, world, f"siglip {whose}", batch=2048)[f"siglip {whose}"]
        for world in (1, 2)
        for whose in ("theirs", "ours")
    }
    expected = found[1, "theirs"]["losses"]
    assert len(expected) == 20
    assert expected[-1] < expected[0]
    for (world, whose), run in found.items():
        print(f"{world} process(es), loss {whose}: a peak of {run['peak_mb']:.0f} MB")
        assert run["losses"] == pytest.approx(expected, rel=1e-5), (world, whose)
    assert found[1, "ours"]["peak_mb"] < found[1, "theirs"]["peak_mb"]
