"""SimCLR: a view finds the other view of its image among all views of the batch (Chen 2020, arXiv 2002.05709).

    z = normalize(head(backbone([view 1; view 2])))         # [2B, D]
    loss = mean over rows i of cross_entropy(z_i @ z_k / tau over k != i, the other view of i)

Run it: `ssl-kernels train simclr` or `python -m ssl_kernels.trainers.simclr`. With no arguments it learns 4,000 digits
without their labels, in a minute or two on a laptop; the settings were chosen on a validation split of these digits
(`--evaluate-on validation`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ssl_kernels import NTXentLoss
from ssl_kernels.distributed import gather_rows, world
from ssl_kernels.trainers import command, train_images
from ssl_kernels.trainers.chunks import ChunkConfig
from ssl_kernels.trainers.data.batches import Batch
from ssl_kernels.trainers.self_supervised import Encoder, Method, SelfSupervisedConfig
from ssl_kernels.trainers.spread import spread


@dataclass
class SimClrConfig(ChunkConfig, SelfSupervisedConfig):
    """Train an encoder by contrast within the batch. The defaults learn 4,000 digits in a minute or two.

    ssl-kernels train simclr --data photos/ --image-model resnet50 --image-size 224 --output-dir runs/photos
    """

    output_dir: Path = Path("runs/simclr")
    """Folder for logs, checkpoints and pictures."""

    norm: bool = True
    """BatchNorm in the projection head."""

    def check(self) -> None:
        super().check()
        self.check_chunks()


class SimCLR(Method):
    """Both views through one encoder, in one batch."""

    def __init__(self, encoder: Encoder, temperature: float) -> None:
        super().__init__()
        self.encoder, self.loss = encoder, NTXentLoss(temperature, group=world())

    def forward(self, batch: Batch, embed_alone: bool = False) -> tuple[Any, ...]:
        """The loss and what is logged; or the embeddings, of which the loss is made elsewhere."""
        z0, z1 = self.encoder(torch.cat(batch["views"])).chunk(2)
        return (z0, z1) if embed_alone else self.measure(batch, z0, z1)

    def part(self, batch: Batch, rows: slice) -> Batch:
        return {"views": [view[rows] for view in batch["views"]]}

    def measure(self, batch: Batch, *embedded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        z0, z1 = embedded
        return self.loss(z0, z1), spread(gather_rows(z0))


def train(config: SimClrConfig, console: Console) -> None:
    train_images.train(
        "SimCLR", lambda data, steps: SimCLR(Encoder(config, norm=config.norm), config.temperature), config, console,
        chunk_size=config.chunk_size,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None, prog: str = "python -m ssl_kernels.trainers.simclr") -> int:
    return command.run(SimClrConfig, train, argv, prog)


if __name__ == "__main__":
    raise SystemExit(main())
