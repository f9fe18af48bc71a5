"""What a checkpoint says of its networks besides their weights: how they are built again, and what they are fed.

`weights` has the prefixes of what was trained among the names of the checkpoint: what is evaluated, which with a
momentum teacher is the teacher.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ssl_kernels.trainers import models
from ssl_kernels.trainers.data.pixels import WHITE, Colour
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.models import TowerConfig
from ssl_kernels.trainers.text_towers import BpeTokenizer, NGramTokenizer, NGramTower

if TYPE_CHECKING:
    from ssl_kernels.trainers.self_supervised import Method
    from ssl_kernels.trainers.two_towers import TwoTowerModel

Inputs = dict[str, Any]  # of types that JSON knows


def of_pairs(method: str, model: TwoTowerModel, config: TowerConfig, background: Colour = WHITE) -> Inputs:
    """Of a run that trains an image tower and a text tower; transparent images lie over the background."""
    place = _place(model, model.evaluated)
    return {
        "method": method, "image": of_image(model.image, config.dim, background), "text": of_text(model.text, config),
        "weights": {"image": f"{place}image.", "text": f"{place}text.", "log_scale": "log_scale", "bias": "bias"},
    }  # fmt: skip


def of_images(method: str, trained: Method, background: Colour = WHITE) -> Inputs:
    """Of a run on images alone, whose features are those of the encoder's trunk."""
    encoder = trained.evaluated
    image = of_image(encoder, background=background)
    return {"method": method, "image": image, "text": None, "weights": {"image": _place(trained, encoder)}}


def _place(model: nn.Module, part: nn.Module) -> str:
    """What stands before the names of a part's weights among those of the model."""
    name = next(name for name, module in model.named_modules() if module is part)
    return f"{name}." if name else ""


def of_image(tower: ImageTower, dim: int | None = None, background: Colour = WHITE) -> Inputs:
    """Of an image tower; without `dim` its head is not kept."""
    mean, std = (values.flatten().tolist() for values in (tower.mean, tower.std))
    return {
        "model": tower.name, "options": tower.options, "any_size": tower.any_size, "width": tower.width,
        "head": dim and tower.head_kind, "dim": dim, "size": tower.size, "channels": len(mean), "mean": mean,
        "std": std, "inverted": std[0] < 0, "interpolation": "bilinear", "crop": "centre",
        "background": list(background),
    }  # fmt: skip


def of_text(tower: nn.Module, config: TowerConfig) -> Inputs:
    """Of a text tower and its tokenizer."""
    if isinstance(tower, NGramTower):
        table = tower.embedding
        own = {"tokenizer": "ngrams", "buckets": table.num_embeddings, "width": table.embedding_dim}
    else:
        own = {  # its vocabulary is the package's
            "tokenizer": "open_clip", "vocabulary": tower.vocab_size, "context_length": config.context_length,
            "width": config.text_width, "layers": config.text_layers,
        }  # fmt: skip
    return {"model": config.text_model, "dim": config.dim, **own}


def image_tower(inputs: Inputs) -> ImageTower:
    """The image tower with random weights; where its head is not kept, features pass through."""
    tower = ImageTower(
        inputs["model"], inputs["size"], inputs["dim"] or 1, head=inputs["head"] or "linear",
        any_size=inputs["any_size"],
    )  # fmt: skip
    if inputs["dim"] is None:
        tower.head = nn.Identity()  # type: ignore[assignment]
    for name in ("mean", "std"):
        getattr(tower, name).copy_(torch.tensor(inputs[name]).view(1, -1, 1, 1))
    return tower


def text_tower(inputs: Inputs) -> nn.Module:
    """The text tower with random weights."""
    if inputs["model"] == "ngrams":
        return NGramTower(inputs["dim"], inputs["buckets"], inputs["width"])
    sizes = {"text_width": inputs["width"], "text_layers": inputs["layers"]}
    config = TowerConfig(text_model="transformer", context_length=inputs["context_length"], dim=inputs["dim"], **sizes)
    return models.text_tower(config)


def tokenizer(inputs: Inputs) -> NGramTokenizer | BpeTokenizer:
    """The tokenizer that goes with it."""
    if inputs["tokenizer"] == "ngrams":
        return NGramTokenizer(inputs["buckets"])
    return BpeTokenizer(inputs["context_length"])


def part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The weights whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
