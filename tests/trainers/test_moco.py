"""The MoCo trainer: its losses, its teacher, its queue, and runs that are accumulated, stopped and evaluated."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import logged, patchworks, same_state
from torch import Tensor, nn

from ssl_kernels import KeyQueue
from ssl_kernels.trainers import moco
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.moco import MoCo, MoCoConfig, MoCoV3
from ssl_kernels.trainers.self_supervised import Encoder, mlp

DIM, BATCH = 6, 8
SETTINGS = MoCoConfig(data="mnist", image_size=8, hidden=12, dim=DIM)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty patchworks in three tints, a folder to a tint."""
    return patchworks(tmp_path_factory.mktemp("patchworks"))


@pytest.fixture
def small(folder: Path) -> list[str]:
    """Arguments of a run over the drawings that takes a second or two."""
    return [
        *("--data", str(folder), "--held-out", "0.2", "--image-size", "8", "--batch-size", "8", "--epochs", "3"),
        *("--hidden", "16", "--dim", "8", "--queue-size", "24", "--groups", "2", "--accelerator", "cpu"),
    ]


def views(seed: int = 0) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randint(0, 256, (2, BATCH, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return {"views": (one, two)}


def small_moco(groups: int = 2, size: int = 20) -> MoCo:
    model = MoCo(Encoder(SETTINGS), KeyQueue(size, DIM), temperature=0.2, groups=groups, momentum=0.9, steps=10)
    return model.double()


def small_v3() -> MoCoV3:
    predictor = mlp(DIM, 12, DIM, norm=True)
    model = MoCoV3(Encoder(SETTINGS, norm=True), predictor, temperature=0.2, momentum=0.9, steps=10)
    return model.double()


def perturb(encoder: nn.Module) -> None:
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def test_the_loss_is_the_paper_s_and_leaves_the_queue_alone() -> None:
    """In evaluation mode, where batches do not matter, against the dense formula in float64."""
    model = small_moco().eval()
    perturb(model.encoder)  # or queries and keys would be of one net
    before = model.queue.keys.clone()
    batch = views()
    loss, metrics = model(batch)
    q = F.normalize(model.encoder(batch["views"][0]), dim=1)
    k = F.normalize(model.teacher(batch["views"][1]), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ before.T], 1) / 0.2
    expected = F.cross_entropy(logits, torch.zeros(BATCH, dtype=torch.long))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["similarity"].item() == pytest.approx((q * k).sum(1).mean().item(), rel=1e-6)
    # A key that entered before the loss would be its own query's negative.
    assert torch.equal(model.queue.keys, before)
    assert model.queue.pointer.item() == 0
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ours = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    dense = torch.autograd.grad(expected, [p for p in model.parameters() if p.requires_grad])
    for name, a, b in zip(names, ours, dense, strict=True):
        assert name.startswith("encoder.")
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-9), name


def test_version_three_is_symmetric_and_within_the_batch() -> None:
    model = small_v3()
    perturb(model.encoder)
    first, second = views()["views"]
    loss, _ = copy.deepcopy(model)({"views": (first, second)})
    queries = [F.normalize(model.predictor(model.encoder(x)), dim=1) for x in (first, second)]
    keys = [F.normalize(model.teacher(x), dim=1) for x in (first, second)]
    both = zip(queries, keys[::-1], strict=True)
    expected = torch.stack([2 * 0.2 * F.cross_entropy(q @ k.T / 0.2, torch.arange(BATCH)) for q, k in both]).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    swapped, _ = copy.deepcopy(model)({"views": (second, first)})
    assert swapped.item() == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.parametrize("make", [small_moco, small_v3])
def test_the_encoder_learns_and_the_teacher_does_not(make: Callable[[], MoCo | MoCoV3]) -> None:
    model = make()
    model(views())[0].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("teacher."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            if not name.endswith("bias"):
                assert parameter.grad.abs().sum() > 0, name


class Spy(nn.Module):
    """Embeds an image as its own first pixel, and remembers who was normalised with whom."""

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        rows = images[:, 0, 0, 0]
        self.groups.append(tuple(sorted(rows.tolist())))
        return torch.stack([rows.double(), torch.ones(len(rows), dtype=torch.float64)], 1)


def test_keys_are_normalised_in_other_company_than_queries() -> None:
    """Every group is a partition of the batch; the keys' is drawn anew each time, and each key returns to its place."""
    model = small_moco(groups=2)
    images = torch.arange(BATCH, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    spy = Spy()
    model.teacher.module = spy
    drawn = set()
    for _ in range(10):
        keys = model.keys(images)
        assert torch.allclose(keys[:, 0] / keys[:, 1], torch.arange(BATCH).double())
        parts = tuple(sorted(spy.groups))
        assert sorted(itertools.chain(*parts)) == list(range(BATCH))
        assert [len(part) for part in parts] == [4, 4]
        drawn.add(parts)
        spy.groups.clear()
    assert len(drawn) > 5
    moco.in_groups(spy, images, 2)
    assert spy.groups == [(0, 1, 2, 3), (4, 5, 6, 7)]  # the queries'


def test_a_query_does_not_find_its_key_by_batch_statistics() -> None:
    """A net that outputs only how an image compares with its group: alone, both views of an image would agree on it."""
    torch.manual_seed(0)

    class Statistic(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            mean = images.double().mean((0, 2, 3))
            return (mean - 127).expand(len(images), -1)

    model = small_moco(groups=4)
    model.teacher.module = Statistic()
    shuffled, ordered = [], []
    for seed in range(40):
        first, second = views(seed)["views"]
        # Groups of two that differ strongly in brightness, in both views: what a leak could tell.
        light = (torch.arange(BATCH) // 2).view(-1, 1, 1, 1) * 40
        first, second = ((x // 4 + light).to(torch.uint8) for x in (first, second))
        q = F.normalize(moco.in_groups(Statistic(), first, 4), dim=1)
        for keys, found in ((model.keys(second), shuffled), (moco.in_groups(Statistic(), second, 4), ordered)):
            similarity = q @ F.normalize(keys, dim=1).T
            found.append((similarity.diagonal() - similarity.mean(1)).mean().item())
    assert sum(ordered) / 40 > 0.3
    assert abs(sum(shuffled) / 40) < 0.3 * sum(ordered) / 40


def test_teacher_and_queue_advance_with_the_step() -> None:
    model = small_moco(size=20)
    model.before_training(views(seed) for seed in range(9))
    assert model.queue.pointer.item() == 0
    assert torch.allclose(model.queue.keys.norm(dim=1), torch.ones(20).double())
    queue = model.queue.keys.clone()
    perturb(model.encoder)
    teacher = {name: p.clone() for name, p in model.teacher.module.named_parameters()}
    keys = []
    for seed in (1, 2):  # two micro-batches of one step
        rng = torch.get_rng_state()
        keys.append(copy.deepcopy(model).keys(views(seed)["views"][1]))
        torch.set_rng_state(rng)
        model(views(seed))
        assert torch.equal(model.queue.keys, queue)
        assert all(torch.equal(p, teacher[name]) for name, p in model.teacher.module.named_parameters())
    model.after_step(4)
    assert torch.equal(model.queue.keys, torch.cat([*keys, queue[16:]]))
    assert model.queue.pointer.item() == 16
    m = 1 - (1 - 0.9) * (1 + math.cos(math.pi * 4 / 10)) / 2
    for name, p in model.encoder.named_parameters():
        expected = m * teacher[name] + (1 - m) * p
        assert torch.allclose(model.teacher.module.get_parameter(name), expected, rtol=1e-12), name
    assert not model.fresh


def test_the_teacher_stands_still_at_the_end_of_the_schedule() -> None:
    model = small_v3()
    perturb(model.encoder)
    before = [p.clone() for p in model.teacher.parameters()]
    model.after_step(10)
    assert all(torch.equal(a, b) for a, b in zip(before, model.teacher.parameters(), strict=True))
    model.after_step(9)
    assert not all(torch.equal(a, b) for a, b in zip(before, model.teacher.parameters(), strict=True))


def test_the_queue_starts_with_keys_of_images() -> None:
    model = small_moco(size=12).eval()
    model.before_training(views(seed) for seed in range(2))
    images = torch.cat([views(seed)["views"][1] for seed in range(2)])[:12]
    assert torch.allclose(model.queue.keys, F.normalize(model.teacher(images), dim=1), rtol=1e-6)


def run(arguments: list[str], output: Path, *more: str) -> Path:
    assert moco.main([*arguments, "--output-dir", str(output), *more]) == 0
    return output


def test_accumulated_batches_are_one_step_of_queue_and_teacher(small: list[str], tmp_path: Path) -> None:
    """48 images, 8 to a batch, 3 batches to a step: two steps an epoch, 24 keys each."""
    run(small, tmp_path, "--accumulate", "3", "--queue-size", "40", "--epochs", "1", "--held-out", "0")
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 2
    assert state["model"]["queue.pointer"].item() == 48 % 40
    # Every forward pass counts in the teacher's own statistics: 5 that fill the queue, 6 of training, in 2 groups each,
    # but an update sets the counter to the encoder's, which saw 12 groups.
    assert state["model"]["teacher.module.trunk.stem.1.num_batches_tracked"].item() == 12


def test_a_stopped_run_resumes_bit_exactly(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an error between two checkpoints, so that teacher, queue and pointer go back by some steps together."""
    settings = [*small, "--held-out", "0", "--epochs", "6", "--accumulate", "2", "--queue-size", "20"]
    settings += ["--checkpoint-every", "4"]
    whole, folder = run(settings, tmp_path / "whole"), tmp_path / "stopped"
    advance = MoCo.after_step

    def fail(self: MoCo, number: int) -> None:
        if number == 6:
            raise RuntimeError("out of power")
        advance(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(MoCo, "after_step", fail)
        assert moco.main([*settings, "--output-dir", str(folder)]) == 1
    stopped = load_checkpoint(folder / "last.pt")
    assert stopped["step"] == 4
    assert stopped["model"]["queue.pointer"].item() == 4 * 16 % 20
    assert moco.main(["--resume", str(folder)]) == 0
    assert logged(folder) == logged(whole)
    a, b = load_checkpoint(folder / "last.pt"), load_checkpoint(whole / "last.pt")
    assert a["step"] == b["step"] == 18
    assert {"queue.keys", "queue.pointer", "teacher.module.head.0.weight"} < b["model"].keys()
    for part in ("model", "optimizer", "rng", "config"):
        assert same_state(a[part], b[part]), part


@pytest.mark.parametrize("version", ["2", "3"])
def test_a_run_learns_and_reports(
    small: list[str], tmp_path: Path, version: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # So short a run needs a teacher that keeps up and a sharp softmax.
    run(
        small,
        tmp_path,
        "--version",
        version,
        "--epochs",
        "12",
        "--seed",
        "3",
        "--momentum",
        "0.5",
        "--temperature",
        "0.1",
    )
    records = logged(tmp_path)
    assert len(records) == 72
    assert sum(r["loss"] for r in records[-12:]) < 0.95 * sum(r["loss"] for r in records[:12])
    assert all(0 < record["embedding_rank"] <= 7 for record in records)
    assert all(0 < record["embedding_std"] < 1.5 for record in records)
    out = capsys.readouterr().out
    for phrase in (f"MoCo v{version} on", "seed 3", "10 labels a class, 1-NN", "distorted query, 5-NN", "linear probe",
                   "initial", "raw + aug", "embedding rank", "training loss"):  # fmt: skip
        assert phrase in out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert len(summary["figures"]) == 5
    assert summary["figures"][0]["chance"] == pytest.approx(1 / 3)
    assert (tmp_path / "curves.png").exists()


def test_timm_backbones_and_other_precisions_train(small: list[str], folder: Path, tmp_path: Path) -> None:
    """Flat folders have no labels: retrieval is what is left to evaluate."""
    options = ["--data", str(folder / "green"), "--image-model", "test_resnet", "--image-size", "32", "--precision",
               "bf16-mixed", "--batch-size", "4", "--queue-size", "8", "--epochs", "1", "--workers", "1"]  # fmt: skip
    run(small, tmp_path, *options)
    assert len(logged(tmp_path)) == 4
    (figure,) = json.loads((tmp_path / "summary.json").read_text())["figures"]
    assert figure["name"] == "instance retrieval R@1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--queue-size", "49"], "--queue-size: expected at least the 8 keys of a step and at most the 48 images"),
        (["--queue-size", "12", "--accumulate", "2"], "--queue-size: expected at least the 16 keys of a step"),
        (["--queue-size", "0"], "--queue-size: expected at least 1, got 0"),
        (["--accumulate", "7"], "--batch-size 8 x --accumulate 7: more than one epoch holds (6 batches of 8)"),
        (["--batch-size", "1", "--version", "3"], "--batch-size: expected at least 2 images to tell apart, got 1"),
        (["--groups", "3"], "--groups: expected a divisor of --batch-size 8, got 3"),
        (["--groups", "8"], "--groups: 8 leaves one image of 8 to a group"),
        (["--momentum", "1.5"], "--momentum: expected a number in [0, 1], got 1.5"),
        (["--temperature", "0"], "--temperature: expected a finite number > 0, got 0.0"),
        (["--dim", "0"], "--dim: expected at least 1, got 0"),
        (["--data", "nowhere"], "--data: expected mnist, openmoji or a folder of images, got 'nowhere'"),
        (["--image-model", "resnet_of_dreams"], "--image-model: timm has no model 'resnet_of_dreams'"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_argument(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert moco.main([*small, "--output-dir", str(tmp_path / "run"), *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--lr", "1e30", "--warmup", "0", "--clip", "0", "--output-dir", str(tmp_path)]
    assert moco.main([*small, *options]) == 1
    assert "is not finite; no checkpoint had been written yet" in capsys.readouterr().err


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        moco.main(["--help"], prog="ssl-kernels train moco")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split()).partition(" options ")[2]
    for field in dataclasses.fields(MoCoConfig):
        flag = f"--{field.name.replace('_', '-')}"
        assert flag in text
        description = text.split(flag, 1)[1].removeprefix(f", --no-{flag[2:]}").split("(default", 1)[0]
        assert len(description.split(" --", 1)[0].split()) >= 4, f"{flag} has no help: {description}"
