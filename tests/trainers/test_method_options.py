"""Options that trainers share: drop path, layer decay, averaged weights, DINO's local crops, and their help."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import os
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logged, patchworks, same_state
from torch import Tensor, nn

from ssl_kernels import cli
from ssl_kernels.losses.clip import ClipLoss
from ssl_kernels.trainers import clip, dino, optim, siglip, train_pairs
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.clip import Clip, ClipConfig
from ssl_kernels.trainers.dino_config import DINOConfig
from ssl_kernels.trainers.dino_students import Student
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation import embedder
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.moco import MoCoConfig, MoCoV3
from ssl_kernels.trainers.self_supervised import Encoder
from ssl_kernels.trainers.text_towers import NGramTower
from ssl_kernels.trainers.trunks import TinyResNet, keep_all_paths, tiny_vit


def dropped(net: nn.Module) -> list[float]:
    from timm.layers import DropPath

    return [round(part.drop_prob, 6) for part in net.modules() if isinstance(part, DropPath)]


def test_blocks_are_skipped_with_a_probability_that_rises_to_the_last() -> None:
    assert dropped(TinyResNet(16, drop_path=0.4)) == [0.2, 0.4]
    assert dropped(tiny_vit(16, False, 0.3)) == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert dropped(ImageTower("resnet10t", 32, 4, drop_path=0.3).trunk) == [0.1, 0.2, 0.3]
    assert dropped(ImageTower("tiny-vit", 16, 4).trunk) == []


def test_what_skips_blocks_in_training_is_whole_in_evaluation() -> None:
    torch.manual_seed(0)
    plain, skipping = ImageTower("tiny-vit", 16, 4), ImageTower("tiny-vit", 16, 4, drop_path=0.9)
    skipping.load_state_dict(plain.state_dict())
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(plain.eval()(images), skipping.eval()(images))
    assert not torch.allclose(plain.train()(images), skipping.train()(images), atol=1e-3)
    keep_all_paths(skipping)
    assert torch.equal(plain(images), skipping(images))


@pytest.mark.parametrize("name", ["vgg11", "test_resnet"])
def test_a_net_without_blocks_to_skip_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "test_resnet":  # a net that takes the option, and makes nothing of it
        monkeypatch.setattr("ssl_kernels.trainers.image_towers.has_drop_path", lambda trunk: False)
    with pytest.raises(UserError, match=f"--drop-path: {name} has no residual blocks that could be skipped"):
        ImageTower(name, 32, 4, drop_path=0.1)


def test_a_teacher_skips_nothing() -> None:
    config = MoCoConfig(version=3, image_size=16, drop_path=0.5)
    method = MoCoV3(Encoder(config), nn.Identity(), temperature=0.2, momentum=0.9, steps=4)
    assert dropped(method.encoder) == [0.25, 0.5]
    assert dropped(method.teacher) == [0.0, 0.0]


def rates(groups: list[dict[str, Any]], net: nn.Module) -> dict[str, float]:
    """The learning rate of each parameter, each of which is in one group."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = [(names[id(p)], group["peak_lr"]) for group in groups for p in group["params"]]
    assert len(dict(found)) == len(found)
    for group in groups:
        assert group["lr"] == group["peak_lr"]
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0}
    return dict(found)


def test_each_layer_learns_slower_than_the_one_above() -> None:
    net = nn.ModuleDict({"trunk": tiny_vit(8, False), "head": nn.Linear(96, 3)})
    found = rates(optim.parameter_groups(net, 2.0, 0.1, trunk=net["trunk"], layer_decay=0.5), net)
    assert found.keys() == dict(net.named_parameters()).keys()
    assert (found["head.weight"], found["head.bias"], found["trunk.norm.weight"]) == (2.0, 2.0, 2.0)
    assert [found[f"trunk.blocks.{i}.mlp.fc1.weight"] for i in range(4)] == [0.25, 0.5, 1.0, 2.0]  # with its norm
    assert found["trunk.patch_embed.proj.weight"] == found["trunk.pos_embed"] == 0.125
    small = nn.ModuleDict({"trunk": TinyResNet(8)})
    found = rates(optim.parameter_groups(small, 1.0, 0.1, trunk=small["trunk"], layer_decay=0.5), small)
    assert [found[f"trunk.blocks.{i}.conv1.weight"] for i in range(3)] == [0.25, 0.5, 1.0]
    assert found["trunk.stem.0.weight"] == 0.125


def test_without_layer_decay_the_groups_are_as_they_were() -> None:
    net = nn.ModuleDict({"trunk": tiny_vit(8, False), "head": nn.Linear(96, 3)})
    plain = optim.parameter_groups(net, 2.0, 0.1)
    assert [len(group["params"]) for group in plain] == [len(group["params"]) for group in
            optim.parameter_groups(net, 2.0, 0.1, trunk=net["trunk"], layer_decay=1.0)]  # fmt: skip
    assert len(plain) == 2


def test_a_trunk_without_layers_is_refused() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(UserError, match="--layer-decay: Sequential has no order of layers"):
        optim.parameter_groups(net, 1.0, 0.1, trunk=net, layer_decay=0.5)


def test_layer_decay_multiplies_the_rate_of_the_trunk() -> None:
    config = ClipConfig(image_model="tiny-vit", image_size=8, dim=4, lr=1.0, image_lr_factor=0.5, layer_decay=0.5)
    config.check()
    model = Clip(ImageTower("tiny-vit", 8, 4), NGramTower(4, 8, 4), ClipLoss())
    groups = train_pairs.parameter_groups(model, config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(p)]: group["peak_lr"] for group in groups for p in group["params"]}
    assert found.keys() == set(names.values())
    assert (found["image.trunk.norm.weight"], found["image.trunk.blocks.2.mlp.fc1.weight"]) == (0.5, 0.25)
    assert found["image.head.weight"] == found["text.mlp.1.weight"] == found["log_scale"] == 1.0


def test_dino_decays_the_rates_of_its_trunk_and_no_teacher_s() -> None:
    config = DINOConfig(image_model="tiny-vit", image_size=8, hidden=8, dim=4, prototypes=6, layer_decay=0.5, lr=1.0)
    config.check()
    method = dino.DINO(Student(config), config, steps=12)
    groups = method.parameter_groups(config)
    found = rates(groups, method)
    assert {name.partition(".")[0] for name in found} == {"encoder"}
    assert found["encoder.trunk.blocks.0.mlp.fc1.weight"] == 0.125
    assert {rate for name, rate in found.items() if name.startswith("encoder.head")} == {1.0}
    method.before_step(12, groups)
    assert {group["weight_decay"] for group in groups} == {0.0, method.logged["weight_decay"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, r"--layer-decay: expected a number in \(0, 1\], got 0"),
        ({"drop_path": 1.0}, r"--drop-path: expected a number in \[0, 1\), got 1"),
        ({"lock_image": True, "drop_path": 0.1}, r"--drop-path: the image tower is locked"),
        ({"image_lr_factor": 0.0, "layer_decay": 0.9}, r"--layer-decay: the image tower is locked"),
        ({"ema": 1.0}, r"--ema: expected a number in \[0, 1\), got 1"),
    ],
)
def test_values_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ClipConfig(**options).check()


def averaged_model() -> Clip:
    torch.manual_seed(0)
    model = Clip(ImageTower("tiny-resnet", 8, 4), NGramTower(4, 8, 4), ClipLoss())
    model.keep_average(0.75)
    return model


def test_the_average_follows_the_towers_and_is_what_is_evaluated() -> None:
    """By a momentum that rises to the one that was asked for."""
    model = averaged_model()
    assert model.evaluated is model.average.module
    weight, average = model.image.head.weight, model.evaluated.image.head.weight
    expected = weight.detach().clone()
    for number in range(1, 60):
        with torch.no_grad():
            weight.add_(1.0)
            model.log_scale.fill_(9.0)
        model.after_step(number)
        momentum = min(0.75, number / (number + 9))
        expected = momentum * expected + (1 - momentum) * weight.detach()
        assert torch.allclose(average, expected, atol=1e-4), number
    assert model.log_scale.exp().item() == pytest.approx(100.0)  # what CLIP does after a step is still done
    assert torch.allclose(weight.detach() - average, torch.tensor(3.0), atol=1e-3)  # m / (1 - m) steps behind
    assert not any(p.requires_grad for p in model.average.parameters())


def test_what_is_trained_is_the_same_with_an_average() -> None:
    config = ClipConfig(dim=4)
    plain = Clip(ImageTower("tiny-resnet", 8, 4), NGramTower(4, 8, 4), ClipLoss())
    counts = [[len(group["params"]) for group in train_pairs.parameter_groups(model, config)]
              for model in (plain, averaged_model())]  # fmt: skip
    assert counts[0] == counts[1]


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that are evaluated."""
    seen: list[nn.Module] = []

    class Embedder(embedder.Embedder):
        def __init__(self, fabric: Any, model: Any, *arguments: Any, **options: Any) -> None:
            seen.append(model)
            super().__init__(fabric, model, *arguments, **options)

    monkeypatch.setattr(train_pairs, "Embedder", Embedder)
    return seen


def test_a_run_evaluates_its_average_and_resumes_it_exactly(
    small: list[str], tmp_path: Path, embedded: list[nn.Module], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = [*small, "--epochs", "2", "--ema", "0.8"]
    assert siglip.main([*arguments, "--output-dir", str(tmp_path / "whole")]) == 0
    assert "held-out pairs, averaged weights" in capsys.readouterr().out
    state = load_checkpoint(tmp_path / "whole" / "last.pt")["model"]
    name = "image.head.weight"
    average: Tensor = state[f"average.module.{name}"]
    assert torch.equal(embedded[0].state_dict()[name], average)
    assert not torch.equal(average, state[name])

    after_step = siglip.SigLip.after_step

    def stop(self: siglip.SigLip, number: int) -> None:
        after_step(self, number)
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(siglip.SigLip, "after_step", stop)
    assert siglip.main([*arguments, "--output-dir", str(tmp_path / "cut")]) == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / "cut" / "last.pt")["step"] == 4
    monkeypatch.undo()
    assert siglip.main(["--resume", str(tmp_path / "cut")]) == 0
    whole, cut = (load_checkpoint(tmp_path / run / "last.pt") for run in ("whole", "cut"))
    assert same_state(whole["model"], cut["model"])
    assert logged(tmp_path / "whole") == logged(tmp_path / "cut")


def test_the_average_changes_nothing_of_what_is_trained(small: list[str], tmp_path: Path) -> None:
    for run, options in (("plain", []), ("averaged", ["--ema", "0.8"])):
        assert clip.main([*small, "--epochs", "1", *options, "--output-dir", str(tmp_path / run)]) == 0
    assert logged(tmp_path / "plain") == logged(tmp_path / "averaged")


PHOTOS = DINOConfig(data="photos", image_size=64, hidden=8, dim=4, prototypes=6)


@pytest.mark.parametrize(
    ("options", "crops"),
    [
        ({}, (8, 24)),
        ({"image_size": 224}, (8, 96)),
        ({"image_size": 56}, (0, 0)),
        ({"image_model": "tiny-vit"}, (8, 28)),
        ({"data": "mnist"}, (0, 0)),
        ({"data": "openmoji", "local_crops": 2}, (2, 16)),
        ({"local_crops": 0}, (0, 0)),
        ({"local_crops": 3, "local_size": 32}, (3, 32)),
        ({"image_size": 32, "local_crops": 2}, (2, 16)),
        ({"local_size": 40}, (8, 40)),
    ],
)
def test_photographs_have_local_crops_by_default(options: dict[str, Any], crops: tuple[int, int]) -> None:
    config = dataclasses.replace(PHOTOS, **options)
    config.check()
    assert Student(config).crops == crops


def test_a_network_that_takes_no_small_crops_has_none_unless_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probe = ImageTower.probe

    def refuse(self: ImageTower, size: int, flag: str) -> int:
        if flag == "--local-size":
            raise UserError(f"{flag}: no {size}")
        return probe(self, size, flag)

    monkeypatch.setattr(ImageTower, "probe", refuse)
    assert Student(PHOTOS).crops == (0, 0)
    with pytest.raises(UserError, match="--local-size: no 24"):
        Student(dataclasses.replace(PHOTOS, local_crops=8))


def test_a_run_says_which_crops_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    arguments = [
        *("--data", str(patchworks(tmp_path / "photos", 12)), "--held-out", "0", "--batch-size", "12", "--epochs", "1"),
        *("--hidden", "8", "--dim", "4", "--prototypes", "6", "--accelerator", "cpu"),
    ]
    for size, line in (
        ("64", "each image in two views of 64 pixels and 8 local crops of 24 pixels (--local-crops)"),
        ("32", "each image in two views of 32 pixels and no local crops (--local-crops)"),
    ):
        folder = tmp_path / size
        assert dino.main([*arguments, "--image-size", size, "--output-dir", str(folder)]) == 0
        assert line in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.TRAINERS)
def test_help_begins_with_a_command_that_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from ssl_kernels.trainers import command
    from ssl_kernels.trainers.loop_config import LoopConfig

    trainer = importlib.import_module(f"ssl_kernels.trainers.{name}")
    with pytest.raises(SystemExit):
        trainer.main(["--help"], prog=f"ssl-kernels train {name}")
    first = " ".join(itertools.takewhile(lambda line: "options" not in line, capsys.readouterr().out.splitlines()))
    usage, _, example = first.partition("[OPTIONS]")
    assert usage.startswith("usage:")
    _, _, arguments = example.partition(f"ssl-kernels train {name} ")
    kinds = [
        kind for kind in vars(trainer).values()
        if isinstance(kind, type) and issubclass(kind, LoopConfig) and kind.__module__.startswith(trainer.__name__)
    ]  # fmt: skip
    config = command.parse(kinds[0], shlex.split(arguments), "")
    assert str(config.output_dir).startswith("runs/")
    config.check()
