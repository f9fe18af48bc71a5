"""The CLIP trainer: its loss, its temperature, locked towers, dino.txt's head and exact resume."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from conftest import logged, same_state
from rich.console import Console
from torch import Tensor

from ssl_kernels import ClipLoss
from ssl_kernels.trainers import clip, siglip
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.clip import Clip, ClipConfig
from ssl_kernels.trainers.data.pairs import make_batch
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.siglip import SigLipConfig
from ssl_kernels.trainers.text_towers import NGramTokenizer, NGramTower


def config(table: Path, folder: Path, kind: type[ClipConfig] | type[SigLipConfig] = ClipConfig, **options: object):  # type: ignore[no-untyped-def]
    values = {
        "data": str(table), "output_dir": folder, "batch_size": 16, "epochs": 3, "image_size": 16, "dim": 16,
        "accelerator": "cpu", **options,
    }  # fmt: skip
    return kind(**values)  # type: ignore[arg-type]


def train(settings: ClipConfig | SigLipConfig, trainer: ModuleType = clip) -> str:
    """Run the trainer; its output."""
    settings.check()
    console = Console(width=140, record=True, quiet=False, force_terminal=False)
    trainer.train(settings, console)
    return console.export_text()


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_checkpoint(folder / "last.pt")["model"]
    return state


def small_model(label_smoothing: float = 0.0) -> Clip:
    torch.manual_seed(0)
    return Clip(ImageTower("tiny-resnet", 16, 8), NGramTower(8), ClipLoss(), label_smoothing=label_smoothing)


IMAGES = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CAPTIONS, TWICE = ["a", "b", "c", "d", "e", "f"], ["a", "b", "a", "d", "e", "f"]


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("captions", [CAPTIONS, TWICE], ids=["distinct", "shared caption"])
def test_loss_and_gradients_are_the_paper_s(captions: list[str], label_smoothing: float) -> None:
    """Cross-entropy of the right text among the texts, and of the right image among the images; of several evenly."""
    model = small_model(label_smoothing).double().eval()
    assert model.log_scale.exp().item() == pytest.approx(1 / 0.07)
    batch = make_batch(IMAGES, captions, range(6), NGramTokenizer())
    assert (batch["ids"] is None) == (captions is CAPTIONS)
    loss, metrics = model(batch)
    loss.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert metrics["logit_scale"].item() == pytest.approx(1 / 0.07)

    model.zero_grad(set_to_none=True)
    x, y = model.encode_image(batch["images"]), model.encode_text(batch["text"])
    assert torch.allclose(x.norm(dim=1), x.new_ones(6))
    assert torch.allclose(y.norm(dim=1), y.new_ones(6))
    right = torch.tensor([[float(a == b) for b in captions] for a in captions], dtype=torch.float64)
    right /= right.sum(1, keepdim=True)
    z = model.log_scale.exp() * x @ y.T
    terms = [F.cross_entropy(logits, right, label_smoothing=label_smoothing) for logits in (z, z.T)]
    expected = (terms[0] + terms[1]) / 2
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert torch.allclose(ours[name], parameter.grad, rtol=1e-7, atol=1e-12), name


def test_the_scale_is_held_at_a_hundred() -> None:
    model = small_model()
    for value, kept in ((6.0, math.log(100)), (-1.0, -1.0), (4.6, 4.6)):
        with torch.no_grad():
            model.log_scale.fill_(value)
        model.after_step(1)
        assert model.log_scale.item() == pytest.approx(kept)
    assert model.log_scale.requires_grad


def test_every_optimizer_step_is_followed_by_the_clamp(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also before a checkpoint is written: the ceiling lies just below where the scale starts and wants to go."""
    ceiling = math.log(1 / 0.07) - 0.01
    monkeypatch.setattr(clip, "MAX_LOG_SCALE", ceiling)
    train(config(table, tmp_path, epochs=2, held_out=0.0))
    scales = [record["logit_scale"] for record in logged(tmp_path)]
    assert scales[0] == pytest.approx(1 / 0.07)
    assert max(scales[1:]) <= math.exp(ceiling) * (1 + 1e-6)
    assert weights(tmp_path)["log_scale"].item() <= ceiling + 1e-6
    monkeypatch.setattr(clip, "MAX_LOG_SCALE", math.inf)
    train(config(table, tmp_path / "free", epochs=2, held_out=0.0))
    assert max(record["logit_scale"] for record in logged(tmp_path / "free")[1:]) > math.exp(ceiling)


@pytest.mark.parametrize("smoothing", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_fused_and_reference_runs_agree_step_by_step(table: Path, tmp_path: Path, smoothing: float) -> None:
    """Thirty steps from one seed, the loss fused in one run and dense PyTorch in the other.

    The net has no ReLU: with one, the last bit of an activation near zero decides whether its gradient passes.
    """
    for backend in ("auto", "reference"):
        options = {"loss_backend": backend, "label_smoothing": smoothing, "image_model": "tiny-vit"}
        train(config(table, tmp_path / backend, epochs=5, held_out=0.0, lr=3e-4, **options))
    fused, reference = logged(tmp_path / "auto"), logged(tmp_path / "reference")
    assert len(fused) == len(reference) == 30
    for ours, theirs in zip(fused, reference, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6 if ours["step"] == 1 else 2e-5), ours["step"]
        assert ours["logit_scale"] == pytest.approx(theirs["logit_scale"], rel=1e-4)
        assert ours["loss_check"] == pytest.approx(ours["loss_reference"], rel=1e-6)
    assert fused[-1]["loss"] < 0.6 * fused[0]["loss"]


def test_a_run_learns_and_says_what_it_is(table: Path, tmp_path: Path) -> None:
    text = train(config(table, tmp_path, epochs=20, held_out=0.25))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["loss_last"] < 0.5 * summary["loss_first"]
    assert summary["loss_difference"] < 1e-6
    figures = {figure["name"]: figure for figure in summary["figures"]}
    assert figures["text->image R@5"]["model"] > 2 * figures["text->image R@5"]["chance"]
    assert "supervised" in figures["zero-shot 6 categories, balanced"]["note"]
    assert "CLIP on " in text
    assert "logit_bias" not in logged(tmp_path)[0]


# -- LiT and dino.txt ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trainer", "kind"), [(clip, ClipConfig), (siglip, SigLipConfig)], ids=["clip", "siglip"])
def test_a_locked_image_tower_stays_as_it_is(
    table: Path, tmp_path: Path, trainer: ModuleType, kind: type[ClipConfig] | type[SigLipConfig]
) -> None:
    """Every bit of the trunk, the statistics of its batch norms included; its projection and the texts learn."""
    settings = config(table, tmp_path / "flag", kind, epochs=1, held_out=0.0, lock_image=True)
    torch.manual_seed(settings.seed)
    begin = {f"image.{name}": value for name, value in ImageTower("tiny-resnet", 16, 16).state_dict().items()}
    train(settings, trainer)
    end = weights(tmp_path / "flag")
    trunk = [name for name in begin if name.startswith("image.trunk")]
    assert any("running_var" in name for name in trunk)
    assert all(torch.equal(end[name], begin[name]) for name in trunk)
    assert not torch.equal(end["image.head.weight"], begin["image.head.weight"])

    train(config(table, tmp_path / "factor", kind, epochs=1, held_out=0.0, image_lr_factor=0.0), trainer)
    assert same_state(weights(tmp_path / "factor"), end), "a factor of 0 is the same thing"


def test_dinotxt_trains_blocks_projection_and_text_above_a_locked_vit(table: Path, tmp_path: Path) -> None:
    options = {"image_model": "test_vit", "image_size": 32, "image_head": "dinotxt", "lock_image": True, "lr": 1e-3}
    settings = config(table, tmp_path, epochs=6, **options)
    torch.manual_seed(settings.seed)
    begin = ImageTower("test_vit", 32, 16, locked=True, head="dinotxt").state_dict()
    train(settings)
    end = weights(tmp_path)
    moved = {name for name, value in begin.items() if not torch.equal(end[f"image.{name}"], value)}
    assert moved == {name for name in begin if name.startswith("head.")}
    assert {name.split(".")[2] for name in moved if name.startswith("head.blocks")} == {"0", "1"}
    records = logged(tmp_path)
    assert sum(record["loss"] for record in records[-5:]) < 0.9 * sum(record["loss"] for record in records[:5])
    figures = json.loads((tmp_path / "summary.json").read_text())["figures"]
    assert any(figure["name"] == "text->image R@1" for figure in figures)


# -- The command line ------------------------------------------------------------------------------------------------


def test_an_interrupted_run_resumes_bit_exactly(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the middle of an epoch, with its scale at the ceiling."""
    monkeypatch.setattr(clip, "MAX_LOG_SCALE", math.log(1 / 0.07))
    alone, stopped = tmp_path / "alone", tmp_path / "stopped"
    small = [*small, "--held-out", "0"]
    assert clip.main([*small, "--output-dir", str(alone)]) == 0

    clamp = Clip.after_step

    def interrupted(self: Clip, number: int) -> None:
        clamp(self, number)
        if number == 7:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Clip, "after_step", interrupted)
        assert clip.main([*small, "--output-dir", str(stopped)], prog="ssl-kernels train clip") == 128 + signal.SIGINT
    assert f"continue with: ssl-kernels train clip --resume {stopped}" in capsys.readouterr().err
    assert load_checkpoint(stopped / "last.pt")["step"] == 7
    assert clip.main(["--resume", str(stopped)]) == 0

    assert logged(stopped) == logged(alone)
    a, b = (load_checkpoint(folder / "last.pt") for folder in (stopped, alone))
    for part in ("step", "model", "optimizer", "rng", "config"):
        assert same_state(a[part], b[part]), part


def test_a_run_of_another_trainer_is_not_resumed(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert siglip.main([*small, "--epochs", "1", "--held-out", "0", "--output-dir", str(tmp_path)]) == 0
    assert clip.main(["--resume", str(tmp_path)]) == 2
    assert "is of another trainer or version (it differs in: label_smoothing)" in capsys.readouterr().err


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_an_impossible_smoothing_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"--label-smoothing: expected a number in \[0, 1\), got"):
        ClipConfig(label_smoothing=value).check()


def test_a_batch_of_one_pair_is_refused() -> None:
    """Its loss is zero whatever the towers do."""
    with pytest.raises(UserError, match="--batch-size: expected at least 2 pairs to tell apart, got 1"):
        ClipConfig(batch_size=1).check()


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        clip.main(["--help"], prog="ssl-kernels train clip")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split()).partition(" options ")[2]
    for field in dataclasses.fields(ClipConfig):
        flag = f"--{field.name.replace('_', '-')}"
        description = text.split(flag, 1)[1].removeprefix(f", --no-{flag[2:]}").split("(default", 1)[0]
        assert len(description.split(" --", 1)[0].split()) >= 4, f"{flag} has no help: {description}"
    assert "runs/clip" in text
