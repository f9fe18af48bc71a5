"""The SigLIP trainer: its towers, its loss, its runs and what they write."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import logged
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from ssl_kernels import SigLipLoss
from ssl_kernels.trainers import siglip, train_pairs
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.data.pairs import make_batch
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.siglip import SigLip, SigLipConfig
from ssl_kernels.trainers.text_towers import NGramTokenizer, NGramTower


def config(table: Path, folder: Path, **options: object) -> SigLipConfig:
    values = {
        "data": str(table), "output_dir": folder, "batch_size": 16, "epochs": 3, "image_size": 16, "dim": 16,
        "accelerator": "cpu", **options,
    }  # fmt: skip
    return SigLipConfig(**values)  # type: ignore[arg-type]


def train(settings: SigLipConfig) -> str:
    """Run the trainer; its output."""
    settings.check()
    console = Console(width=140, record=True, quiet=False, force_terminal=False)
    siglip.train(settings, console)
    return console.export_text()


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = load_checkpoint(folder / "last.pt")["model"]
    return state


def small_model(backend: str = "auto", **options: bool) -> SigLip:
    torch.manual_seed(0)
    return SigLip(ImageTower("tiny-resnet", 16, 8, **options), NGramTower(8), SigLipLoss(), backend)


BATCH = make_batch(
    torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    ["a", "b", "c", "d", "e", "f"], range(6), NGramTokenizer(),
)  # fmt: skip


def test_the_loss_is_the_paper_s() -> None:
    model = small_model().eval()
    assert model.log_scale.exp().item() == pytest.approx(10)
    assert model.bias.item() == -10
    loss, metrics = model(BATCH)
    x, y = model.encode_image(BATCH["images"]), model.encode_text(BATCH["text"])
    assert torch.allclose(x.norm(dim=1), torch.ones(6))
    assert torch.allclose(y.norm(dim=1), torch.ones(6))
    logits = 10 * x @ y.T - 10
    signs = 2 * torch.eye(6) - 1
    assert loss.item() == pytest.approx(-nn.functional.logsigmoid(signs * logits).sum().item() / 6, rel=1e-5)
    assert metrics["logit_scale"].item() == pytest.approx(10)


def test_pairs_that_share_a_caption_are_not_negatives() -> None:
    model = small_model().eval()
    batch = make_batch(BATCH["images"], ["a", "b", "a", "d", "e", "f"], range(6), NGramTokenizer())
    x, y = model.encode_image(batch["images"]), model.encode_text(batch["text"])
    signs = 2 * torch.eye(6) - 1
    signs[0, 2] = signs[2, 0] = 1
    expected = -nn.functional.logsigmoid(signs * (10 * x @ y.T - 10)).sum().item() / 6
    assert model(batch)[0].item() == pytest.approx(expected, rel=1e-5)


def test_gradients_reach_both_towers_scale_and_bias() -> None:
    model = small_model()
    model(BATCH)[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


def groups_of(model: SigLip, **options: object) -> dict[str, tuple[float, float]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = train_pairs.parameter_groups(model, SigLipConfig(lr=0.1, weight_decay=0.2, **options))  # type: ignore[arg-type]
    listed = [(names[id(p)], g["lr"], g["weight_decay"]) for g in groups for p in g["params"]]  # type: ignore[attr-defined]
    assert len(listed) == len({name for name, *_ in listed})
    return {name: (lr, decay) for name, lr, decay in listed}  # type: ignore[misc]


def test_a_slow_image_trunk_has_its_rate_and_no_weight_decay() -> None:
    model = small_model()
    even, slow = groups_of(model), groups_of(model, image_lr_factor=0.1)
    assert even.keys() == slow.keys() == dict(model.named_parameters()).keys()
    assert even["image.trunk.stem.0.weight"] == (0.1, 0.2)
    assert slow["image.trunk.stem.0.weight"] == (pytest.approx(0.01), 0.0)
    assert {decay for name, (_, decay) in slow.items() if "trunk" in name} == {0.0}
    for groups in (even, slow):
        assert groups["image.head.weight"] == groups["text.embedding.weight"] == (0.1, 0.2)
        assert groups["log_scale"] == groups["bias"] == groups["text.mlp.0.bias"] == (0.1, 0.0)
    locked = groups_of(small_model(locked=True), image_lr_factor=0.0)
    assert not [name for name in locked if "trunk" in name]
    assert "image.head.weight" in locked


@pytest.mark.parametrize("factor", [0.0, 0.01, 1.0])
def test_the_image_trunk_moves_as_far_as_its_rate_lets_it(table: Path, tmp_path: Path, factor: float) -> None:
    settings = config(table, tmp_path, image_lr_factor=factor, epochs=1)
    torch.manual_seed(settings.seed)
    begin = ImageTower("tiny-resnet", 16, 16).state_dict()
    train(settings)
    end = weights(tmp_path)
    moved = {name: (end[f"image.{name}"] - value).abs().max().item() for name, value in begin.items()}
    trunk = [distance for name, distance in moved.items() if name.startswith("trunk") and name.endswith("weight")]
    assert moved["head.weight"] > 1e-4
    if factor == 0:
        assert max(distance for name, distance in moved.items() if name.startswith("trunk")) == 0
    else:
        assert 0 < max(trunk) < 0.02 * factor + 1e-6  # AdamW moves a weight by about its rate in each of five steps


def test_fused_and_reference_runs_agree_step_by_step(table: Path, tmp_path: Path) -> None:
    """Thirty steps from one seed, the loss fused in one run and dense PyTorch in the other.

    The net has no ReLU: with one, the last bit of an activation near zero decides whether its gradient passes.
    """
    for backend in ("auto", "reference"):
        train(config(table, tmp_path / backend, epochs=6, loss_backend=backend, image_model="tiny-vit"))
    fused, reference = logged(tmp_path / "auto"), logged(tmp_path / "reference")
    assert len(fused) == len(reference) == 30
    for ours, theirs in zip(fused, reference, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6 if ours["step"] == 1 else 2e-5), ours["step"]
        assert ours["logit_bias"] == pytest.approx(theirs["logit_bias"], rel=1e-4)
        assert ours["loss_check"] == pytest.approx(ours["loss_reference"], rel=1e-6)
    assert fused[-1]["loss"] < 0.6 * fused[0]["loss"]


def test_a_run_in_chunks_is_the_plain_run(table: Path, tmp_path: Path) -> None:
    same = {"image_model": "tiny-vit", "precision": "64-true"}  # no BatchNorm, and little rounding for AdamW to scale
    for chunk in (0, 5):
        train(config(table, tmp_path / str(chunk), epochs=2, chunk_size=chunk, **same))
    plain, chunked = logged(tmp_path / "0"), logged(tmp_path / "5")
    assert len(plain) == len(chunked) == 10
    for ours, theirs in zip(chunked, plain, strict=True):
        for name in ("loss", "loss_check", "logit_scale", "logit_bias", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5 if ours["step"] <= 4 else 2e-3), name


@pytest.mark.usefixtures("drawn_pictures")
def test_a_run_learns_and_writes_what_it_says(table: Path, tmp_path: Path) -> None:
    text = train(config(table, tmp_path, epochs=30, held_out=0.25))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["loss_last"] < 0.25 * summary["loss_first"]
    assert summary["loss_difference"] < 1e-6
    figures = {figure["name"]: figure for figure in summary["figures"]}
    assert figures["text->image R@5"]["model"] > 2 * figures["text->image R@5"]["chance"]
    assert "zero-shot 6 categories, balanced" in figures
    assert "supervised" in figures["zero-shot 6 categories, balanced"]["note"]
    for phrase in ("text->image R@1", "image->text R@10", "chance", "training loss", "same loss by the reference",
                   "peak memory, MB", "seconds"):  # fmt: skip
        assert phrase in text
    named = text.split("written:")[1].split()
    assert {Path(name).name for name in named} >= {
        "last.pt",
        "metrics.jsonl",
        "curves.png",
        "retrieval.png",
        "tensorboard",
    }
    assert all(Path(name).exists() for name in named)
    for picture in ("curves.png", "retrieval.png"):
        with Image.open(tmp_path / picture) as image:
            image.load()
            assert min(image.size) > 300
            assert len(image.convert("L").getcolors() or range(999)) > 10  # something is drawn


@pytest.mark.parametrize("source", ["shards", pytest.param("openmoji", marks=pytest.mark.slow)])  # as make demo does
def test_other_sources_train_and_evaluate(shards: str, tmp_path: Path, source: str) -> None:
    options: dict[str, object] = {
        "data": shards,
        "held_out_data": shards.replace("{000..003}", "003"),
        "batch_size": 12,
    }
    if source == "openmoji":
        options = {"data": "openmoji", "batch_size": 256, "image_size": 16}
    text = train(config(Path(), tmp_path, epochs=1, **options))
    figures = [figure["name"] for figure in json.loads((tmp_path / "summary.json").read_text())["figures"]]
    assert "text->image R@1" in figures
    if source == "openmoji":
        for name in ("combinations: text->image R@1", "novel concepts: image->text R@1", "zero-shot skin tone of five",
                     "zero-shot 9 categories, balanced", "flag or not, AUC"):  # fmt: skip
            assert name in figures
            assert name in text
        assert "captions matched by TF-IDF to training images" in text
        assert "baseline: colours" in text
    else:
        assert len(logged(tmp_path)) == 3  # 36 of 48 pairs are not held out


def test_text_transformer_and_timm_tower_train_with_accumulation_and_workers(table: Path, tmp_path: Path) -> None:
    options = {
        "image_model": "test_resnet", "text_model": "transformer", "text_width": 64, "text_layers": 1,
        "context_length": 8, "accumulate": 2, "workers": 1, "image_size": 32, "precision": "bf16-mixed",
    }  # fmt: skip
    train(config(table, tmp_path, epochs=4, lr=1e-3, **options))
    records = logged(tmp_path)
    assert len(records) == 8
    assert records[-1]["loss"] < records[0]["loss"]
    assert all(math.isfinite(value) for record in records for value in record.values())


def test_without_held_out_pairs_only_training_is_reported(table: Path, tmp_path: Path) -> None:
    text = train(config(table, tmp_path, epochs=1, held_out=0.0))
    assert "training loss" in text
    assert "R@1" not in text
    assert not (tmp_path / "retrieval.png").exists()


def test_the_loss_check_can_be_left_out(table: Path, tmp_path: Path) -> None:
    text = train(config(table, tmp_path, epochs=1, check_loss=False))
    assert "reference" not in text
    assert "loss_reference" not in logged(tmp_path)[0]


def test_every_option_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        siglip.main(["--help"], prog="ssl-kernels train siglip")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split()).partition(" options ")[2]
    for field in dataclasses.fields(SigLipConfig):
        flag = f"--{field.name.replace('_', '-')}"
        assert flag in text
        description = (
            text.split(flag, 1)[1].removeprefix(f", --no-{flag[2:]}").split("(default", 1)[0].split(" --", 1)[0]
        )
        assert len(description.split()) >= 4, f"{flag} has no help: {description}"
    assert "4 x 256 is not 1,024" in text
