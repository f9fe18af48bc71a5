"""Training in several processes: what one process computes, who writes, what happens when one is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import several
import torch
from conftest import drawing, logged, patchworks, rows, same_state
from processes import run_processes, run_python
from torch.utils._pytree import keystr, tree_flatten_with_path

from ssl_kernels.trainers import moco, processes, self_supervised
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.data.fault_log import read_faults
from ssl_kernels.trainers.data.files import read_table
from ssl_kernels.trainers.data.identity import Fingerprints, shared_ids
from ssl_kernels.trainers.data.image_sets import Images, read_folder
from ssl_kernels.trainers.data.pairs import Batches, ImageTextPairs
from ssl_kernels.trainers.data.shards import ShardBatches
from ssl_kernels.trainers.data.views import DrawingView, PhotoView, ViewBatches
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.processes import ALONE, Share
from ssl_kernels.trainers.text_towers import NGramTokenizer
from ssl_kernels.trainers.trunks import TINY

Job = tuple[str, list[str], int]  # a trainer, its arguments, and the step in which it has a signal, or 0
FSDP = ["--strategy", "fsdp"]
IN_SHARDS = ("siglip in chunks", "clip", "moco of four groups", "dino v2")
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
    for i in (7, 30):
        (folder / f"bad{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:60])
        lines[1 + i] = f"bad{lines[1 + i]}"
    (folder / "bad.csv").write_text("\n".join(lines) + "\n")
    sizes = ("--image-size", "16", "--batch-size", "8", "--dim", "16")
    return [*SAME, "--data", str(folder / "pairs.csv"), "--held-out", "0", *sizes]


def jobs_of(pairs: list[str], pictures: list[str]) -> dict[str, Job]:
    once, softened = ["--epochs", "1"], ["--epochs", "2", "--label-smoothing", "0.1", "--held-out", "0.2"]
    vit = ["--image-model", "tiny-vit"]  # without BatchNorm, which sees a chunk of each process
    crops = ["--prototypes", "16", "--local-crops", "1", "--local-size", "8"]
    patches = ["--version", "2", "--image-model", "tiny-vit", "--prototypes", "16", "--freeze-last-layer", "0.5"]
    bad = [argument.replace("pairs.csv", "bad.csv") for argument in pairs]
    return {
        "siglip": ("siglip", [*bad, *once], 0),
        "siglip in chunks": ("siglip", [*pairs, *once, *vit, "--chunk-size", "3", "--accumulate", "2"], 0),
        # By SGD: where a gradient is all but 0, AdamW moves by the rate of the step wherever rounding goes.
        "clip": ("clip", [*pairs, *softened, "--accumulate", "2", "--optimizer", "sgd"], 0),
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
    started, shards = folder / "one, then two", folder / "one, then shards"
    assert several.run("moco", [*stopped(pictures), "--output-dir", str(started)], stop=4) == 128 + 15
    shutil.copytree(started, shards)
    whole = jobs_of(pairs, pictures)
    jobs: dict[str, Job] = {
        **whole,
        **{f"{name} in shards": in_shards(whole[name]) for name in IN_SHARDS},
        "two, then one": ("moco", stopped(pictures), 4),
        "one, then two": ("moco", ["--resume", str(started)], 0),
        "shards, then one": in_shards(("moco", stopped(pictures), 4)),
        "one, then shards": ("moco", ["--resume", str(shards), *FSDP], 0),
        "not even": ("siglip", [*pairs, "--batch-size", "7"], 0),
        "diverging": ("siglip", [*pairs, "--lr", "1e30", "--warmup", "0", "--clip", "0"], 0),
    }
    run_jobs(folder, jobs, "batch_norm_is_that_of_one_process", "statistics_are_averaged", "keys_are_linked")
    return folder


def run_jobs(folder: Path, jobs: dict[str, Job], *checks: str) -> None:
    """Checks of several.py, then jobs, in two processes."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    code = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
import several
from pathlib import Path
for check in {checks}:
    getattr(several, check)(rank, world)
several.train(rank, world, Path({str(folder)!r}))
"""
    run_processes(code, folder, 2)


def in_shards(job: Job) -> Job:
    trainer, arguments, stop = job
    return trainer, [*arguments, *FSDP], stop


def stopped(pictures: list[str]) -> list[str]:
    return [*pictures, "--epochs", "2", "--queue-size", "24"]


LOSSES = ("loss", "loss_check", "loss_reference")
# These the gradient of one activation hardly moves.
STEADY = ("step", "epoch", "lr", "teacher_temp", "momentum", "weight_decay", "logit_scale", "logit_bias")


def check_alike(two: Path, one: Path) -> None:
    """What is logged. With ReLU, an activation that rounding moves over zero passes its gradient on, or no longer."""
    assert len(logged(two)) == len(logged(one)) > 2
    has_relu = json.loads((one / "config.json").read_text())["image_model"] == TINY
    for ours, theirs in zip(logged(two), logged(one), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if name in LOSSES:
                relative = 5e-4 if has_relu and theirs["step"] > 1 else 1e-5
            else:
                relative = 1e-2 if has_relu and name not in STEADY else 1e-4
            assert ours[name] == pytest.approx(value, rel=relative, abs=1e-6), (name, theirs["step"])


@pytest.mark.parametrize("name", jobs_of([], []))
def test_two_processes_are_one(in_two: Path, pairs: list[str], pictures: list[str], tmp_path: Path, name: str) -> None:
    """The loss and all that is logged in each step, for batches that two hold together and that one holds."""
    trainer, arguments, _ = jobs_of(pairs, pictures)[name]
    assert several.run(trainer, [*arguments, "--output-dir", str(tmp_path)]) == 0
    assert [(in_two / f"{name} on {rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    check_alike(in_two / name, tmp_path)
    a, b = (load_checkpoint(folder / "last.pt") for folder in (in_two / name, tmp_path))
    assert a["model"].keys() == b["model"].keys()
    assert same_state(a["rng"], b["rng"])
    assert {path.name for path in (in_two / name).iterdir()} == {path.name for path in tmp_path.iterdir()}
    left_out = [{Path(fault.where).name for fault in read_faults(folder)} for folder in (in_two / name, tmp_path)]
    assert left_out == [{"bad7.png", "bad30.png"} if name == "siglip" else set()] * 2


def check_shards_alike(folder: Path, name: str) -> None:
    """What is logged under FSDP2 is what is logged under DDP, and so is what is saved."""
    sharded = f"{name} in shards"
    assert [(folder / f"{sharded} on {rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    check_alike(folder / sharded, folder / name)
    ours, theirs = (load_checkpoint(folder / run / "last.pt") for run in (sharded, name))
    for part in ("model", "optimizer"):
        shapes = [[(key, leaf.shape) for key, leaf in tensors_of(state[part])] for state in (ours, theirs)]
        assert shapes[0] == shapes[1]
    for (key, a), (_, b) in zip(tensors_of(ours["model"]), tensors_of(theirs["model"]), strict=True):
        # What has no gradient, as biases below BatchNorm, AdamW moves by the rate of each step, wherever rounding goes.
        assert torch.allclose(a, b, rtol=1e-3, atol=1.5e-3), key


def tensors_of(tree: dict[str, Any]) -> list[tuple[str, torch.Tensor]]:
    return [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0] if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", IN_SHARDS)
def test_shards_are_whole_weights(in_two: Path, name: str) -> None:
    check_shards_alike(in_two, name)
    summary = json.loads((in_two / f"{name} in shards" / "summary.json").read_text())
    assert bool(summary["figures"]) == (name == "clip")


@pytest.mark.slow
def test_shards_of_other_methods_are_whole_weights(pairs: list[str], pictures: list[str], tmp_path: Path) -> None:
    whole = {name: job for name, job in jobs_of(pairs, pictures).items() if name not in IN_SHARDS}
    run_jobs(tmp_path, {**whole, **{f"{name} in shards": in_shards(job) for name, job in whole.items()}})
    for name in whole:
        check_shards_alike(tmp_path, name)


def test_a_run_continues_on_another_number_of_processes(in_two: Path, pictures: list[str], tmp_path: Path) -> None:
    """A signal to one process stops both in the same step, and what they wrote continues in one, and the other way;
    in shards or whole."""
    assert several.run("moco", [*stopped(pictures), "--output-dir", str(tmp_path)]) == 0
    for name in ("two, then one", "shards, then one"):
        assert [(in_two / f"{name} on {rank}").read_text() for rank in (0, 1)] == ["143", "143"]
        assert load_checkpoint(in_two / name / "last.pt")["step"] == 4
        assert several.run("moco", ["--resume", str(in_two / name), "--strategy", "auto"]) == 0
    for name in ("two, then one", "one, then two", "shards, then one", "one, then shards"):
        check_alike(in_two / name, tmp_path)


def test_shards_of_one_process(pairs: list[str], tmp_path: Path) -> None:
    """All in one, which is evaluated."""
    arguments = [*pairs, "--epochs", "1", "--held-out", "0.25"]
    with mock.patch.dict(os.environ):
        try:
            assert several.run("siglip", [*arguments, *FSDP, "--output-dir", str(tmp_path / "shards")]) == 0
        finally:
            torch.distributed.destroy_process_group()
    assert several.run("siglip", [*arguments, "--output-dir", str(tmp_path / "whole")]) == 0
    check_alike(tmp_path / "shards", tmp_path / "whole")
    ours, theirs = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("shards", "whole"))
    assert ours["figures"] == theirs["figures"] != []


def test_nothing_is_said_of_the_layout_of_gradients(in_two: Path) -> None:
    assert not any("strides" in (in_two / f"stderr of rank {rank}").read_text() for rank in (0, 1))


def test_a_batch_that_does_not_split_is_refused(in_two: Path) -> None:
    assert [(in_two / f"not even on {rank}").read_text() for rank in (0, 1)] == ["2", "2"]
    error = (in_two / "stderr of rank 0").read_text()
    assert "--batch-size: expected a multiple of the 2 processes, got 7" in error


def test_a_diverging_run_stops_everywhere(in_two: Path) -> None:
    assert [(in_two / f"diverging on {rank}").read_text() for rank in (0, 1)] == ["1", "1"]
    errors = [(in_two / f"stderr of rank {rank}").read_text().count("is not finite") for rank in (0, 1)]
    assert errors == [1, 0]


def test_the_first_process_alone_prints(in_two: Path) -> None:
    assert "DINO v2 on" in (in_two / "stdout of rank 0").read_text()
    assert (in_two / "stdout of rank 1").read_text() == ""


def parts_of(batches: Batches | ViewBatches, world: int, epoch: int, number: int) -> list[dict[str, Any]]:
    """What each process makes of a batch."""
    parts = []
    for rank in range(world):
        batches.share = Share(rank, world)
        parts.append(batches[epoch, number])
    batches.share = ALONE
    return parts


@pytest.mark.parametrize("world", [2, 3, 6])
@pytest.mark.parametrize("kind", ["drawings", "photographs"])
def test_the_views_of_a_batch_are_split(pictures: list[str], kind: str, world: int) -> None:
    """Each image has the views that it has in one process, whoever draws them."""
    images, view = read_folder(Path(pictures[pictures.index("--data") + 1])), PhotoView()
    if kind == "drawings":
        images = Images(images.load(range(len(images)), 24))
        view = DrawingView(degrees=20, scale=1.2, shift=0.1, shear=0.2, brightness=0.3)  # type: ignore[assignment]
    batches = ViewBatches(images, view, size=16, batch_size=12, seed=3, crops=(1, 8))
    whole, parts = batches[2, 1]["views"], parts_of(batches, world, 2, 1)
    assert {len(part["views"][0]) for part in parts} == {12 // world}
    for number, views in enumerate(whole):
        assert torch.equal(torch.cat([part["views"][number] for part in parts]), views)


@pytest.mark.parametrize("world", [2, 3, 6])
@pytest.mark.parametrize("kind", ["in memory", "files", "not augmented"])
def test_the_pairs_of_a_batch_are_split(pairs: list[str], kind: str, world: int) -> None:
    """Images, captions, and ids that tell what pairs of different processes have in common."""
    files = read_table(Path(pairs[pairs.index("--data") + 1]), "image", "caption")
    images = files.load(range(len(files)), 24) if kind == "in memory" else files.images
    data = ImageTextPairs(images, [caption[:5] for caption in files.captions], files.categories)
    options: dict[str, Any] = {"size": 16, "batch_size": 12, "seed": 3, "label_captions": 0.5}
    batches = Batches(data, lambda captions: {"captions": list(captions)}, augment=kind != "not augmented", **options)  # type: ignore[dict-item]
    whole, parts = batches[2, 1], parts_of(batches, world, 2, 1)
    assert [caption for part in parts for caption in part["text"]["captions"]] == whole["text"]["captions"]
    assert torch.equal(torch.cat([part["images"] for part in parts]), whole["images"])
    ids = torch.cat([part["ids"] for part in parts])
    if kind != "in memory":  # what is replaced elsewhere is not known: there are keys, from which all make ids
        assert {part["ids"].shape for part in parts} == {(12 // world, 2)}
        ids = shared_ids(*ids.t().tolist())
    assert torch.equal(ids, whole["ids"])


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 0), (2, 2), (4, 1)])
def test_shards_are_split_by_process_and_worker(shards: str, world: int, workers: int) -> None:
    """Every pair once an epoch: 48 in four shards, in batches of 8; and started in mid-epoch it is the rest of them."""
    captions: list[list[str]] = []
    for rank in range(world):
        stream = ShardBatches(
            shards, lambda captions: {"captions": list(captions)}, size=16, batch_size=8, seed=0, workers=workers,  # type: ignore[dict-item]
            augment=True, epoch_pairs=0, held_out=Fingerprints(), share=Share(rank, world),
        )  # fmt: skip
        batches = [batch["text"]["captions"] for batch in stream.batches(1)]
        assert [len(batch) for batch in batches] == [8 // world] * 6
        assert [batch["text"]["captions"] for batch in stream.batches(1, start=2)] == batches[2:]
        captions += batches
    assert len({caption for batch in captions for caption in batch}) == 48


def test_processes_have_a_shard_at_least(shards: str) -> None:
    options: dict[str, Any] = {"size": 16, "batch_size": 8, "seed": 0, "augment": True, "epoch_pairs": 8}
    with pytest.raises(UserError, match="--workers: 2 in each of 3 processes is more than the 4 shards of --data"):
        ShardBatches(shards, NGramTokenizer(), workers=2, held_out=Fingerprints(), share=Share(0, 3), **options)
    names = {
        ShardBatches(shards, NGramTokenizer(), workers=0, held_out=Fingerprints(), share=Share(0, world), **options)
        .fingerprint for world in (1, 2, 4)
    }  # fmt: skip
    assert len(names) == 3  # the pairs of a batch depend on it, so that a run does not resume on another


@pytest.mark.parametrize(
    ("environment", "asked", "message"),
    [
        ({"WORLD_SIZE": "2"}, (1, 1), "WORLD_SIZE: expected 1, got 2; start several processes with torchrun"),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, (4, 1), "torchrun has started 2"),
        ({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, (1, 1), "expected 2, got 3"),
    ],
)
def test_processes_that_are_not_those_asked_for_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], asked: tuple[int, int], message: str
) -> None:
    """Each would be a run of its own, all in one folder."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        processes.counts(*asked)


def test_torchrun_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.counts(2, 3) == (2, 3)
    for name, value in {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "TORCHELASTIC_RUN_ID": "x"}.items():
        monkeypatch.setenv(name, value)
    assert processes.counts(1, 1) == processes.counts(4, 2) == (4, 2)


def test_groups_of_batch_norm_fit_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moco, "own_share", lambda: Share(0, 3))
    model = moco.MoCo(self_supervised.Encoder(moco.MoCoConfig(image_size=8)), moco.KeyQueue(4, 128), **OPTIONS)
    with pytest.raises(UserError, match="--groups: expected a multiple or a divisor of the 3 processes, got 4"):
        model.synchronise(torch.device("cpu"))


OPTIONS: dict[str, Any] = {"temperature": 0.2, "groups": 4, "momentum": 0.9, "steps": 2}


LOSE = """
import os, signal, sys
from ssl_kernels import distributed
from ssl_kernels.trainers import siglip, training, two_towers

distributed._REPORT_S = 1  # a second of waiting for the lost one, the only other, is as good as ten
two_towers.CHECKED = 6
take = training.Training.optimizer_step

def lose(self, batches):
    if self.done == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return take(self, batches)

training.Training.optimizer_step = lose
sys.exit(siglip.main())
"""


TWO = ("--standalone", "--nproc-per-node", "2")
FORKS = ("--start-method", "fork")
# As torchrun; but neither it nor the processes that it forks import torch and the like anew.
FORKED = """
import json, os, sys
import ssl_kernels.trainers.siglip
from ssl_kernels.trainers.fabric import import_fabric
from torch.distributed.run import main

import_fabric()
assert "torchmetrics" not in sys.modules
main(json.loads(os.environ["LAUNCHED"]))
"""


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "torch.distributed.run", *TWO, *arguments)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    package = str(Path(processes.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": package, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=1800)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_a_lost_process_ends_the_job_which_resumes(pairs: list[str], tmp_path: Path, strategy: str) -> None:
    script = tmp_path / "lose.py"
    script.write_text(LOSE)
    settings = [*pairs, "--epochs", "1", "--checkpoint-every", "3"]
    asked = [*settings, "--strategy", strategy, "--output-dir", str(tmp_path / "run")]
    job = run_python(
        FORKED, LAUNCHED=json.dumps([*TWO, *FORKS, "--run-path", str(script), *asked]), OMP_NUM_THREADS="1"
    )
    assert job.returncode != 0
    assert "error: step 5: rank 1 did not answer" in job.stderr
    assert f"--resume {tmp_path / 'run' / 'last.pt'} continues" in job.stderr
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
    assert several.run("siglip", ["--resume", str(tmp_path / "run"), "--strategy", "auto"]) == 0
    assert several.run("siglip", [*settings, "--output-dir", str(tmp_path / "whole")]) == 0
    check_alike(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["siglip", "dino"])  # one of pairs, one of images
def test_twenty_steps_of_the_embedded_data(tmp_path: Path, trainer: str) -> None:
    """The command as a user writes it, and in float64, for AdamW makes much of a gradient's rounding: of 1e-7 in the
    first step of float32 a thousandth in the twentieth."""
    size = "330" if trainer == "siglip" else "200"
    settings = ["--accelerator", "cpu", "--max-steps", "20", "--batch-size", size, "--precision", "64-true"]
    two, one = tmp_path / "two", tmp_path / "one"
    job = torchrun("-m", "ssl_kernels.cli", "train", trainer, *settings, "--output-dir", str(two))
    assert job.returncode == 0, job.stderr
    assert several.run(trainer, [*settings, "--output-dir", str(one)]) == 0
    assert len(logged(one)) >= 20
    for ours, theirs in zip(logged(two), logged(one), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-7), theirs["step"]
    assert json.loads((two / "summary.json").read_text())["figures"]


STOP = """
import os, signal, sys
from ssl_kernels.trainers import siglip, training

take = training.Training.optimizer_step

def stop(self, batches):
    if self.done == 2 and os.environ["LOCAL_RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return take(self, batches)

training.Training.optimizer_step = stop
sys.exit(siglip.main())
"""


@pytest.mark.slow
def test_the_trainer_starts_processes_itself(pairs: list[str], tmp_path: Path) -> None:
    """And they stop together when one has a signal."""
    script = tmp_path / "stop.py"
    script.write_text(STOP)
    job = python(str(script), *pairs, "--devices", "2", "--output-dir", str(tmp_path / "run"))
    assert job.stderr.count("SIGTERM: stopped after saving") == 1
    assert job.returncode != 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 3
