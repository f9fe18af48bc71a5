"""open_clip's format: a folder for `open_clip.create_model_and_transforms("local-dir:FOLDER")`.

open_clip has an adapter for timm's networks, and our text transformer is its own, so that both towers fit as they are:
a model of timm with a linear head, at the image size that timm builds it for, and the text transformer.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ssl_kernels.trainers.trunks import BUILT_IN
from ssl_kernels.trainers.use.formats.timm import architecture, normalise
from ssl_kernels.trainers.use.formats.written import TEXTS, Written, compared, sample_images, save_tensors

if TYPE_CHECKING:
    from ssl_kernels.trainers.use.trained import Trained


def refusal(model: Trained) -> str | None:
    """Why open_clip cannot hold the model, if it cannot."""
    if model.text is None:
        return f"{model.name} has no text tower, and open_clip's models have two"
    image = model.inputs["image"]
    if image["model"] in BUILT_IN:
        return f"open_clip builds timm's image towers, and {image['model']} is none of them"
    if image["head"] != "linear":
        return f"open_clip has no image head {image['head']}"
    if model.inputs["text"]["model"] == "ngrams":
        return "open_clip has no n-gram text tower; train with --text-model transformer"
    return _size_refusal(model)


def _size_refusal(model: Trained) -> str | None:
    """open_clip does not tell timm the image size, on which a vision transformer's weights depend."""
    import timm

    name, _ = architecture(model)
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0).state_dict()
    ours = model.image.trunk.state_dict()
    other = [key for key, value in theirs.items() if key not in ours or ours[key].shape != value.shape]
    if other or theirs.keys() != ours.keys():
        return f"open_clip builds {name} at its usual image size, and the run has {model.size} pixels"
    return None


def write(model: Trained, folder: Path) -> Written:
    """Write the folder, and load it as open_clip does."""
    files = [folder / "open_clip_model.safetensors", folder / "open_clip_config.json"]
    save_tensors(tensors(model), files[0])
    files[1].write_text(json.dumps(config(model), indent=2) + "\n", encoding="utf-8")

    import open_clip

    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # it tells a story
    try:
        loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    finally:
        logging.root.setLevel(level)
    images = sample_images(model)
    with torch.no_grad():
        x = loaded.eval().encode_image(normalise(model, images), normalize=True)
        y = loaded.encode_text(tokenize(list(TEXTS)), normalize=True)
    pairs = {"image tower": (model.encode_image(images), x), "text tower": (model.encode_text(list(TEXTS)), y)}
    usage = (
        "```python\nimport open_clip\n\n"
        f'model, _, transform = open_clip.create_model_and_transforms("local-dir:{folder.name}")\n'
        f'tokenize = open_clip.get_tokenizer("local-dir:{folder.name}")\n```\n'
    )
    return Written(files, compared("open_clip", pairs), usage)


def tensors(model: Trained) -> dict[str, Tensor]:
    """The weights under open_clip's names."""
    assert model.text is not None
    assert model.logit_scale is not None
    scalars = {"logit_scale": torch.tensor(model.logit_scale).log()}
    if model.logit_bias is not None:
        scalars["logit_bias"] = torch.tensor(model.logit_bias)
    return {
        **{f"visual.trunk.{name}": value for name, value in model.image.trunk.state_dict().items()},
        **{f"visual.head.proj.{name}": value for name, value in model.image.head.state_dict().items()},
        **{f"text.{name}": value for name, value in model.text.state_dict().items()},
        **scalars,
    }


def config(model: Trained) -> dict[str, Any]:
    """What open_clip asks of an `open_clip_config.json`."""
    image, text = model.inputs["image"], model.inputs["text"]
    name, _ = architecture(model)
    return {
        "model_cfg": {
            "embed_dim": image["dim"], "custom_text": True,
            **({} if model.logit_bias is None else {"init_logit_bias": model.logit_bias}),
            "vision_cfg": {
                "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear",
                "image_size": image["size"],
            },
            "text_cfg": {
                "context_length": text["context_length"], "vocab_size": text["vocabulary"], "width": text["width"],
                "heads": text["width"] // 64, "layers": text["layers"],
            },
        },
        "preprocess_cfg": {
            "mean": image["mean"], "std": image["std"], "interpolation": image["interpolation"],
            "resize_mode": "shortest",
        },
    }  # fmt: skip
