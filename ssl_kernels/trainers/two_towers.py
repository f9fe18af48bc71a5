"""An image tower and a text tower that meet in a contrastive loss: what the CLIP and the SigLIP trainer share."""

from __future__ import annotations

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from ssl_kernels import use_backend
from ssl_kernels.distributed import gather_rows
from ssl_kernels.ema import ModelEma
from ssl_kernels.losses.in_group import LossInGroup
from ssl_kernels.ops.unit_rows import unit_rows
from ssl_kernels.trainers import batch_norm, chunks, init_from, inputs, loop, optim, sharding, speed
from ssl_kernels.trainers.data import Batch, DataConfig, fingerprint, load, openmoji
from ssl_kernels.trainers.data.faults import FaultLog
from ssl_kernels.trainers.data.pairs import ids_of_keys
from ssl_kernels.trainers.data.pixels import parse_colour
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation import curves, during, image_text, report, retrieval
from ssl_kernels.trainers.evaluation.probes import spread
from ssl_kernels.trainers.evaluation.progress import Stages
from ssl_kernels.trainers.fabric import make_fabric
from ssl_kernels.trainers.loop_config import LoopConfig
from ssl_kernels.trainers.models import (
    BUILT_IN,
    ImageTower,
    TowerConfig,
    image_tower,
    some_captions,
    text_tower,
    tokenizer,
)  # fmt: skip
from ssl_kernels.trainers.processes import own_share
from ssl_kernels.trainers.ranges import SHARE_BELOW_ONE, require

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CHECKED = 1024  # pairs of a batch
WATCHED = 256  # of them, whose spread is logged


@dataclass
class TwoTowerConfig(TowerConfig, DataConfig, chunks.ChunkConfig, LoopConfig):
    """What the command lines of image-text trainers have in common."""

    loss_backend: Literal["auto", "reference", "eager", "cpu", "triton"] = "auto"
    """Which code computes the loss; `reference` is plain PyTorch with the whole matrix of logits."""
    check_loss: bool = True
    """Compare every batch's loss, over its first 1,024 pairs, with the reference (and the reference, where it trains,
    with `auto`) and log both."""

    ema: float = 0.0
    """Momentum of a moving average of the towers' weights, which is then what is evaluated, such as 0.999; 0 keeps
    none. In the first steps the average follows faster."""

    @property
    def leaves_parameters_unused(self) -> bool:
        return self.image_model not in BUILT_IN

    def check(self) -> None:
        super().check()
        self.check_data()
        self.check_towers()
        self.check_chunks()
        require(self, SHARE_BELOW_ONE, "ema")


class Towers(nn.Module):
    """An image tower and a text tower, and their normalised embeddings."""

    def __init__(self, image: ImageTower, text: nn.Module) -> None:
        super().__init__()
        self.image, self.text = image, text

    def encode_image(self, images: Tensor) -> Tensor:
        return unit_rows(self.image(images))

    def encode_text(self, text: dict[str, Tensor]) -> Tensor:
        return unit_rows(self.text(**text))


class TwoTowerModel(Towers, ABC):
    """Two towers and a loss; a method adds its learned scalars and says how a batch is contrasted."""

    log_scale: nn.Parameter  # [1], for FSDP2 takes no parameter without dimension

    def __init__(
        self, image: ImageTower, text: nn.Module, loss: LossInGroup, backend: str = "auto", check: bool = False
    ) -> None:
        super().__init__(image, text)
        self.loss, self.backend, self.check = loss, backend, check
        self.average: ModelEma | None = None  # of the towers

    @abstractmethod
    def contrast(self, x: Tensor, y: Tensor, ids: Tensor | None, *learned: Tensor) -> Tensor:
        """The loss of normalised embeddings [B, D]; pairs that share an id are each other's positives."""

    def learned(self) -> tuple[Tensor, ...]:
        """The scalars that the loss takes."""
        return (self.log_scale,)

    def scalars(self, log_scale: Tensor, *_: Tensor) -> dict[str, Tensor]:
        """The same, as they are logged."""
        return {"logit_scale": log_scale.detach().exp()}

    def keep_average(self, momentum: float) -> None:
        """From now on keep a moving average of the towers, of this momentum."""
        self.average = ModelEma(Towers(self.image, self.text), momentum)

    @property
    def evaluated(self) -> Towers:
        """The towers that are the run's result."""
        return self if self.average is None else cast(Towers, self.average.module)

    def after_step(self, number: int) -> None:
        """What the method does after an optimizer step, counted from 1. At first the average follows faster, or short
        runs would be averaged with their random start."""
        if self.average is not None:
            momentum = min(self.average.momentum, number / (number + 9))
            self.average.update(Towers(self.image, self.text), momentum)

    def forward(self, batch: Batch, embed_alone: bool = False) -> tuple[Any, ...]:
        """The loss and what is logged; or the embeddings and the scalars, of which the loss is made elsewhere."""
        x, y = self.encode_image(batch["images"]), self.encode_text(batch["text"])
        return (x, y, *self.learned()) if embed_alone else self.measure(batch, x, y, *self.learned())

    def part(self, batch: Batch, rows: slice) -> Batch:
        return {"images": batch["images"][rows], "text": some_captions(batch["text"], rows)}

    def measure(self, batch: Batch, *embedded: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x, y, *learned = embedded
        ids = batch["ids"]
        if ids is not None and ids.ndim == 2:
            ids = ids_of_keys(ids)
        loss = self.contrast_by(self.backend, x, y, ids, *learned)
        metrics = {**self.scalars(*learned), **spread_of(x, y)}
        if self.check:
            with torch.no_grad():
                own = max(0, CHECKED - own_share().rank * len(x))  # of the first pairs of the batch
                x, y, ids = x[:own], y[:own], None if ids is None else ids[:own]
                checked = "auto" if self.backend == "reference" else self.backend
                metrics["loss_check"] = self.contrast_by(checked, x, y, ids, *learned)
                metrics["loss_reference"] = self.contrast_by("reference", x, y, ids, *learned)
        return loss, metrics

    def contrast_by(self, backend: str, x: Tensor, y: Tensor, ids: Tensor | None, *learned: Tensor) -> Tensor:
        with _backend(backend):
            return self.contrast(x, y, ids, *learned)


@torch.no_grad()
def spread_of(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """How far the images and the texts of the first pairs of a batch are spread, and in how many directions."""
    own = max(0, WATCHED - own_share().rank * len(x))
    both = gather_rows(torch.stack([x[:own], y[:own]], 1))
    spreads = {side: spread(both[:, i]) for i, side in enumerate(("image", "text"))}
    return {name.replace("embedding", side): value for side, named in spreads.items() for name, value in named.items()}


def _backend(name: str) -> AbstractContextManager[None]:
    return nullcontext() if name == "auto" else use_backend(name)  # `auto` leaves SSL_KERNELS_BACKEND in force


def try_loss(model: TwoTowerModel, config: TwoTowerConfig, fabric: Fabric) -> None:
    """Refuse a backend that this device or precision lacks before anything is read or written."""
    features = torch.ones(1, config.dim, device=fabric.device, dtype=model.log_scale.dtype)
    learned = [features.new_ones(1) for _ in model.learned()]  # the model's own may lie in shards
    try:
        model.contrast_by(config.loss_backend, features, features, None, *learned)
    except ValueError as error:
        raise UserError(f"--loss-backend: {error}") from None


def parameter_groups(model: TwoTowerModel, config: TwoTowerConfig) -> list[dict[str, Any]]:
    """A pretrained trunk may learn slower than the rest, then without weight decay: it would forget what it knows."""
    trunk = model.image.trunk
    slow = config.image_lr_factor < 1
    others = nn.ModuleList([model.image.head, model.text])
    scalars = list(model.parameters(recurse=False))
    rate, decay = config.lr * config.image_lr_factor, 0.0 if slow else config.weight_decay
    return [
        *optim.parameter_groups(trunk, rate, decay, trunk=trunk, layer_decay=config.layer_decay),
        *optim.parameter_groups(others, config.lr, config.weight_decay),
        {"params": scalars, "lr": config.lr, "peak_lr": config.lr, "weight_decay": 0.0},
    ]


def train(
    name: str, make_model: Callable[[ImageTower, nn.Module], TwoTowerModel], config: TwoTowerConfig, console: Console
) -> None:
    """Train the model that `make_model` puts together from its two towers, evaluate it and report on both."""
    begun = time.perf_counter()
    config.find_data()
    fabric = make_fabric(config)
    console.quiet = not fabric.is_global_zero
    # Drawings are mostly white: a tower that was not trained on photographs sees their ground as zero.
    image = image_tower(config, config.image_size, inverted=config.data == "openmoji" and not config.pretrained)
    towers = image, text_tower(config)
    model = make_model(*towers)
    if config.resume is None:
        init_from.initialise(config, model, console)
    # One process alone cannot call what lies in shards.
    evaluated = make_model(*copy.deepcopy(towers)) if config.strategy == "fsdp" and fabric.is_global_zero else model
    if config.ema:
        for whole in {model, evaluated}:
            whole.keep_average(config.ema)
    nets = ([] if config.image_locked else [image.trunk]) + ([] if config.text_model == "ngrams" else [towers[1]])
    speed.apply(config, model, *nets)
    batch_norm.synchronise(model, fabric.device)
    wrapped = fabric.setup_module(model)
    optimizer = optim.make_optimizer(parameter_groups(model, config), config)
    wrapped_optimizer: Any = fabric.setup_optimizers(optimizer)
    try_loss(model, config, fabric)
    tokenize = tokenizer(config)
    data = load(
        config, tokenize, batch_size=config.batch_size, seed=config.seed, workers=config.workers, share=own_share()
    )
    data.found.print(console, data.faults)

    if config.image_locked and not config.pretrained:
        console.print("note: the image tower is locked at random weights; --pretrained loads learned ones")
    if config.eval_every and data.held_out is None:
        raise UserError("--eval-every: no pair is held out; give --held-out or --held-out-data")

    def put_together() -> TwoTowerModel | None:
        """What is evaluated, for the first process. All take part."""
        weights = sharding.whole(model.state_dict(), keep=fabric.is_global_zero)
        if not fabric.is_global_zero:
            return None
        evaluated.to(model.image.mean).load_state_dict(weights)
        return evaluated

    def score() -> dict[str, float]:
        together = put_together()
        if together is None or data.held_out is None:
            return {}
        embedder = image_text.Embedder(fabric, together.evaluated, tokenize, config.image_size)
        return during.of_pairs(embedder, data.held_out, data.faults)

    held_out = "" if data.held_out is None else fingerprint.of_pairs(data.held_out.captions, data.held_out.images)
    step = chunks.in_chunks(fabric, wrapped, model, config.chunk_size) if config.chunk_size else None
    with FaultLog(
        data.faults, config.output_dir, console, resume=config.resume, writes=fabric.is_global_zero
    ) as left_out:
        result = loop.fit(
            fabric, wrapped, wrapped_optimizer, data.batches, config,
            step=step, before_step=left_out.tell, after_step=model.after_step, evaluate=score,
            held_out=held_out, console=console,
            inputs=inputs.of_pairs(name, model, config, parse_colour(config.background)),
        )  # fmt: skip
    if put_together() is None:
        return

    folder = config.output_dir
    figures: list[image_text.PairFigure] = []
    pictures: list[str] = []
    credit = openmoji.CREDIT if config.data == "openmoji" else ""
    title = f"{name} on {config.data}, seed {config.seed}"
    picture_title = f"{report.run_name(folder)}: {title}"
    if result.records:  # whose file may be lost
        curves.plot_curves(folder / "curves.png", result.records, picture_title)  # what is evaluated comes below them
    if data.held_out is not None:
        supervised = config.label_captions > 0
        with Stages(console) as stages:
            embedder = image_text.Embedder(fabric, evaluated.evaluated, tokenize, config.image_size, stages=stages)
            figures, similarity, shown = image_text.report_card(
                embedder, data.train, data.held_out, supervised, data.faults
            )
        if len(shown):
            remark = retrieval.plot_retrieval(
                folder / "retrieval.png", shown, similarity, config.image_size, credit, title=picture_title
            )
            report.print_remark(console, "retrieval.png", remark)
            pictures.append("retrieval.png")
        else:
            console.print("not evaluated: none of the held-out images can be read")
    if result.records:
        remark = curves.plot_curves(folder / "curves.png", result.records, picture_title, figures)
        report.print_remark(console, "curves.png", remark)
    total_s = time.perf_counter() - begun
    report.write_summary(folder / "summary.json", result, figures, total_s, data.faults, data.found)
    averaged = ", averaged weights" if config.ema else ""
    image_text.print_table(console, f"{title}, {config.evaluate_on} pairs{averaged}", result, figures, total_s)
    if credit:
        console.print(credit)
    left_out.sum_up()
    report.print_written(console, folder, *pictures)
