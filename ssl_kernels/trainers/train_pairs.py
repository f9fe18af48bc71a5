"""From a configuration to a trained image tower and text tower: the run that CLIP and SigLIP share."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import nn

from ssl_kernels.trainers import batch_norm, chunks, init_from, inputs, loop, optim, sharding, speed
from ssl_kernels.trainers.data import fingerprint, load, openmoji
from ssl_kernels.trainers.data.fault_log import FaultLog
from ssl_kernels.trainers.data.pixels import parse_colour
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation import during, image_text, retrieval
from ssl_kernels.trainers.evaluation.embedder import Embedder
from ssl_kernels.trainers.evaluation.figures import PairFigure, print_pairs
from ssl_kernels.trainers.evaluation.progress import Stages
from ssl_kernels.trainers.evaluation.report import Report
from ssl_kernels.trainers.fabric import make_fabric
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.models import image_tower, text_tower, tokenizer
from ssl_kernels.trainers.processes import own_share
from ssl_kernels.trainers.two_towers import TwoTowerConfig, TwoTowerModel

if TYPE_CHECKING:
    from lightning_fabric import Fabric


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
        embedder = Embedder(fabric, together.evaluated, tokenize, config.image_size)
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

    end = Report(console, config.output_dir, f"{name} on {config.data}, seed {config.seed}", result, begun)
    figures: list[PairFigure] = []
    credit = openmoji.CREDIT if config.data == "openmoji" else ""
    end.draw_curves()
    if data.held_out is not None:
        with Stages(console) as stages:
            embedder = Embedder(fabric, evaluated.evaluated, tokenize, config.image_size, stages=stages)
            figures, similarity, shown = image_text.report_card(
                embedder, data.train, data.held_out, config.label_captions > 0, data.faults
            )
        if len(shown):
            remark = retrieval.plot_retrieval(
                end.folder / "retrieval.png", shown, similarity, config.image_size, credit, title=end.picture_title
            )
            end.remark("retrieval.png", remark)
            end.pictures.append("retrieval.png")
        else:
            console.print("not evaluated: none of the held-out images can be read")
    end.draw_curves(figures)
    total_s = end.summarise(figures, data.faults, data.found)
    averaged = ", averaged weights" if config.ema else ""
    print_pairs(console, f"{end.title}, {config.evaluate_on} pairs{averaged}", result, figures, total_s)
    if credit:
        console.print(credit)
    left_out.sum_up()
    end.name_files()
