"""The SimCLR trainer: its loss and its runs."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import logged, patchworks, same_state

from ssl_kernels.trainers import simclr
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.self_supervised import Encoder
from ssl_kernels.trainers.simclr import SimCLR, SimClrConfig

BATCH = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty patchworks in three tints, a folder to a tint."""
    return patchworks(tmp_path_factory.mktemp("patchworks"))


@pytest.fixture
def small(folder: Path) -> list[str]:
    """Arguments of a run over the patchworks that takes a second or two."""
    return [
        *("--data", str(folder), "--held-out", "0.2", "--image-size", "8", "--batch-size", "8", "--epochs", "4"),
        *("--hidden", "16", "--dim", "8", "--accelerator", "cpu"),
    ]


def small_model() -> SimCLR:
    return SimCLR(Encoder(SimClrConfig(data="mnist", image_size=8, hidden=12, dim=5), norm=True), 0.3).double()


def test_the_loss_is_the_paper_s() -> None:
    """Against each of the 2B rows by itself, in float64; both views are normalised in one batch."""
    model = small_model()
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randint(0, 256, (2, BATCH, 3, 8, 8), dtype=torch.uint8, generator=generator)
    z = F.normalize(copy.deepcopy(model).encoder(torch.cat([one, two])), dim=1)
    losses = []
    for i in range(2 * BATCH):
        others = [k for k in range(2 * BATCH) if k != i]
        logits = torch.stack([z[i] @ z[k] for k in others]) / 0.3
        losses.append(-logits.log_softmax(0)[others.index((i + BATCH) % (2 * BATCH))])
    loss, metrics = model({"views": (one, two)})
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)
    assert metrics["embedding_rank"] > 1
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_a_run_learns_and_reports(small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simclr.main([*small, "--seed", "5", "--epochs", "20", "--output-dir", str(tmp_path)]) == 0
    records = logged(tmp_path)
    assert len(records) == 120  # in which every seed of 0 to 7 learns: 0.64 to 0.82
    assert sum(r["loss"] for r in records[-6:]) < 0.95 * sum(r["loss"] for r in records[:6])
    out = capsys.readouterr().out
    for phrase in ("SimCLR on", "seed 5", "10 labels a class, 1-NN", "initial", "raw + aug", "embedding rank"):
        assert phrase in out
    assert len(json.loads((tmp_path / "summary.json").read_text())["figures"]) == 5


def test_a_run_in_chunks_is_the_plain_run(small: list[str], tmp_path: Path) -> None:
    """Without BatchNorm, and with little rounding for AdamW to scale up."""
    same = [*small, "--epochs", "1", "--image-model", "tiny-vit", "--no-norm", "--precision", "64-true"]
    for chunk in ("0", "3"):
        assert simclr.main([*same, "--chunk-size", chunk, "--output-dir", str(tmp_path / chunk)]) == 0
    plain, chunked = logged(tmp_path / "0"), logged(tmp_path / "3")
    assert len(plain) == len(chunked) == 6
    for ours, theirs in zip(chunked, plain, strict=True):
        for name in ("loss", "embedding_std", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), (name, theirs["step"])


def test_a_run_that_nothing_was_held_out_of_says_so(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two in a hundred of a class of twenty images round to none."""
    assert simclr.main([*small, "--held-out", "0.02", "--epochs", "1", "--output-dir", str(tmp_path)]) == 0
    assert "not evaluated: no image is held out; --held-out is" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["figures"] == []


def test_a_stopped_run_resumes_bit_exactly(small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped by an error between two checkpoints, in the middle of an epoch."""
    settings = [*small, "--held-out", "0", "--accumulate", "2", "--checkpoint-every", "4"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert simclr.main([*settings, "--output-dir", str(whole)]) == 0

    def fail(self: SimCLR, number: int) -> None:
        if number == 7:
            raise RuntimeError("out of power")

    with monkeypatch.context() as patch:
        patch.setattr(SimCLR, "after_step", fail)
        assert simclr.main([*settings, "--output-dir", str(stopped)]) == 1
    assert load_checkpoint(stopped / "last.pt")["step"] == 4
    assert simclr.main(["--resume", str(stopped)]) == 0
    assert logged(stopped) == logged(whole)
    a, b = load_checkpoint(stopped / "last.pt"), load_checkpoint(whole / "last.pt")
    for part in ("model", "optimizer", "rng"):
        assert same_state(a[part], b[part]), part


def test_temperature_and_a_head_without_batch_norm_reach_the_model(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    monkeypatch.setattr(SimCLR, "after_step", lambda self, number: seen.add(self.loss.temperature))
    options = ["--no-norm", "--temperature", "0.3", "--held-out", "0", "--epochs", "1"]
    assert simclr.main([*small, *options, "--output-dir", str(tmp_path)]) == 0
    assert seen == {0.3}
    state = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert [name for name in state if name.startswith("encoder.head")] == [
        "encoder.head.0.weight", "encoder.head.0.bias", "encoder.head.2.weight", "encoder.head.2.bias",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "inf"], "--temperature: expected a finite number > 0, got inf"),
        (["--batch-size", "1"], "--batch-size: expected at least 2 images to tell apart, got 1"),
        (["--hidden", "0"], "--hidden: expected at least 1, got 0"),
        (["--image-size", "12"], "--image-size: tiny-resnet needs a multiple of 8, got 12"),
        (["--held-out", "1"], "--held-out: expected a number in [0, 1), got 1.0"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_argument(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert simclr.main([*small, "--output-dir", str(tmp_path / "run"), *arguments]) == 2
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        simclr.main(["--help"], prog="ssl-kernels train simclr")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split()).partition(" options ")[2]
    for field in dataclasses.fields(SimClrConfig):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "BatchNorm in the projection head" in text
