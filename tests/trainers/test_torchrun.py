"""Training in several processes: what one process computes, who writes, what happens when one is lost."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import several
import torch
from conftest import drawing, logged, patchworks, rows, same_state
from processes import run_processes

from ssl_kernels.trainers import moco, processes, siglip
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.data.shards import ShardBatches
from ssl_kernels.trainers.data.pairs import Batches, Fingerprints, ImageTextPairs
from ssl_kernels.trainers.data.views import DrawingView, Images, PhotoView, ViewBatches, read_folder
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.loop import LoopConfig, make_fabric
from ssl_kernels.trainers.models import NGramTokenizer
from ssl_kernels.trainers.processes import Share

Job = tuple[str, list[str], int]  # a trainer, its arguments, and the step in which it has a signal, or 0
SAME = ["--accelerator", "cpu", "--lr", "1e-4", "--seed", "1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of trainers on images: 48 patchworks in batches of 8."""
    folder = patchworks(tmp_path_factory.mktemp("patchworks"), 48)
    sizes = ("--image-size", "16", "--batch-size", "8", "--hidden", "16", "--dim", "8")
    return [*SAME, "--data", str(folder), "--held-out", "0", *sizes]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of trainers on pairs: 48, some of whose captions return, in batches of 8."""
    folder = tmp_path_factory.mktemp("drawings")
    lines = ["image,caption,category"]
    for i, (colour, shape, shade) in enumerate(rows(48)):
        drawing(colour, shape, shade).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{colour} {shape} number {shade // 2},{shape}")
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    sizes = ("--image-size", "16", "--batch-size", "8", "--dim", "16")
    return [*SAME, "--data", str(folder / "pairs.csv"), "--held-out", "0", *sizes]


def jobs_of(pairs: list[str], pictures: list[str]) -> dict[str, Job]:
    once = ["--epochs", "1"]
    crops = ["--prototypes", "16", "--local-crops", "1", "--local-size", "8"]
    patches = ["--version", "2", "--image-model", "tiny-vit", "--prototypes", "16", "--freeze-last-layer", "0.5"]
    return {
        "siglip": ("siglip", [*pairs, *once], 0),
        "clip": ("clip", [*pairs, *once, "--label-smoothing", "0.1", "--accumulate", "2"], 0),
        "simclr": ("simclr", [*pictures, *once, "--accumulate", "2"], 0),
        "moco of four groups": ("moco", [*pictures, *once, "--queue-size", "24", "--accumulate", "2"], 0),
        "moco of one group": ("moco", [*pictures, *once, "--queue-size", "24", "--groups", "1"], 0),
        "moco v3": ("moco", [*pictures, *once, "--version", "3"], 0),
        "dino": ("dino", [*pictures, *once, *crops, "--centering", "mean"], 0),
        "dino v2": ("dino", [*pictures, *once, *patches, "--separate-heads"], 0),
    }


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory, pairs: list[str], pictures: list[str]) -> Path:
    """The folder of the runs of two processes; one of them was stopped by a signal to the first, one is resumed."""
    folder = tmp_path_factory.mktemp("two")
    started = folder / "one, then two"
    assert several.run("moco", [*stopped(pictures), "--output-dir", str(started)], stop=4) == 128 + 15
    jobs: dict[str, Job] = {
        **jobs_of(pairs, pictures),
        "two, then one": ("moco", stopped(pictures), 4),
        "one, then two": ("moco", ["--resume", str(started)], 0),
        "not even": ("siglip", [*pairs, "--batch-size", "7"], 0),
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    code = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
import several
from pathlib import Path
several.batch_norm_is_that_of_one_process(rank, world)
several.statistics_are_averaged(rank, world)
several.keys_are_linked(rank, world)
several.train(rank, world, Path({str(folder)!r}))
"""
    run_processes(code, folder, 2)
    return folder


def stopped(pictures: list[str]) -> list[str]:
    return [*pictures, "--epochs", "2", "--queue-size", "24"]


def check_alike(two: Path, one: Path, relative: float) -> None:
    assert len(logged(two)) == len(logged(one)) > 2
    for ours, theirs in zip(logged(two), logged(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=relative, abs=1e-6), (name, theirs["step"])


@pytest.mark.parametrize("name", jobs_of([], []))
def test_two_processes_are_one(
    in_two: Path, pairs: list[str], pictures: list[str], tmp_path: Path, name: str
) -> None:
    """The loss and all that is logged in each step, for batches that two hold together and that one holds."""
    trainer, arguments, _ = jobs_of(pairs, pictures)[name]
    assert several.run(trainer, [*arguments, "--output-dir", str(tmp_path)]) == 0
    assert [(in_two / f"{name} on {rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    check_alike(in_two / name, tmp_path, 1e-4)
    for ours, theirs in zip(logged(in_two / name), logged(tmp_path), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), theirs["step"]
    a, b = (load_checkpoint(folder / "last.pt") for folder in (in_two / name, tmp_path))
    assert a["model"].keys() == b["model"].keys()
    assert same_state(a["rng"], b["rng"])
    assert {path.name for path in (in_two / name).iterdir()} == {path.name for path in tmp_path.iterdir()}


def test_a_run_continues_on_another_number_of_processes(in_two: Path, pictures: list[str], tmp_path: Path) -> None:
    """A signal to one process stops both in the same step, and what they wrote continues in one, and the other way."""
    assert [(in_two / f"two, then one on {rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert load_checkpoint(in_two / "two, then one" / "last.pt")["step"] == 4
    assert several.run("moco", [*stopped(pictures), "--output-dir", str(tmp_path)]) == 0
    assert several.run("moco", ["--resume", str(in_two / "two, then one")]) == 0
    for name in ("two, then one", "one, then two"):
        check_alike(in_two / name, tmp_path, 1e-4)


def test_a_batch_that_does_not_split_is_refused(in_two: Path) -> None:
    assert [(in_two / f"not even on {rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    error = (in_two / "stderr of rank 0").read_text()
    assert "--batch-size: expected a multiple of the 2 processes, got 7" in error


def test_the_first_process_alone_prints(in_two: Path) -> None:
    assert "DINO v2 on" in (in_two / "stdout of rank 0").read_text()
    assert (in_two / "stdout of rank 1").read_text() == ""


LOSE = """
import os, signal, sys
from ssl_kernels.trainers import loop, siglip

take = loop._Training.optimizer_step

def lose(self, batches):
    if self.done == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, batches)

loop._Training.optimizer_step = lose
sys.exit(siglip.main())
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)


def test_a_lost_process_ends_the_job_which_resumes(pairs: list[str], tmp_path: Path) -> None:
    script = tmp_path / "lose.py"
    script.write_text(LOSE)
    settings = [*pairs, "--epochs", "1", "--checkpoint-every", "3"]
    job = torchrun(str(script), *settings, "--output-dir", str(tmp_path / "run"))
    assert job.returncode != 0
    assert "error: step 5: rank 1 did not answer" in job.stderr
    assert f"--resume {tmp_path / 'run' / 'last.pt'} continues" in job.stderr
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    assert several.run("siglip", ["--resume", str(tmp_path / "run")]) == 0
    assert several.run("siglip", [*settings, "--output-dir", str(tmp_path / "whole")]) == 0
    check_alike(tmp_path / "run", tmp_path / "whole", 1e-4)
