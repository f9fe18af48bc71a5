"""A run is loaded and embeds what it embedded itself; what is no run is refused in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TrainedRun, patchworks
from PIL import Image
from torch import Tensor

import ssl_kernels
from ssl_kernels import ClipLoss, SigLipLoss
from ssl_kernels.ops.unit_rows import unit_rows
from ssl_kernels.trainers import inputs
from ssl_kernels.trainers.clip import Clip
from ssl_kernels.trainers.dino import DINO, DINOv2
from ssl_kernels.trainers.dino_config import DINOConfig
from ssl_kernels.trainers.dino_students import MaskedStudent, Student
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.moco import MoCoConfig, MoCoV3
from ssl_kernels.trainers.models import TowerConfig, image_tower, text_tower, tokenizer
from ssl_kernels.trainers.self_supervised import Encoder, Method, mlp
from ssl_kernels.trainers.siglip import SigLip
from ssl_kernels.trainers.simclr import SimCLR, SimClrConfig
from ssl_kernels.trainers.two_towers import TwoTowerModel
from ssl_kernels.trainers.use.trained import Trained


@pytest.fixture(scope="module")
def model(trained: TrainedRun) -> Trained:
    return ssl_kernels.trainers.load(trained.folder)


def test_what_is_loaded_embeds_as_the_run_did(trained: TrainedRun, model: Trained) -> None:
    x, y = model.encode_image(trained.images), model.encode_text(trained.captions)
    torch.testing.assert_close(y @ x.T, trained.similarity, rtol=0, atol=1e-5)
    assert x.shape == (len(trained.images), 16)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(len(x)))


def test_images_come_in_many_forms(trained: TrainedRun, model: Trained) -> None:
    expected = model.encode_image(trained.images)
    opened = [Image.open(path) for path in trained.images]
    tensor = torch.stack([model.transform(image) for image in opened])
    assert tensor.shape[1:] == (3, 16, 16)
    for images in (opened, map(str, trained.images), tensor):
        assert torch.equal(model.encode_image(images), expected)
    torch.testing.assert_close(model.encode_image(tensor, batch_size=3), expected, rtol=0, atol=1e-6)
    for one in (opened[2], trained.images[2], str(trained.images[2])):
        torch.testing.assert_close(model.encode_image(one), expected[2:3], rtol=0, atol=1e-6)
    assert model.encode_image([]).shape == (0, 16)


def test_tensors_of_other_sizes_are_resized_and_of_others_the_middle_is_kept(model: Trained) -> None:
    large = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    halved = large.float().unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5)).round().to(torch.uint8)
    assert torch.equal(model.encode_image(large), model.encode_image(halved))
    wide = torch.cat([large, large], dim=3)  # 64 pixels, of which those from 16 on are kept
    assert torch.equal(model.encode_image(wide), model.encode_image(wide[:, :, :, 16:48]))


def test_transparent_images_lie_over_the_background_of_the_run(trained: TrainedRun, model: Trained) -> None:
    state = torch.load(trained.folder / "last.pt")
    assert state["inputs"]["image"]["background"] == [255, 255, 255]
    image = Image.open(trained.images[0])
    holed = image.convert("RGBA")
    holed.paste((0, 0, 0, 0), (0, 0, 9, 9))
    for background in (255, 255, 255), (0, 128, 0):
        state["inputs"]["image"]["background"] = list(background)
        over = image.copy()
        over.paste(background, (0, 0, 9, 9))
        other = Trained(state["inputs"], state["model"])
        assert torch.equal(other.encode_image(holed), other.encode_image(over))


def test_texts_come_alone_or_in_batches(model: Trained) -> None:
    texts = ["red square", "blue bar", ""]
    expected = model.encode_text(texts)
    torch.testing.assert_close(model.encode_text(texts, batch_size=2), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.encode_text("blue bar"), expected[1:2], rtol=0, atol=1e-6)
    assert model.encode_text([]).shape == (0, 16)


def test_the_scalars_and_the_figures_are_the_runs(trained: TrainedRun, model: Trained) -> None:
    weights = torch.load(trained.folder / "last.pt")["model"]
    assert model.logit_scale == pytest.approx(float(weights["log_scale"].exp()))
    assert model.logit_bias == pytest.approx(float(weights["bias"]))
    assert model.method == "SigLIP"
    assert model.config["epochs"] == 14
    assert model.figures["text->image R@1"]["chance"] == pytest.approx(1 / len(trained.images))
    similarity = torch.tensor([[0.5, -0.5]])
    expected = (model.logit_scale * similarity + model.logit_bias).sigmoid()
    torch.testing.assert_close(model.probabilities(similarity), expected)


def test_loading_leaves_the_random_numbers_alone_and_nothing_trains(trained: TrainedRun) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    model = ssl_kernels.trainers.load(str(trained.folder / "last.pt"))
    assert torch.equal(torch.rand(1), expected)
    assert not any(module.training for network in model.networks for module in network.modules())
    assert not any(p.requires_grad for network in model.networks for p in network.parameters())
    assert not model.encode_text("x").requires_grad


def test_the_checksum_follows_weights_and_inputs(trained: TrainedRun, model: Trained) -> None:
    state = torch.load(trained.folder / "last.pt")
    assert Trained(state["inputs"], state["model"]).checksum == model.checksum
    other = {**state["inputs"], "image": {**state["inputs"]["image"], "mean": [0.4] * 3}}
    assert Trained(other, state["model"]).checksum != model.checksum
    state["model"]["image.trunk.stem.0.weight"][0, 0, 0, 0] += 1e-3
    assert Trained(state["inputs"], state["model"]).checksum != model.checksum


def towers(method: str = "CLIP", **settings: Any) -> tuple[TwoTowerModel, TowerConfig]:
    """An untrained model of two towers for images of 32 pixels."""
    torch.manual_seed(0)
    config = TowerConfig(**{"text_width": 64, "text_layers": 1, "context_length": 12, "dim": 8, **settings})
    image = image_tower(config, 32, inverted=settings.get("image_model") is None)
    if method == "CLIP":
        return Clip(image, text_tower(config), ClipLoss()).eval(), config
    return SigLip(image, text_tower(config), SigLipLoss()).eval(), config


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_model": "tiny-vit", "image_head": "dinotxt", "text_model": "transformer"},
        {"image_model": "test_resnet", "text_model": "transformer", "image_lr_factor": 0.0},
    ],
)
def test_every_kind_of_tower_is_built_again(settings: dict[str, Any]) -> None:
    method, config = towers(**settings)
    model = Trained(inputs.of_pairs("CLIP", method, config), method.state_dict())
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    texts = ["a longer caption of a drawing", "x"]
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), unit_rows(method.image(images)))
        torch.testing.assert_close(model.encode_text(texts), unit_rows(method.text(**tokenizer(config)(texts))))
    assert model.logit_bias is None
    torch.testing.assert_close(model.probabilities(torch.eye(2)).sum(1), torch.ones(2))
    assert model.features(images).shape == (2, model.image.width)


def test_of_averaged_weights_the_average_is_loaded() -> None:
    method, config = towers()
    method.keep_average(0.9)
    assert method.average is not None
    with torch.no_grad():
        for parameter in method.average.module.parameters():
            parameter.mul_(1.1)
    model = Trained(inputs.of_pairs("CLIP", method, config), method.state_dict())
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = unit_rows(method.average.module.image(images))  # type: ignore[operator]
    torch.testing.assert_close(model.encode_image(images), expected)


def methods() -> dict[str, Method]:
    torch.manual_seed(0)
    simclr = SimClrConfig(data="mnist", image_size=16)
    moco = MoCoConfig(data="openmoji", image_size=16, version=3)
    dino = DINOConfig(data="mnist", image_size=16, image_model="tiny-vit", prototypes=8, hidden=8, dim=8)
    return {
        "simclr": SimCLR(Encoder(simclr), 0.2),
        "moco": MoCoV3(Encoder(moco, norm=True), mlp(128, 8, 128), temperature=0.2, momentum=0.9, steps=1),
        "dino": DINO(Student(dino), dino, 12),
        "dinov2": DINOv2(MaskedStudent(dino), dino, 12),
    }


@pytest.mark.parametrize("name", ["simclr", "moco", "dino", "dinov2"])
def test_of_a_run_on_images_alone_what_was_evaluated_is_loaded(name: str) -> None:
    method = methods()[name].eval()
    with torch.no_grad():
        for i, parameter in enumerate(method.evaluated.parameters()):  # a teacher that is not its student
            parameter.add_(0.01 * (1 + i % 3))
    model = Trained(inputs.of_images(name, method), method.state_dict())
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = method.evaluated.features(images)
    torch.testing.assert_close(model.encode_image(images), expected)
    torch.testing.assert_close(model.features(images), expected)
    assert model.dim == expected.shape[1]
    mean = [1.0] * 3 if name == "moco" else [0.0] * 3
    assert model.inputs["image"]["mean"] == mean  # emoji are inverted, digits are taken as they are
    with pytest.raises(UserError, match=f"{name} has no text tower; expected a run of clip or siglip"):
        model.encode_text("a digit")
    with pytest.raises(UserError, match="compares no images with texts"):
        model.probabilities(torch.eye(2))
    with pytest.raises(UserError, match="has no classes of its own; expected a run of ssl-kernels finetune"):
        model.classify(images)


def test_a_run_on_images_alone_says_what_it_is_fed(tmp_path: Path) -> None:
    from ssl_kernels.trainers import simclr

    (tmp_path / "data").mkdir()
    arguments = ["--data", str(patchworks(tmp_path / "data")), "--image-size", "16", "--batch-size", "16"]
    options = ["--epochs", "1", "--accelerator", "cpu", "--output-dir", str(tmp_path / "run")]
    assert simclr.main([*arguments, *options]) == 0
    model = ssl_kernels.trainers.load(tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.pt")
    assert torch.equal(model.image.trunk.state_dict()["stem.0.weight"], state["model"]["encoder.trunk.stem.0.weight"])
    assert model.encode_image(tmp_path / "data" / "red" / "2.png").shape == (1, 512)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 16, 16), r"expected uint8 \[N, 3, H, W\], got torch.float32 \[1, 3, 16, 16\]"),
        (torch.zeros(3, 16, 16, dtype=torch.uint8), r"got torch.uint8 \[3, 16, 16\]; the model normalises itself"),
        ([3.0], "expected one of Pillow or the path of a file, got float"),
    ],
)
def test_what_is_no_image_is_refused(model: Trained, images: Tensor, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        model.encode_image(images)


def test_what_is_no_run_is_refused(trained: TrainedRun, tmp_path: Path) -> None:
    state = torch.load(trained.folder / "last.pt")
    cases: list[tuple[Any, str]] = [
        ({**state, "inputs": {}}, "does not say what its networks are fed, for an older version wrote it"),
        ({name: value for name, value in state.items() if name != "inputs"}, "an older version wrote it"),
        ({"weights": 1}, "RUN: .* is not a checkpoint of this trainer"),
        ({**state, "model": {**state["model"], "text.mlp.0.bias": torch.ones(3)}}, "do not fit the networks"),
    ]
    for content, message in cases:
        torch.save(content, tmp_path / "last.pt")
        with pytest.raises(UserError, match=message):
            ssl_kernels.trainers.load(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="is not a readable checkpoint"):
        ssl_kernels.trainers.load(tmp_path)
    with pytest.raises(UserError, match=f"no checkpoint at {tmp_path}/nowhere; expected a run's folder or its last.pt"):
        ssl_kernels.trainers.load(tmp_path / "nowhere")
