"""MoCo: a view finds its image among the keys of a momentum encoder (He 2019, arXiv 1911.05722).

Version 2 (Chen 2020, arXiv 2003.04297) contrasts with a queue of past keys:

    q = normalize(encoder(view 1))                          # [B, D]
    k = normalize(teacher(view 2))                          # [B, D], no gradient
    loss = cross_entropy([q . k, q @ queue.T] / tau, 0)
    after the optimizer's step:  teacher <- m teacher + (1 - m) encoder;  queue <- k

Version 3 (Chen 2021, arXiv 2104.02057) contrasts within the batch, both ways, through a prediction head:

    q1, q2 = normalize(predictor(encoder(view 1, view 2)));  k1, k2 = normalize(teacher(view 1, view 2))
    loss = 2 tau (cross_entropy(q1 @ k2.T / tau, diagonal) + cross_entropy(q2 @ k1.T / tau, diagonal))

**BatchNorm.** Where a query and its key are normalised with the same images, the net finds the key by the statistics
that both carry rather than by what it shows; the queue's keys, of other batches, do not carry them. He et al. shuffle
the keys among GPUs. Here each pass is cut into groups that are normalised on their own, as GPUs would, and keys are
shuffled among the groups: `--groups`. Version 3 has no queue: its negatives carry the same statistics as its positives.

Several processes compute what one does. The groups are those of the whole batch, so their number is a multiple of the
processes', each of which then normalises some on its own, or a divisor: then consecutive processes normalise one
together. Keys are shuffled among all processes either way, for a query's process has its key's group too. The queue is
the same everywhere. Running statistics, which are not trained with, are the mean of those of the processes.

Run it: `ssl-kernels train moco` or `python -m ssl_kernels.trainers.moco`. With no arguments it learns 4,000 digits
without their labels, in a minute or two on a laptop; the settings were chosen on a validation split of these digits
(`--evaluate-on validation`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels import KeyQueue, MoCoV3Loss
from ssl_kernels.distributed import gather_rows, world
from ssl_kernels.ops.unit_rows import unit_rows
from ssl_kernels.trainers import batch_norm, command, train_images
from ssl_kernels.trainers.data.batches import Batch
from ssl_kernels.trainers.data.image_data import ImageData
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.processes import own_share
from ssl_kernels.trainers.ranges import SHARE, Range, at_least, require
from ssl_kernels.trainers.self_supervised import Encoder, Method, MomentumMethod, SelfSupervisedConfig, mlp
from ssl_kernels.trainers.spread import spread


@dataclass
class MoCoConfig(SelfSupervisedConfig):
    """Train an encoder by momentum contrast. The defaults learn 4,000 digits in a minute or two.

    ssl-kernels train moco --data photos/ --image-model resnet50 --image-size 224 --output-dir runs/photos
    """

    output_dir: Path = Path("runs/moco")
    """Folder for logs, checkpoints and pictures."""

    version: Literal[2, 3] = 2
    """2: against a queue of keys; 3: within the batch, both ways, through a prediction head."""
    momentum: float = 0.98
    """The teacher's momentum at the start; it rises along a cosine to 1 at the last step. Use 0.999 (version 2) or 0.99
    (version 3) for long runs on large data."""
    queue_size: int = 2048
    """Keys in the queue (version 2); 65,536 on ImageNet. No more than the training images: each would then be among
    its own negatives."""
    groups: int = 4
    """Parts of a batch that BatchNorm normalises apart, with the keys shuffled among them, so that no query finds its
    key by the statistics of its batch (version 2). A multiple or a divisor of the number of processes."""

    def check(self) -> None:
        super().check()
        require(self, SHARE, "momentum")
        require(self, at_least(1), "groups", "queue_size")
        if self.version == 2:
            size = self.batch_size
            require(self, Range(f"a divisor of --batch-size {size}", lambda groups: size % groups == 0), "groups")
            if size // self.groups < 2:
                raise UserError(f"--groups: {self.groups} leaves one image of {size} to a group")


class MoCo(MomentumMethod):
    """MoCo v2: queries of one view against the keys of the other and a queue."""

    def __init__(
        self, encoder: Encoder, queue: KeyQueue, *, temperature: float, groups: int, momentum: float, steps: int
    ) -> None:
        super().__init__(encoder, momentum, steps)
        self.queue, self.temperature, self.groups = queue, temperature, groups
        self.fresh: list[Tensor] = []  # keys of this step's batches

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        first, second = batch["views"]
        q = unit_rows(in_groups(self.encoder, first, self.own_groups))
        keys = self.keys(second)
        k = keys[own_share().of(len(keys))]
        loss = K.info_nce_loss(q, k, self.queue.keys, 1 / self.temperature)
        self.fresh.append(keys)
        return loss, {"similarity": (q.detach() * k).sum(1).mean(), **spread(gather_rows(q))}

    @torch.no_grad()
    def keys(self, images: Tensor) -> Tensor:
        """Normalised keys [B, D] by the teacher, each batch-normalised with other images than its query was.

        They are those of all processes, each of which makes some of any.
        """
        images = gather_rows(images)
        order = torch.randperm(len(images)).to(images.device)
        own = images[order[own_share().of(len(images))]]
        shuffled = gather_rows(unit_rows(in_groups(self.teacher, own, self.own_groups)))
        return torch.empty_like(shuffled).index_copy_(0, order, shuffled)

    @property
    def own_groups(self) -> int:
        """Groups that this process normalises, one of them perhaps together with others."""
        return max(1, self.groups // own_share().world)

    def synchronise(self, device: torch.device) -> None:
        rank, processes = own_share()
        fits = Range(
            f"a multiple or a divisor of the {processes} processes",
            lambda groups: groups % processes == 0 or processes % groups == 0,
        )
        require(self, fits, "groups")
        together = processes // self.groups
        for first in range(0, processes, together) if together > 1 else ():
            group = dist.new_group(list(range(first, first + together)))  # which all processes have a part in making
            if rank // together == first // together:
                batch_norm.synchronise(self, device, cast(dist.ProcessGroup, group))

    def before_training(self, batches: Iterator[Batch]) -> None:
        """Fill the queue with keys of images: against random vectors the first lesson is that all images are alike."""
        missing = len(self.queue.keys)
        while missing > 0:
            keys = self.keys(next(batches)["views"][1])[:missing]
            self.queue.enqueue(keys)
            missing -= len(keys)

    def after_step(self, number: int) -> None:
        if self.groups > 1:
            batch_norm.average_statistics(self)
        super().after_step(number)
        self.queue.enqueue(torch.cat(self.fresh))
        self.fresh.clear()


class MoCoV3(MomentumMethod):
    """MoCo v3: predictions from either view against the teacher's keys of the other, within the batch."""

    def __init__(
        self, encoder: Encoder, predictor: nn.Module, *, temperature: float, momentum: float, steps: int
    ) -> None:
        super().__init__(encoder, momentum, steps)
        self.predictor, self.loss = predictor, MoCoV3Loss(temperature, group=world())

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        q1, q2 = (self.predictor(self.encoder(view)) for view in batch["views"])
        with torch.no_grad():
            k1, k2 = (self.teacher(view) for view in batch["views"])
        similarity = (unit_rows(q1.detach()) * unit_rows(k2)).sum(1).mean()
        return self.loss(q1, q2, k1, k2), {"similarity": similarity, **spread(gather_rows(q1))}


def in_groups(net: nn.Module, images: Tensor, groups: int) -> Tensor:
    """What a net makes of a batch of which every group is normalised on its own, as on a GPU of its own."""
    return torch.cat([net(part) for part in images.chunk(groups)])


def make_method(config: MoCoConfig, data: ImageData, steps: int) -> Method:
    schedule: dict[str, Any] = {"temperature": config.temperature, "momentum": config.momentum, "steps": steps}
    if config.version == 3:
        predictor = mlp(config.dim, config.hidden, config.dim, norm=True)
        return MoCoV3(Encoder(config, norm=True), predictor, **schedule)
    step, epoch = config.batch_size * config.accumulate, config.batch_size * len(data.batches)
    wanted = f"at least the {step} keys of a step and at most the {epoch} images of an epoch"
    require(config, Range(wanted, lambda size: step <= size <= epoch), "queue_size")
    return MoCo(Encoder(config), KeyQueue(config.queue_size, config.dim), groups=config.groups, **schedule)


def train(config: MoCoConfig, console: Console) -> None:
    train_images.train(f"MoCo v{config.version}", partial(make_method, config), config, console)


def main(argv: Sequence[str] | None = None, prog: str = "python -m ssl_kernels.trainers.moco") -> int:
    return command.run(MoCoConfig, train, argv, prog)


if __name__ == "__main__":
    raise SystemExit(main())
