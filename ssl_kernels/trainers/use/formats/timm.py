"""timm's format: the image tower's trunk under timm's names, in a folder that `timm.create_model` takes.

`model.safetensors` has the trunk, and the classifier of a fine-tuned run; `config.json` has the architecture and what
it is fed; `head.safetensors` has what leads from the trunk's features to the embedding, if anything does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssl_kernels.trainers import timm_models, trunks
from ssl_kernels.trainers.use.formats.written import Written, compared, sample_images, save_tensors

if TYPE_CHECKING:
    from ssl_kernels.trainers.use.trained import Trained


REGISTER = f"import {timm_models.__name__}"  # what tells timm of tiny_resnet


def refusal(model: Trained) -> str | None:
    """Why timm cannot hold the model, if it cannot."""
    classifier = _classifier(model) if model.classes else ""
    if not isinstance(classifier, str):
        return f"{model.inputs['image']['model']} has several classifiers in timm, the run has one"
    return None


def architecture(model: Trained) -> tuple[str, dict[str, Any]]:
    """timm's name of the trunk, and the arguments that build one of its sizes."""
    image = model.inputs["image"]
    if image["model"] == trunks.TINY:
        return timm_models.NAME, {"img_size": image["size"]}
    any_size = {"dynamic_img_size": True} if image["any_size"] else {}
    if image["model"] == trunks.TINY_VIT:
        return "vit_tiny_patch16_224", {**trunks.TINY_VIT_SIZES, "img_size": image["size"], **any_size}
    name = image["model"].split(".")[0]  # without the name of pretrained weights
    return name, image["options"]


def create(model: Trained, **options: Any) -> nn.Module:
    """timm's own model of the trunk's architecture, with a class for each of the run's."""
    import timm

    name, arguments = architecture(model)
    built: nn.Module = timm.create_model(name, num_classes=len(model.classes), **arguments, **options)
    return built.eval()


def normalise(model: Trained, images: Tensor) -> Tensor:
    """uint8 images as a network of timm takes them."""
    image = model.inputs["image"]
    mean, std = (torch.tensor(image[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    return (images / 255 - mean) / std


def write(model: Trained, folder: Path) -> Written:
    """Write the folder, and load it as `timm.create_model` does."""
    weights = folder / "model.safetensors"
    tensors: dict[str, Tensor] = dict(model.image.trunk.state_dict())
    if model.classifier is not None:
        tensors |= {f"{_classifier(model)}.{name}": value for name, value in model.classifier.state_dict().items()}
    save_tensors(tensors, weights)
    files = [weights, folder / "config.json"]
    files[1].write_text(json.dumps(config(model), indent=2) + "\n", encoding="utf-8")
    if model.inputs["image"]["dim"] is not None:
        files.append(folder / "head.safetensors")
        save_tensors(model.image.head.state_dict(), files[-1])

    loaded = create(model, checkpoint_path=str(weights))
    images = sample_images(model)
    with torch.no_grad():
        theirs = loaded(normalise(model, images))
    ours = model.classify(images) if model.classes else model.features(images)
    difference = compared("timm", {"trunk": (ours, theirs.softmax(1) if model.classes else theirs)})
    return Written(files, difference, _usage(model))


def config(model: Trained) -> dict[str, Any]:
    """What timm asks of a `config.json`."""
    image, (name, arguments) = model.inputs["image"], architecture(model)
    about = {
        "custom_load": False, "input_size": [image["channels"], image["size"], image["size"]],
        "fixed_input_size": "img_size" in arguments and not image["any_size"], "interpolation": image["interpolation"],
        "crop_pct": 1.0, "crop_mode": "center", "mean": image["mean"], "std": image["std"],
        "num_classes": len(model.classes), "classifier": _classifier(model),
    }  # fmt: skip
    names = {"label_names": model.classes} if model.classes else {}
    needs = {"requires": REGISTER} if name == timm_models.NAME else {}  # which timm passes over, and people read
    return {
        "architecture": name, **needs, "num_classes": len(model.classes), "num_features": model.image.width, **names,
        "model_args": arguments, "pretrained_cfg": about,
    }  # fmt: skip


def _classifier(model: Trained) -> Any:
    """What timm calls the architecture's classifier."""
    import timm

    name, _ = architecture(model)
    about = timm.get_pretrained_cfg(name)
    assert about is not None  # of what timm has
    return about.classifier


def _usage(model: Trained) -> str:
    name, arguments = architecture(model)
    options = "".join(f", {key}={value}" for key, value in arguments.items())
    what = "net" if model.classes else "trunk"
    lines = [
        "```python", "import timm", "import torch", "from PIL import Image", "from safetensors.torch import load_file",
        *([f"{REGISTER}  # {name} is not timm's own"] if name == timm_models.NAME else []), "",
        f'{what} = timm.create_model("{name}", num_classes={len(model.classes)},'
        f' checkpoint_path="model.safetensors"{options}).eval()',
        '# or, by the name of this folder: timm.create_model("local-dir:FOLDER", pretrained=True)',
        f"transform = timm.data.create_transform(input_size=(3, {model.size}, {model.size}), crop_pct=1.0,",
        f'    interpolation="bilinear", mean={model.inputs["image"]["mean"]}, std={model.inputs["image"]["std"]})',
        'images = transform(Image.open("photo.jpg").convert("RGB"))[None]',
        f"output = {what}(images)  # {'logits of the classes' if model.classes else 'features'}",
    ]  # fmt: skip
    if model.inputs["image"]["head"] == "linear":
        lines += [
            'head = load_file("head.safetensors")["weight"]',
            "embedding = torch.nn.functional.normalize(output @ head.T)",
        ]
    return "\n".join([*lines, "```", ""])
