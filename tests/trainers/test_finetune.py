"""Fine-tuning: what is trained and how fast, the figures beside it, and a checkpoint that is loaded like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TrainedRun
from test_use import towers

import ssl_kernels
from ssl_kernels import cli
from ssl_kernels.trainers import inputs
from ssl_kernels.trainers.optim import make_optimizer
from ssl_kernels.trainers.use import finetune
from ssl_kernels.trainers.use.classifier import Classifier, LabelledBatches
from ssl_kernels.trainers.use.command import ReadConfig
from ssl_kernels.trainers.use.items import Item, images_of
from ssl_kernels.trainers.use.labelled import Part
from ssl_kernels.trainers.use.pixels import to_pixels
from ssl_kernels.trainers.use.trained import Trained

SHORT = ("--batch-size", "16", "--accelerator", "cpu")


def run(*arguments: object) -> int:
    return cli.main([*map(str, arguments)])


def test_a_whole_network_is_fine_tuned_and_loaded(
    trained: TrainedRun, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tuned"
    assert run("finetune", trained.folder, shapes, "--output-dir", folder, "--epochs", 4, *SHORT) == 0
    out = capsys.readouterr().out
    summary = json.loads((folder / "summary.json").read_text())
    figures = {figure["name"]: figure for figure in summary["figures"]}
    assert figures["accuracy"]["model"] > 0.9
    assert figures["accuracy"]["frozen_probe"] > 0.5
    assert figures["accuracy"]["chance"] == figures["accuracy, balanced"]["chance"] == pytest.approx(1 / 6)
    assert "78 images trained on, 18 held out" in out
    assert summary["loss_first"] == pytest.approx(np.log(6), abs=1e-4)  # all classes were alike

    model, base = ssl_kernels.trainers.load(folder), ssl_kernels.trainers.load(trained.folder)
    assert model.classes == ["bar", "corner", "cross", "dot", "frame", "square"]
    assert model.method == "SigLIP fine-tuned"
    weights = torch.load(folder / "last.pt")["model"]
    found = model.classify([shapes / "dot" / "3.png", shapes / "bar" / "7.png"])
    features = model.encode_image([shapes / "dot" / "3.png", shapes / "bar" / "7.png"])
    expected = (features @ weights["tower.head.weight"].T + weights["tower.head.bias"]).softmax(1)
    torch.testing.assert_close(found, expected)
    assert found.argmax(1).tolist() == [3, 0]
    assert not torch.equal(model.image.trunk.state_dict()["stem.0.weight"], base.image.trunk.stem[0].weight)
    assert run("classify", folder, shapes) == 0
    assert "96 images in labelled folders" in capsys.readouterr().out
    assert run("classify", folder, shapes, "--labels", "x.txt") == 2
    assert "has classes of its own; leave it out" in capsys.readouterr().err
    assert run("finetune", "--resume", folder) == 0  # which is finished
    assert json.loads((folder / "summary.json").read_text())["figures"] == summary["figures"]
    arguments = ("finetune", "--config", folder / "config.json", "--output-dir", tmp_path / "again")
    assert run(*arguments, "--epochs", 2, "--eval-every", 1) == 0
    again = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert again[0]["loss"] == summary["loss_first"]
    assert 0 < again[3]["held_out_accuracy"] <= again[7]["held_out_accuracy"]
    assert (tmp_path / "again" / "best.pt").exists()


def test_layers_learn_the_slower_the_lower_they_lie(
    trained: TrainedRun, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[set[float]] = []

    def make(groups: list[dict[str, Any]], config: finetune.FinetuneConfig) -> torch.optim.Optimizer:
        rates.append({round(group["peak_lr"] / config.lr, 6) for group in groups})
        return make_optimizer(groups, config)

    monkeypatch.setattr(finetune, "make_optimizer", make)
    arguments = ("finetune", trained.folder, shapes, "--output-dir", tmp_path / "tuned", "--overwrite", *SHORT)
    for option in (("--layer-decay", 0.5), ("--layer-decay", 1), ("--freeze",)):
        assert run(*arguments, "--max-steps", 1, *option) == 0
    assert rates == [{1.0, 0.5, 0.25, 0.125}, {1.0}, {1.0}]


def test_a_frozen_trunk_stays_as_it_is(trained: TrainedRun, shapes: Path, tmp_path: Path) -> None:
    arguments = ("finetune", trained.folder, shapes, "--held-out-data", shapes, "--output-dir", tmp_path / "tuned")
    assert run(*arguments, "--freeze", "--epochs", 3, "--lr", 0.02, *SHORT) == 0
    model, base = ssl_kernels.trainers.load(tmp_path / "tuned"), ssl_kernels.trainers.load(trained.folder)
    for name, value in base.image.trunk.state_dict().items():  # statistics of BatchNorm among them
        assert torch.equal(model.image.trunk.state_dict()[name], value), name
    figures = json.loads((tmp_path / "tuned" / "summary.json").read_text())["figures"]
    assert figures[0]["note"] == "96 images trained on, 96 held out"
    assert figures[0]["model"] > 0.6


def classifier(image_model: str, *, freeze: bool = False) -> Classifier:
    method, config = towers(image_model=image_model)
    model = Trained(inputs.of_pairs("CLIP", method, config), method.state_dict())
    return Classifier(model, 4, freeze=freeze)


def test_a_frozen_trunk_has_no_part_in_the_optimizer() -> None:
    assert sum(p.requires_grad for p in classifier("tiny-vit", freeze=True).parameters()) == 2
    assert all(p.requires_grad for p in classifier("tiny-vit").parameters())


def labelled(shapes: Path) -> Part:
    items = images_of(str(shapes), 16, ReadConfig(run=shapes))
    assert items.labels is not None
    return Part(list(items.read()), torch.empty(0), items.labels)


def test_batches_are_those_of_the_seed_and_carry_the_right_labels(shapes: Path) -> None:
    part = labelled(shapes)
    options = {"size": 16, "batch_size": 12, "seed": 1}
    plain = LabelledBatches(part, augment=False, **options)
    batch = plain[(0, 2)]
    for image, label, index in zip(batch["images"], batch["labels"], plain.indices(0, 2), strict=True):
        assert torch.equal(image, to_pixels(part.items[index].source, 16))  # type: ignore[arg-type]
        assert Path(part.items[index].name).parent.name == sorted(p.name for p in shapes.iterdir())[label]
    cropped = LabelledBatches(part, **options)[(0, 2)]["images"]
    assert torch.equal(cropped, LabelledBatches(part, **options)[(0, 2)]["images"])
    assert not torch.equal(cropped, batch["images"])
    corners = [i for i, item in enumerate(part.items) if "corner" in item.name]  # which are not their mirror images
    part = Part([part.items[i] for i in corners], part.vectors, part.labels[corners])
    batch = LabelledBatches(part, augment=False, **options)[(0, 0)]
    mirrored = LabelledBatches(part, augment=False, mirror=True, **options)[(0, 0)]["images"]
    same = [torch.equal(a, b) for a, b in zip(mirrored, batch["images"], strict=True)]
    flipped = [torch.equal(a.flip(-1), b) for a, b in zip(mirrored, batch["images"], strict=True)]
    assert all(a != b for a, b in zip(same, flipped, strict=True))
    assert 0 < sum(flipped) < 12
    other = Part(part.items, part.vectors, part.labels.flip(0))
    assert LabelledBatches(other, **options).fingerprint != plain.fingerprint


def test_an_image_that_goes_bad_is_replaced_with_its_label(shapes: Path, tmp_path: Path) -> None:
    part = labelled(shapes)
    batches = LabelledBatches(part, size=16, batch_size=12, seed=1, augment=False)
    asked = batches.indices(0, 2)
    (tmp_path / "bad.png").write_bytes(b"")
    part.items[asked[3]] = Item("bad", tmp_path / "bad.png")
    found = next(iter(batches.batches(0, start=2)))
    taken = [i for i, item in enumerate(part.items) if item.name != "bad"
             and torch.equal(to_pixels(item.source, 16), found["images"][3])]  # fmt: skip
    assert found["labels"][3] in part.labels[taken]
    assert [fault.reason for fault in batches.faults] == ["empty file"]
    assert torch.equal(found["labels"][4:], part.labels[asked[4:]])


def test_mistakes_are_one_line(
    trained: TrainedRun, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        (("--batch-size", 4000), "--batch-size: 4000 is more than the 78 images to train on"),
        (("--held-out", 0), "--held-out: 0.0 of each class of"),
        (("--init-from", "resnet18"), "--init-from: RUN is what fine-tuning starts from; leave it out"),
    ]
    for options, message in cases:
        arguments = ("finetune", trained.folder, shapes, "--output-dir", tmp_path / "run", "--accelerator", "cpu")
        assert run(*arguments, *options) == 2
        err = capsys.readouterr().err.strip()
        assert message in err
        assert len(err.splitlines()) == 1
        assert not (tmp_path / "run" / "last.pt").exists()
