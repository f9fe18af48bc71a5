"""What the trainers that learn from images alone share: the encoder, the run and its report."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from ssl_kernels.ema import ModelEma
from ssl_kernels.schedules import cosine_momentum
from ssl_kernels.trainers import batch_norm, chunks, init_from, inputs, loop, sharding, speed
from ssl_kernels.trainers.data import openmoji
from ssl_kernels.trainers.data.batches import Batch
from ssl_kernels.trainers.data.faults import FaultLog
from ssl_kernels.trainers.data.pixels import parse_colour
from ssl_kernels.trainers.data.views import ImageConfig, ImageData, load
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation import curves, during, features, probes, report
from ssl_kernels.trainers.evaluation.progress import Stages
from ssl_kernels.trainers.fabric import make_fabric
from ssl_kernels.trainers.loop_config import LoopConfig
from ssl_kernels.trainers.models import BUILT_IN, TINY, ImageTower, keep_all_paths
from ssl_kernels.trainers.optim import make_optimizer, parameter_groups
from ssl_kernels.trainers.processes import own_share
from ssl_kernels.trainers.ranges import POSITIVE, SHARE_BELOW_ONE, at_least, require

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class SelfSupervisedConfig(ImageConfig, LoopConfig):
    """What the command lines of trainers on images alone have in common."""

    epochs: int = 14
    """Passes over the training images."""
    batch_size: int = 128
    """Images per forward pass. Each is seen in two views, and in DINO in its local crops too."""
    lr: float = 2e-3
    """Peak learning rate."""
    image_model: str = TINY
    """The built-in `tiny-resnet` or `tiny-vit`, or any timm model by name: resnet50, vit_small_patch16_224."""
    drop_path: float = 0.0
    """Largest probability with which a residual block is skipped for an image in training, which keeps deep networks
    from overfitting; it rises along the blocks. A teacher skips none. Each of several processes draws on its own."""
    hidden: int = 256
    """Width of the heads' hidden layers. Heads are dropped after training; the network below them is evaluated."""
    dim: int = 128
    """Size of the embedding in which views are compared."""
    temperature: float = 0.2
    """Divides the cosine similarities of embeddings."""

    @property
    def leaves_parameters_unused(self) -> bool:
        return self.image_model not in BUILT_IN

    def check(self) -> None:
        super().check()
        self.check_data()
        require(self, at_least(2, "images to tell apart"), "batch_size")
        require(self, at_least(1), "hidden", "dim")
        require(self, POSITIVE, "temperature")
        require(self, SHARE_BELOW_ONE, "drop_path")


class Encoder(ImageTower):
    """uint8 images [B, 3, H, W] to embeddings [B, D]: a backbone, whose features are the aim, and a head, by default an
    MLP, above features of the width that `make_head` is given."""

    def __init__(
        self, config: SelfSupervisedConfig, norm: bool = False, *, make_head: Callable[[int], nn.Module] | None = None,
        any_size: bool = False,
    ) -> None:  # fmt: skip
        inverted = config.data == "openmoji"
        super().__init__(
            config.image_model, config.image_size, config.dim, inverted=inverted, any_size=any_size,
            drop_path=config.drop_path,
        )  # fmt: skip
        if config.data == "mnist":  # the ground of a digit is zero already
            self.mean.zero_()
            self.std.fill_(1)
        head = make_head(self.width) if make_head else mlp(self.width, config.hidden, config.dim, norm=norm)
        self.head = head  # type: ignore[assignment]


def mlp(*widths: int, norm: bool = False) -> nn.Sequential:
    """Linear layers with ReLU between them; with `norm` each is followed by BatchNorm."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers.append(nn.Linear(before, after, bias=not norm))
        layers += [nn.BatchNorm1d(after)] if norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers[:-1])


class Method(nn.Module):
    """An encoder and how views of a batch are compared: a batch to (loss, metrics)."""

    encoder: Encoder

    @property
    def evaluated(self) -> Encoder:
        """Whose features are the run's result."""
        return self.encoder

    def synchronise(self, device: torch.device) -> None:
        """Normalise over several processes as over one."""
        batch_norm.synchronise(self, device)

    def parameter_groups(self, config: SelfSupervisedConfig) -> list[dict[str, Any]]:
        """What the optimizer is given."""
        return parameter_groups(self, config.lr, config.weight_decay)

    def before_training(self, batches: Iterator[Batch]) -> None:
        """What a new run starts with; the batches are an epoch's."""

    def before_step(self, number: int, groups: list[dict[str, Any]]) -> None:
        """What a schedule sets for an optimizer step, counted from 1; the groups are the optimizer's."""

    def after_backward(self, number: int) -> None:
        """What the method does to the gradients of a step."""

    def after_step(self, number: int) -> None:
        """What the method does after an optimizer step."""


class MomentumMethod(Method):
    """An encoder with a momentum teacher, whose momentum rises from `momentum` to 1 at the last of `steps` steps."""

    def __init__(self, encoder: Encoder, momentum: float, steps: int) -> None:
        super().__init__()
        self.encoder, self.teacher = encoder, ModelEma(encoder)
        keep_all_paths(self.teacher)
        self.momentum, self.steps = momentum, steps

    def momentum_at(self, number: int) -> float:
        """The momentum of the update after a step, counted from 1."""
        return cosine_momentum(number, self.steps, self.momentum)

    def after_step(self, number: int) -> None:
        self.teacher.update(self.encoder, self.momentum_at(number))


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
    method = make_method(data, loop.total_steps(data.batches, config))
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

    folder = config.output_dir
    title = f"{name} on {config.data}, seed {config.seed}"
    picture_title = f"{report.run_name(folder)}: {title}"
    if result.records:  # whose file may be lost
        curves.plot_curves(folder / "curves.png", result.records, picture_title)  # what is evaluated comes below them
    with Stages(console) as stages:
        figures = evaluate(fabric, trained, initial, data, config, stages)
    total_s = time.perf_counter() - begun
    report.write_summary(folder / "summary.json", result, figures, total_s, data.faults, data.found)
    if result.records:
        remark = curves.plot_curves(folder / "curves.png", result.records, picture_title, figures)
        report.print_remark(console, "curves.png", remark)
    probes.print_table(console, f"{title}, {config.evaluate_on} images", result, figures, total_s)
    if not figures and len(data.held_out):
        console.print("not evaluated: none of the held-out images can be read")
    elif not figures:
        console.print("not evaluated: no image is held out; --held-out is a share of each class, rounded")
    if config.data == "openmoji":
        console.print(openmoji.CREDIT)
    pictures = []
    if draw and draw_features(folder / "features.png", picture_title, fabric, trained, initial, data, config):
        pictures.append("features.png")
    left_out.sum_up()
    report.print_written(console, folder, *pictures)


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
) -> list[probes.FeatureFigure]:
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
