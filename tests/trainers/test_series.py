"""Runs of several seeds, one after the other."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import logged

from ssl_kernels.trainers import command, series, siglip
from ssl_kernels.trainers.siglip import SigLipConfig

PROGRAM = [sys.executable, "-m", "ssl_kernels.trainers.siglip"]


def first_figure(run: Path) -> float:
    figure = json.loads((run / "summary.json").read_text())["figures"][0]
    assert figure["name"] == "text->image R@1"
    score: float = figure["model"]
    return score


def test_each_seed_is_a_run_of_its_own_and_the_table_has_all(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(program: Sequence[str], folder: str) -> int:
        assert (list(program[:3]), folder) == (PROGRAM, str(tmp_path))
        return siglip.main(program[3:])

    monkeypatch.setattr(series, "start", start)
    monkeypatch.chdir(tmp_path)
    arguments = [*small, "--epochs", "1", "--seeds", "3", "1", "--no-check-loss", "--output-dir"]
    assert siglip.main([*arguments, "runs"]) == 0
    runs, _, table = capsys.readouterr().out.partition("2 runs")
    assert "seed 3: in runs/seed-3\n" in runs
    (row,) = [line for line in table.splitlines() if "text->image R@1 " in line]
    assert [cell.strip() for cell in row.strip("\u2502").split("\u2502")][1:3] == [
        f"{first_figure(tmp_path / 'runs' / f'seed-{seed}'):.3f}" for seed in (3, 1)
    ]
    assert siglip.main([*arguments, "alone", "--seeds", "--seed", "1"]) == 0
    assert logged(tmp_path / "runs" / "seed-1") == logged(tmp_path / "alone")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The arguments of the runs that are started, which end at once with a figure; a file `stop` ends one with 143."""
    commands: list[list[str]] = []

    def start(program: Sequence[str], folder: str) -> int:
        arguments = list(program[3:])
        flag = "--resume" if "--resume" in arguments else "--output-dir"
        run = Path(arguments[len(arguments) - 1 - arguments[::-1].index(flag) + 1])
        commands.append(arguments)
        run.mkdir(parents=True, exist_ok=True)
        (run / "last.pt").touch()
        if (tmp_path / "stop").exists():
            return 143
        (run / "summary.json").write_text(json.dumps({"figures": [{"name": "a", "model": 0.5, "note": ""}]}))
        return 0

    monkeypatch.setattr(series, "start", start)
    monkeypatch.chdir(tmp_path)
    return commands


def test_a_stopped_series_goes_on_where_it_was(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed that had finished is not repeated, the one that was stopped is resumed, and another one may join."""
    runs = tmp_path / "runs"
    given = ["--epochs", "2", "--output-dir", "runs", "--overwrite", "--seeds", "0", "1"]
    assert siglip.main(given) == 0
    (runs / "seed-1" / "summary.json").unlink()
    (tmp_path / "stop").touch()
    del started[:]
    assert siglip.main(["--resume", "runs"]) == 143
    assert started == [["--seeds", "--resume", str(runs / "seed-1")]]
    captured = capsys.readouterr()
    assert "seed 0: has finished before, in runs/seed-0" in captured.out
    assert captured.err == "the series continues with: python -m ssl_kernels.trainers.siglip --resume runs\n"
    (tmp_path / "stop").unlink()
    del started[:]
    assert siglip.main(["--resume=runs", "--workers", "1", "--seeds", "0", "1", "2"]) == 0
    assert started[0] == ["--workers", "1", "--seeds", "0", "1", "2", "--seeds", "--resume", str(runs / "seed-1")]
    config = command.parse(SigLipConfig, started[1], "")
    assert (config.seeds, config.seed, config.output_dir) == ((), 2, runs / "seed-2")
    assert (config.epochs, config.workers, config.overwrite) == (2, 1, False)
    assert "3 runs" in capsys.readouterr().out
    del started[:]
    assert siglip.main(["--resume", "runs"]) == 0
    assert started == []


def test_a_series_is_not_mixed_with_others(
    started: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("run", "stray/seed-4"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "last.pt").touch()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "series.json").write_text("{")
    given = ["--output-dir", "runs", "--seeds", "0", "1"]
    assert siglip.main(given) == 0
    for arguments, message in (
        (given, f"{tmp_path / 'runs'} already holds a series; --resume {tmp_path / 'runs'} continues it"),
        (["--output-dir", "run", "--seeds", "1"], f"{tmp_path / 'run'} already holds a run; expected another folder"),
        (["--output-dir", "stray", "--seeds", "1"], "stray/seed-4 already holds a run of no series"),
        (["--resume", "odd"], "odd/series.json tells of no series (JSONDecodeError)"),
        (["--seeds", "1", "1"], "--seeds: expected seeds in [0, 2**64), each once, got (1, 1)"),
        (["--seeds", "-1"], "--seeds: expected seeds in [0, 2**64), each once, got (-1,)"),
    ):
        assert siglip.main(arguments) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert siglip.main(["--seeds", "1", "--output-dir", "other"]) == 2
    assert "--seeds: each run starts its own processes; expected --devices instead" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_overwriting_a_series_forgets_all_its_seeds(started: list[list[str]], tmp_path: Path) -> None:
    """Or one that is stopped would take the results of the series before for its own."""
    given = ["--output-dir", "runs", "--seeds", "0", "1"]
    assert siglip.main(given) == 0
    (tmp_path / "stop").touch()
    assert siglip.main([*given, "--overwrite"]) == 143
    assert not (tmp_path / "runs" / "seed-1" / "last.pt").exists()
    (tmp_path / "stop").unlink()
    del started[:]
    assert siglip.main(["--resume", "runs"]) == 0
    assert [arguments[-1] for arguments in started] == [str(tmp_path / "runs" / f"seed-{seed}") for seed in (0, 1)]


_CHILD = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
pathlib.Path("ready").touch()
time.sleep(60)
"""


def test_a_signal_is_passed_on_to_the_run(tmp_path: Path) -> None:
    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    sender = threading.Thread(target=send)
    sender.start()
    assert series.start([sys.executable, "-c", _CHILD], str(tmp_path)) == 7
    sender.join()
    assert signal.getsignal(signal.SIGTERM) is before
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert series.start([sys.executable, "-c", killed], str(tmp_path)) == 128 + signal.SIGKILL
