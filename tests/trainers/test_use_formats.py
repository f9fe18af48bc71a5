"""What is exported is the run's model: loaded by timm, onnxruntime, torch.export, open_clip and transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TrainedRun
from PIL import Image
from safetensors.torch import load_file
from test_use import towers
from torch import nn

import ssl_kernels
from ssl_kernels import cli
from ssl_kernels.trainers import inputs
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.use.formats import written
from ssl_kernels.trainers.use.formats.onnx import tokenizer_source
from ssl_kernels.trainers.use.trained import Trained

TEXTS = ["red square number 0", "a dog on a sofa", ""]


@pytest.fixture(scope="module")
def model(trained: TrainedRun) -> Trained:
    return ssl_kernels.trainers.load(trained.folder)


def photograph() -> Image.Image:
    """An image of another size than the run's, and not square."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 55, 3), dtype=np.uint8))


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the code of a model card leaves, run as it is printed."""
    monkeypatch.chdir(folder)
    photograph().save("photo.jpg")
    scope: dict[str, Any] = {}
    for block in (folder / "README.md").read_text().split("```python\n")[1:]:
        exec(block.split("```")[0], scope)
    return scope


def pairs(method: str = "SigLIP", **settings: Any) -> Trained:
    """A model of untrained towers."""
    model, config = towers(method, **settings)
    return Trained(inputs.of_pairs(method, model, config), model.state_dict())


def tuned(image_model: str) -> Trained:
    """A fine-tuned model of untrained weights."""
    towers_, _ = towers(image_model=image_model)
    tower = towers_.image
    weights = {f"tower.{name}": value for name, value in tower.state_dict().items()}
    head = nn.Linear(tower.width, 3)
    weights |= {f"tower.head.{name}": value for name, value in head.state_dict().items()}
    about = {
        "method": "CLIP fine-tuned", "image": inputs.of_image(tower), "text": None, "classes": ["ant", "bee", "cat"],
        "weights": {"image": "tower.", "classifier": "tower.head."},
    }  # fmt: skip
    return Trained(about, weights)


def test_timm_loads_the_trunk_of_a_run(trained: TrainedRun, model: Trained, tmp_path: Path) -> None:
    import timm

    assert cli.main(["export", str(trained.folder), str(tmp_path / "new")]) == 0
    folder = tmp_path / "new"
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "head.safetensors", "model.safetensors",
    ]  # fmt: skip
    image = photograph()
    expected, embedding = model.features(image), model.encode_image(image)
    by_path = timm.create_model("tiny_resnet", checkpoint_path=str(folder / "model.safetensors"), img_size=16)
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    by_overlay = timm.create_model(
        "tiny_resnet", pretrained=True, img_size=16, pretrained_cfg_overlay={"file": str(folder / "model.safetensors")}
    )
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=by_folder))
    for trunk in (by_path, by_folder, by_overlay):
        with torch.no_grad():
            features = trunk.eval()(transform(image)[None])
        torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    head = load_file(folder / "head.safetensors")["weight"]
    again = torch.nn.functional.normalize(features @ head.T)
    torch.testing.assert_close(again, embedding, rtol=0, atol=1e-5)


def test_the_code_of_a_card_runs_as_printed_without_our_names(
    model: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    from ssl_kernels.trainers import timm_models

    model.export(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about["requires"] == "import ssl_kernels.trainers.timm_models"
    with monkeypatch.context() as patch:  # as in a program that has not met this library
        patch.delitem(timm.models._registry._model_entrypoints, "tiny_resnet")
        patch.delitem(sys.modules, "ssl_kernels.trainers.timm_models")
        patch.delattr(sys.modules["ssl_kernels.trainers"], "timm_models")
        with pytest.raises(RuntimeError, match="Unknown model"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
        found = run_card(tmp_path, patch)
    assert sys.modules["ssl_kernels.trainers.timm_models"] is timm_models
    torch.testing.assert_close(found["embedding"], model.encode_image(tmp_path / "photo.jpg"), rtol=0, atol=1e-5)
    pairs(image_model="test_resnet").export(tmp_path / "of timm")
    assert "requires" not in json.loads((tmp_path / "of timm" / "config.json").read_text())
    assert "ssl_kernels.trainers" not in (tmp_path / "of timm" / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"image_model": "tiny-vit", "image_head": "dinotxt"}, "vit_tiny_patch16_224"),
        ({"image_model": "test_resnet"}, "test_resnet"),
        ({}, "tiny_resnet"),  # of inverted images
    ],
)
def test_timm_loads_every_architecture(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    import timm

    model, image = pairs(**settings), photograph()
    model.export(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == name
    trunk = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=trunk))
    with torch.no_grad():
        torch.testing.assert_close(trunk(transform(image)[None]), model.features(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("image_model", ["tiny-resnet", "tiny-vit", "test_resnet"])
def test_timm_loads_a_classifier(image_model: str, tmp_path: Path) -> None:
    import timm

    model, image = tuned(image_model), photograph()
    model.export(tmp_path)
    net = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model=net))
    with torch.no_grad():
        found = net(transform(image)[None]).softmax(1)
    torch.testing.assert_close(found, model.classify(image), rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "config.json").read_text())["label_names"] == ["ant", "bee", "cat"]
    assert "- **Classes**: ant, bee, cat." in (tmp_path / "README.md").read_text()


def test_onnx_and_torch_export_run_both_towers(model: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    files = model.export(tmp_path, ["onnx", "torch-export"])
    assert {path.relative_to(tmp_path).as_posix() for path in files} == {
        "onnx/image.onnx", "onnx/text.onnx", "onnx/ngram_tokenizer.py", "torch_export/image.pt2",
        "torch_export/text.pt2", "README.md",
    }  # fmt: skip
    images = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)  # more than were exported with
    x, y = model.encode_image(images), model.encode_text(TEXTS)
    names: dict[str, Any] = {}
    exec((tmp_path / "onnx" / "ngram_tokenizer.py").read_text(), names)
    tokens = names["tokenize"](TEXTS)
    for name, given, expected in (("image", images.numpy(), x), ("text", tokens, y)):
        session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / f"{name}.onnx"))
        (found,) = session.run(None, {session.get_inputs()[0].name: given})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)
        program = torch.export.load(tmp_path / "torch_export" / f"{name}.pt2").module()
        torch.testing.assert_close(program(torch.from_numpy(given)), expected, rtol=0, atol=1e-5)
    found = run_card(tmp_path, monkeypatch)["text_embedding"]
    torch.testing.assert_close(torch.from_numpy(found), model.encode_text("a red circle"), rtol=0, atol=1e-5)


def test_the_tokenizer_beside_an_onnx_file_needs_no_torch() -> None:
    code = tokenizer_source(1000) + "\nimport sys\nprint(tokenize(['red dot', 'x']).tolist(), 'torch' in sys.modules)\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    from ssl_kernels.trainers.text_towers import NGramTokenizer
    from ssl_kernels.trainers.use.formats.towers import padded

    assert done.stdout.strip() == f"{padded(NGramTokenizer(1000)(['red dot', 'x'])).tolist()} False"


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "dinotxt"])
def test_onnx_and_torch_export_run_transformers(head: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pairs("CLIP", image_model="tiny-vit", image_head=head, text_model="transformer").export(
        tmp_path, ["onnx", "torch-export"]
    )
    assert (tmp_path / "onnx" / "text.onnx").stat().st_size > 2**20


@pytest.mark.parametrize("method", ["CLIP", "SigLIP"])
def test_open_clip_loads_both_towers(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    model, image = pairs(method, image_model="test_resnet", text_model="transformer"), photograph()
    model.export(tmp_path, ["open_clip"])
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    tokens = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'open_clip'}")(TEXTS)
    with torch.no_grad():
        x = theirs.eval().encode_image(transform(image)[None], normalize=True)
        y = theirs.encode_text(tokens, normalize=True)
        logits = theirs.get_logits(transform(image)[None], tokens)[0]
    torch.testing.assert_close(x, model.encode_image(image), rtol=0, atol=1e-5)
    torch.testing.assert_close(y, model.encode_text(TEXTS), rtol=0, atol=1e-5)
    chances = logits.softmax(1) if method == "CLIP" else logits.sigmoid()
    torch.testing.assert_close(chances, model.probabilities(x @ y.T), rtol=1e-4, atol=1e-6)
    assert set(run_card(tmp_path, monkeypatch)) >= {"model", "transform", "tokenize"}


@pytest.mark.parametrize("image_model", ["test_resnet", "tiny-vit"])
def test_transformers_loads_both_towers(image_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    model, image = pairs("CLIP", image_model=image_model, text_model="transformer"), photograph()
    model.export(tmp_path, ["transformers"])
    folder = tmp_path / "transformers"
    theirs = transformers.VisionTextDualEncoderModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*TEXTS, "a text of many more words than a tower with so short a context can read in one go"]
    given = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        pixels = processor(image, return_tensors="pt").pixel_values
        found = theirs(pixel_values=pixels, input_ids=given.input_ids, attention_mask=given.attention_mask)
    # Its resizing rounds otherwise, by less than a grey level.
    torch.testing.assert_close(found.image_embeds, model.encode_image(image), rtol=0, atol=2e-2)
    torch.testing.assert_close(found.text_embeds, model.encode_text(texts), rtol=0, atol=1e-5)
    assert float(theirs.logit_scale.detach().exp()) == pytest.approx(model.logit_scale, rel=1e-5)
    assert set(run_card(tmp_path, monkeypatch)) >= {"model", "processor", "tokenizer"}


@pytest.mark.parametrize(
    ("settings", "name", "reason"),
    [
        ({"text_model": "transformer"}, "open_clip", "builds timm's image towers, and tiny-resnet is none of them"),
        ({"image_model": "test_resnet"}, "open_clip", "has no n-gram text tower; train with --text-model transformer"),
        ({"image_model": "test_vit", "text_model": "transformer"}, "open_clip", "builds test_vit at its usual image"),
        (
            {"image_model": "test_vit", "text_model": "transformer", "image_head": "dinotxt"},
            "open_clip",
            "has no image head dinotxt",
        ),
        ({"image_model": "test_resnet"}, "transformers", "has no n-gram text tower"),
        (
            {"image_model": "tiny-vit", "text_model": "transformer", "image_head": "dinotxt"},
            "transformers",
            "has a linear image head, and the run has dinotxt",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    settings: dict[str, Any], name: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        pairs(**settings).export(tmp_path / "new", ["timm", name])
    assert str(refused.value).startswith(f"--format {name}: ")
    assert not (tmp_path / "new").exists()


def test_other_refusals(model: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="has no text tower, and open_clip's models have two"):
        tuned("test_resnet").export(tmp_path / "new", ["open_clip"])
    with pytest.raises(UserError, match="is written as --format timm, which transformers' AutoModel reads"):
        tuned("test_resnet").export(tmp_path / "new", ["transformers"])
    with pytest.raises(UserError, match=r"--format: expected some of timm, onnx, .*, got gguf"):
        model.export(tmp_path / "new", ["gguf"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match='missing onnx, onnxscript, onnxruntime; install the extra "export"'):
        model.export(tmp_path / "new", ["onnx"])


def test_what_is_written_wrong_is_not_said_to_be_written(
    model: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssl_kernels.trainers.use.formats.timm.normalise", lambda model, images: images / 200)
    with pytest.raises(UserError, match=r"--format timm: the trunk that was written is .* off the model's"):
        model.export(tmp_path)
    nan = torch.tensor([float("nan")])
    with pytest.raises(UserError, match="off the model's"):
        written.compared("timm", {"trunk": (nan, nan)})


def test_the_card_tells_what_the_model_is_and_reached(trained: TrainedRun, model: Trained, tmp_path: Path) -> None:
    model.export(tmp_path)
    page = (tmp_path / "README.md").read_text()
    figure = model.figures["text->image R@1"]
    assert f"| text->image R@1 | {figure['model']:.3f} | {figure['chance']:.3f} |" in page
    assert f"- **Similarity**: cosine times {model.logit_scale:.4g}, plus {model.logit_bias:.4g}." in page
    assert "3 channels, 16 x 16" in page
    assert "- epochs: 14" in page
    assert "The largest difference from the run's own output" in page
    assert "inverts them: white is 0" not in page
    pairs().export(tmp_path / "inverted")
    assert "inverts them: white is 0" in (tmp_path / "inverted" / "README.md").read_text()
    assert "The run was not evaluated." in (tmp_path / "inverted" / "README.md").read_text()
