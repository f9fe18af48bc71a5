"""The towers as modules of tensors to tensors, with all that belongs to them: what ONNX and torch.export take.

The image tower takes uint8 images and normalises them itself. The n-gram tower takes a row of tokens to each caption,
filled up with -1, for the other formats have no list of lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.text_towers import NGramTower
from ssl_kernels.trainers.use.formats.written import TEXTS, sample_images

if TYPE_CHECKING:
    from ssl_kernels.trainers.use.trained import Trained


class ImageModule(nn.Module):
    """uint8 images to what the model makes of them: unit embeddings, features, or probabilities of classes."""

    def __init__(self, tower: ImageTower, classifier: nn.Module | None, unit: bool) -> None:
        super().__init__()
        self.tower, self.classifier, self.unit = tower, classifier, unit

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.tower.head(self.tower.features(images))
        if self.classifier is not None:
            x = self.classifier(x).softmax(1)
        return F.normalize(x, dim=-1) if self.unit else x


class TokensModule(nn.Module):
    """Tokens of a transformer [N, context] to unit embeddings."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.tower(tokens), dim=-1)


class NGramsModule(nn.Module):
    """Tokens [N, L] of captions, filled up with -1, to unit embeddings."""

    def __init__(self, tower: NGramTower) -> None:
        super().__init__()
        self.weight, self.mlp = tower.embedding.weight, tower.mlp

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens >= 0).to(self.weight.dtype).unsqueeze(-1)  # [N, L, 1]
        rows = F.embedding(tokens.clamp(min=0), self.weight) * there
        mean = rows.sum(1) / there.sum(1).clamp(min=1)
        return F.normalize(self.mlp(mean), dim=-1)


def padded(tokens: dict[str, Tensor]) -> Tensor:
    """What the n-gram tokenizer returns, as a row [L] to each caption, filled up with -1."""
    bags = tokens["tokens"].tensor_split(tokens["offsets"][1:])
    return torch.nn.utils.rnn.pad_sequence(list(bags), batch_first=True, padding_value=-1)


@dataclass
class Tower:
    """A module, an example of its input, and which of the input's sizes may be others."""

    module: nn.Module
    example: tuple[Tensor]
    free: tuple[str, ...]  # the first dimensions, by name
    model: Trained

    def program(self) -> ExportedProgram:
        """What torch.export makes of it."""
        sizes = {i: Dim(name, min=1) for i, name in enumerate(self.free)}
        return torch.export.export(self.module.eval(), self.example, dynamic_shapes=(sizes,))

    def expected(self) -> Tensor:
        """What the model itself makes of the example's texts or images."""
        if not isinstance(self.module, ImageModule):
            return self.model.encode_text(list(TEXTS))
        return self.model.classify(*self.example) if self.model.classes else self.model.encode_image(*self.example)


def towers(model: Trained) -> dict[str, Tower]:
    """The towers of a model on the CPU, by name."""
    image = ImageModule(model.image, model.classifier, model.text is not None)
    found = {"image": Tower(image, (sample_images(model),), ("batch",), model)}
    if isinstance(model.text, NGramTower):
        tokens = padded(model.tokenize(TEXTS))
        found["text"] = Tower(NGramsModule(model.text), (tokens,), ("batch", "length"), model)
    elif model.text is not None:
        found["text"] = Tower(TokensModule(model.text), (model.tokenize(TEXTS)["text"],), ("batch",), model)
    return found
