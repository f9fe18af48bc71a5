"""Batches larger than the nets of a process hold at a time: a trainer's step by gradient caching."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ssl_kernels import grad_cache
from ssl_kernels.trainers.data import Batch
from ssl_kernels.trainers.ranges import at_least, require
from ssl_kernels.trainers.training import Step

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class ChunkConfig:
    """The setting of trainers that compare what lies in a batch."""

    chunk_size: int = 0
    """Number of examples that go through a process's networks at a time; 0 means all of its batch. Loss and gradients
    are those of the whole batch, at the price of one more forward pass. BatchNorm normalises each chunk on its own."""

    def check_chunks(self) -> None:
        require(self, at_least(0), "chunk_size")


class InParts(Protocol):
    """A model of which `forward(batch, embed_alone=True)` gives what `measure` makes the loss of."""

    def part(self, batch: Batch, rows: slice) -> Batch:
        """Some examples of a batch."""

    def measure(self, batch: Batch, *embedded: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The loss of a batch's embeddings, and what is logged."""


def in_chunks(fabric: Fabric, wrapped: nn.Module, model: InParts, chunk_size: int) -> Step:
    """A step whose nets hold the activations of so many examples at a time."""

    def embed(batch: Batch, rows: Tensor) -> Any:
        return wrapped(model.part(batch, slice(int(rows[0]), int(rows[-1]) + 1)), embed_alone=True)

    def step(batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        rows = torch.arange(len(batch["images"] if "images" in batch else batch["views"][0]))
        (embedded,) = grad_cache([functools.partial(embed, batch)], [rows], chunk_size, modules=[wrapped])
        with fabric.autocast():
            return model.measure(batch, *embedded)

    return step
