"""What a run has trained, ready to be used: networks that embed images and texts."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssl_kernels.ops.unit_rows import unit_rows
from ssl_kernels.trainers import inputs as described
from ssl_kernels.trainers.data.pixels import Colour
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.use.pixels import ImageLike, batches_of, to_pixels

Images = ImageLike | Tensor | Iterable[ImageLike]


class Trained:
    """The networks of a run, in evaluation mode and without gradients.

    Args:
        inputs: what the checkpoint says of the networks, as `ssl_kernels.trainers.inputs` writes it.
        weights: the checkpoint's weights, by name.
        device: where the networks lie.
        config: the settings of the run.
        figures: what the run reached, by name, each beside what it is to be judged by.
        path: the checkpoint.

    `method` names the run's method, `size` is the height and width of its images, `classes` the names of a fine-tuned
    run's classes, `image` and `text` are the towers (`text` is None for a run on images alone), `logit_scale` and
    `logit_bias` the learned scalars, None where the method has none.
    """

    def __init__(
        self, inputs: described.Inputs, weights: dict[str, Tensor], *, device: str | torch.device = "cpu",
        config: dict[str, Any] | None = None, figures: dict[str, Any] | None = None, path: Path | None = None,
    ) -> None:  # fmt: skip
        self.inputs, self.config, self.figures, self.path = inputs, config or {}, figures or {}, path
        self.method, self.size = cast(str, inputs["method"]), cast(int, inputs["image"]["size"])
        self.background = cast(Colour, tuple(inputs["image"]["background"]))  # of transparent images
        self.classes: list[str] = inputs.get("classes", [])
        text = inputs["text"]
        with torch.random.fork_rng(devices=[]):  # whoever loads a model has random numbers of their own
            self.image = described.image_tower(inputs["image"])
            self.text = described.text_tower(text) if text else None
            self.classifier = nn.Linear(self.image.width, len(self.classes)) if self.classes else None
        self.tokenizer = described.tokenizer(text) if text else None

        places = inputs["weights"]
        whole = inputs["image"]["dim"] is not None  # or else the head is not kept
        _fill(self.image if whole else self.image.trunk, weights, places["image"] + ("" if whole else "trunk."))
        if self.text is not None:
            _fill(self.text, weights, places["text"])
        if self.classifier is not None:
            _fill(self.classifier, weights, places["classifier"])
        scale, bias = (weights.get(places.get(name, "")) for name in ("log_scale", "bias"))
        self.logit_scale = None if scale is None else float(scale.double().exp())
        self.logit_bias = None if bias is None else float(bias)
        for module in self.networks:
            module.eval().requires_grad_(False)
        self.to(device)

    def to(self, device: str | torch.device) -> Trained:
        """Move the networks to another device."""
        self.device = device
        for module in self.networks:
            module.to(device)
        return self

    @property
    def networks(self) -> list[nn.Module]:
        """All there are, the image tower first."""
        return [module for module in (self.image, self.text, self.classifier) if module is not None]

    @property
    def dim(self) -> int:
        """The width of the embeddings."""
        return cast(int, self.inputs["image"]["dim"] or self.image.width)

    @property
    def name(self) -> str:
        """How errors and tables call the model."""
        return f"{self.path.parent} ({self.method})" if self.path else self.method

    @functools.cached_property
    def checksum(self) -> str:
        """A digest of the weights and of how they are fed: models that embed alike have the same."""
        digest = hashlib.sha256(json.dumps(self.inputs, sort_keys=True).encode())
        for module in self.networks:
            for name, value in module.state_dict().items():
                digest.update(name.encode())
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def transform(self, image: ImageLike) -> Tensor:
        """An image of Pillow, or the file of one, as the run's evaluation saw it: uint8 [3, size, size]."""
        return to_pixels(image, self.size, self.background)

    def tokenize(self, texts: str | Sequence[str]) -> dict[str, Tensor]:
        """Texts as the text tower takes them."""
        if self.tokenizer is None:
            raise UserError(f"{self.name} has no text tower; expected a run of clip or siglip")
        return self.tokenizer([texts] if isinstance(texts, str) else texts)

    def encode_image(self, images: Images, batch_size: int = 256) -> Tensor:
        """Embeddings [N, dim] of images, in fp32 on the CPU: unit rows where the run compares images with texts, and
        the trunk's features as they are elsewhere.

        Args:
            images: one image or many, of Pillow or as paths of files; or a uint8 tensor [N, 3, H, W].
            batch_size: how many go through the network at a time.
        """
        return self._encode(self._batches(images, batch_size), self.image_embedding, self.dim)

    def features(self, images: Images, batch_size: int = 256) -> Tensor:
        """The features [N, width] of the image tower's trunk, below any head: what a classifier is trained on."""
        return self._encode(self._batches(images, batch_size), self.trunk_features, self.image.width)

    def classify(self, images: Images, batch_size: int = 256) -> Tensor:
        """The probability [N, C] of each of a fine-tuned run's `classes`."""
        return self._encode(self._batches(images, batch_size), self.class_probabilities, len(self.classes))

    def encode_text(self, texts: str | Sequence[str], batch_size: int = 256) -> Tensor:
        """Embeddings [N, dim] of one text or many: unit rows, in fp32 on the CPU."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        starts = range(0, len(texts), batch_size)
        return self._encode((self.tokenize(texts[i : i + batch_size]) for i in starts), self.text_embedding, self.dim)

    def probabilities(self, similarity: Tensor) -> Tensor:
        """What similarities [N, C] of images to C texts say: of SigLIP, how likely each text is by itself; of CLIP, how
        likely it is among the C."""
        if self.logit_scale is None:
            raise UserError(f"{self.name} compares no images with texts; expected a run of clip or siglip")
        logits = self.logit_scale * similarity
        return logits.softmax(1) if self.logit_bias is None else (logits + self.logit_bias).sigmoid()

    def export(self, folder: str | os.PathLike[str], formats: Sequence[str] = ("timm",)) -> list[Path]:
        """Write the model for others, and a card with the run's figures; returns the files.

        Args:
            folder: where to; it may hold an earlier export.
            formats: of `timm`, `onnx`, `torch-export`, `open_clip` and `transformers`, those to write.
        """
        from ssl_kernels.trainers.use.formats import export

        return export(self, Path(folder), formats)

    def image_embedding(self, images: Tensor) -> Tensor:
        """`encode_image` of uint8 images [N, 3, size, size] on the device."""
        x: Tensor = self.image(images)
        return unit_rows(x) if self.text is not None else x

    def text_embedding(self, tokens: dict[str, Tensor]) -> Tensor:
        """`encode_text` of what `tokenize` returns, on the device."""
        assert self.text is not None  # or tokenize had said so
        return unit_rows(self.text(**tokens))

    def trunk_features(self, images: Tensor) -> Tensor:
        """`features` of uint8 images [N, 3, size, size] on the device."""
        x = self.image.features(images)
        return cast(Any, self.image.trunk).forward_head(x, pre_logits=True) if self.image.reads_tokens else x

    def class_probabilities(self, images: Tensor) -> Tensor:
        """`classify` of uint8 images [N, 3, size, size] on the device."""
        if self.classifier is None:
            raise UserError(f"{self.name} has no classes of its own; expected a run of ssl-kernels finetune")
        return self.classifier(self.trunk_features(images)).softmax(1)

    def _batches(self, images: Images, batch_size: int) -> Iterable[Tensor]:
        return batches_of(images, self.size, batch_size, self.background)

    @torch.no_grad()
    def _encode(self, parts: Iterable[Any], encode: Callable[[Any], Tensor], width: int) -> Tensor:
        rows = [encode(_on(self.device, part)).float().cpu() for part in parts]
        return torch.cat(rows) if rows else torch.empty(0, width)


def _on(device: str | torch.device, part: Any) -> Any:
    return {name: x.to(device) for name, x in part.items()} if isinstance(part, dict) else part.to(device)


def _fill(module: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    try:
        module.load_state_dict(described.part(weights, prefix))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the checkpoint's weights do not fit the networks that it describes ({reason})") from None
