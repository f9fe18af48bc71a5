"""From a configuration to a trained encoder of images: the run that SimCLR, MoCo and DINO share."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from torch import Tensor

from ssl_kernels.trainers import chunks, init_from, inputs, loop, sharding, speed
from ssl_kernels.trainers.data import openmoji
from ssl_kernels.trainers.data.fault_log import FaultLog
from ssl_kernels.trainers.data.image_data import ImageData, load
from ssl_kernels.trainers.data.pixels import parse_colour
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation import during, features, probes
from ssl_kernels.trainers.evaluation.figures import FeatureFigure, print_features
from ssl_kernels.trainers.evaluation.progress import Stages
from ssl_kernels.trainers.evaluation.report import Report
from ssl_kernels.trainers.fabric import make_fabric
from ssl_kernels.trainers.optim import make_optimizer
from ssl_kernels.trainers.processes import own_share
from ssl_kernels.trainers.self_supervised import Encoder, Method, SelfSupervisedConfig
from ssl_kernels.trainers.steps import total_steps

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def train(
    name: str, make_method: Callable[[ImageData, int], Method], config: SelfSupervisedConfig, console: Console, *,
    draw: bool = False, chunk_size: int = 0,
) -> None:  # fmt: skip
    """Train what `make_method` builds for the data and a number of steps, and set its features beside the baselines.

    `draw` also writes a picture of the features. With `chunk_size` so many images go through the nets at a time; the
    method is then `InParts`.
    """
    begun = time.perf_counter()
    config.find_data()
    fabric = make_fabric(config)
    console.quiet = not fabric.is_global_zero
    data = load(config, batch_size=config.batch_size, seed=config.seed, workers=config.workers, share=own_share())
    data.found.print(console, data.faults)
    method = make_method(data, total_steps(data.batches, config))
    init_from.initialise(config, method, console)
    initial = copy.deepcopy(method.evaluated)
    speed.apply(config, method, method.encoder.trunk)
    method.synchronise(fabric.device)
    wrapped = fabric.setup_module(method)
    optimizer = make_optimizer(method.parameter_groups(config), config)
    wrapped_optimizer: Any = fabric.setup_optimizers(optimizer)
    if config.resume is None:
        with fabric.autocast():  # an epoch that training does not reach has other views
            method.before_training(map(fabric.to_device, data.batches.batches(config.epochs)))

    def score() -> dict[str, float]:
        trained = whole_encoder(fabric, method, initial)
        if trained is None:
            return {}
        return during.of_features(
            features_of(fabric, trained), data.train, data.held_out, data.view, config.image_size, config.split_seed,
            data.faults,
        )  # fmt: skip

    if config.eval_every and not len(data.held_out):
        raise UserError("--eval-every: no image is held out; --held-out is a share of each class, rounded")
    step = chunks.in_chunks(fabric, wrapped, cast(chunks.InParts, method), chunk_size) if chunk_size else None
    left_out = FaultLog(data.faults, config.output_dir, console, resume=config.resume, writes=fabric.is_global_zero)

    def before_step(number: int) -> None:
        left_out.tell()
        method.before_step(number, optimizer.param_groups)

    with left_out:
        result = loop.fit(
            fabric, wrapped, wrapped_optimizer, data.batches, config, console=console, step=step,
            before_step=before_step, after_backward=method.after_backward, after_step=method.after_step,
            evaluate=score,
            inputs=inputs.of_images(name, method, parse_colour(config.background)),
        )  # fmt: skip
    trained = whole_encoder(fabric, method, initial)
    if trained is None:
        return

    end = Report(console, config.output_dir, f"{name} on {config.data}, seed {config.seed}", result, begun)
    end.draw_curves()
    with Stages(console) as stages:
        figures = evaluate(fabric, trained, initial, data, config, stages)
    total_s = end.summarise(figures, data.faults, data.found)
    end.draw_curves(figures)
    print_features(console, f"{end.title}, {config.evaluate_on} images", result, figures, total_s)
    if not figures and len(data.held_out):
        console.print("not evaluated: none of the held-out images can be read")
    elif not figures:
        console.print("not evaluated: no image is held out; --held-out is a share of each class, rounded")
    if config.data == "openmoji":
        console.print(openmoji.CREDIT)
    picture = end.folder / "features.png"
    if draw and draw_features(picture, end.picture_title, fabric, trained, initial, data, config):
        end.pictures.append(picture.name)
    left_out.sum_up()
    end.name_files()


def whole_encoder(fabric: Fabric, method: Method, initial: Encoder) -> Encoder | None:
    """A copy of what is evaluated, for the first process: one alone cannot call what lies in shards. All take part."""
    weights = sharding.whole(method.evaluated.state_dict(), keep=fabric.is_global_zero)
    if not fabric.is_global_zero:
        return None
    trained = copy.deepcopy(initial).to(method.evaluated.mean)
    trained.load_state_dict(weights)
    return trained


def features_of(fabric: Fabric, encoder: Encoder) -> probes.Encode:
    """What an encoder's trunk makes of images, in evaluation mode."""
    encoder.eval()

    @torch.no_grad()
    def encode(images: Tensor) -> Tensor:
        with fabric.autocast():
            return encoder.features(fabric.to_device(images)).float().cpu()

    return encode


def evaluate(
    fabric: Fabric, trained: Encoder, initial: Encoder, data: ImageData, config: SelfSupervisedConfig, stages: Stages
) -> list[FeatureFigure]:
    """What the features of the trained and of the initial encoder are worth."""
    return probes.report_card(
        features_of(fabric, trained), features_of(fabric, initial.to(trained.mean)), data.train, data.held_out,
        data.view, config.image_size, config.split_seed, data.faults, stages,
    )  # fmt: skip


@torch.no_grad()
def draw_features(
    path: Path, title: str, fabric: Fabric, trained: Encoder, initial: Encoder, data: ImageData,
    config: SelfSupervisedConfig,
) -> bool:  # fmt: skip
    """A few held-out images with what the nets make of their places: of each label some, where there are labels.

    False where the nets tell nothing of places.
    """
    images = data.held_out if len(data.held_out) else data.train
    order = torch.arange(len(images)) if images.labels is None else images.labels.argsort(stable=True)
    chosen = order[torch.linspace(0, len(order) - 1, min(10, len(order))).long()].tolist()
    shown, _ = images.load_readable(chosen, config.image_size, data.faults)
    if not len(shown):
        return False
    with fabric.autocast():
        on_device = fabric.to_device(shown)
        maps = {
            "features": trained.eval().feature_map(on_device),
            "before training": initial.to(trained.mean).eval().feature_map(on_device),
            "attention": trained.class_attention(on_device),
        }
    if maps["features"] is None:
        return False
    rows = {name: row.float().cpu() for name, row in maps.items() if row is not None}
    features.plot_features(path, shown, rows, openmoji.CREDIT if config.data == "openmoji" else "", title)
    return True
