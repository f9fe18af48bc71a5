"""A model's embeddings of many images and texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ssl_kernels.trainers.data.faults import Faults
from ssl_kernels.trainers.data.pairs import ImageTextPairs, Tokenize
from ssl_kernels.trainers.evaluation.progress import Stages

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class TwoTowers(Protocol):
    """What evaluation asks of a model: normalised embeddings of either side."""

    def encode_image(self, images: Tensor) -> Tensor: ...

    def encode_text(self, text: dict[str, Tensor]) -> Tensor: ...

    def eval(self) -> Any: ...


class Embedder:
    """A model's normalised embeddings [N, D] of images and texts, in fp32 on the CPU, in evaluation mode."""

    def __init__(
        self, fabric: Fabric, model: TwoTowers, tokenize: Tokenize, size: int, batch_size: int = 256,
        stages: Stages | None = None,
    ) -> None:  # fmt: skip
        self.fabric, self.model, self.tokenize, self.stages = fabric, model, tokenize, stages or Stages()
        model.eval()
        self.size, self.batch_size = size, batch_size

    def images(self, pairs: ImageTextPairs, faults: Faults) -> tuple[Tensor, ImageTextPairs]:
        """Embeddings of the images that can be read, and the pairs of these; `faults` is told of the others."""
        kept: list[int] = []

        def encode(part: range) -> Tensor:
            images, own = pairs.load_readable(part, self.size, faults)
            kept.extend(own)
            return self.model.encode_image(self._put(images)) if own else torch.empty(0)

        embedded = self._encode("images", len(pairs), encode)
        return embedded, pairs if len(kept) == len(pairs) else pairs.select(kept)

    def texts(self, captions: Sequence[str]) -> Tensor:
        def encode(part: range) -> Tensor:
            return self.model.encode_text(self._put(self.tokenize([captions[i] for i in part])))

        return self._encode("captions", len(captions), encode)

    def _put(self, data: Any) -> Any:
        return self.fabric.to_device(data)

    def _encode(self, what: str, n: int, encode: Callable[[range], Tensor]) -> Tensor:
        parts = [range(start, min(start + self.batch_size, n)) for start in range(0, n, self.batch_size)]
        self.stages.plan(len(parts))
        encoded = []
        with torch.no_grad(), self.fabric.autocast():
            for part in parts:
                self.stages.begin(what)
                encoded.append(encode(part).float().cpu())
        return torch.cat([part for part in encoded if len(part)] or [torch.empty(0, 0)])
