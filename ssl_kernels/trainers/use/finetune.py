"""`ssl-kernels finetune RUN DATA`: a classifier on top of what a run has learned, by a labelled folder.

With `--freeze` the classifier alone is trained. Otherwise all is, each layer slower than the one above it (layer-wise
decay, Clark 2020, arXiv 2003.10555; Bao 2021, arXiv 2106.08254): what lies near the images needs the least change. The
table at the end has the held-out accuracy beside what needs no fine-tuning: a linear probe of the run as it was, raw
pixels, and always the largest class.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor
from tyro.conf import Positional

from ssl_kernels.trainers import batch_norm, command, inputs, loop, sharding, speed
from ssl_kernels.trainers.data.fault_log import FaultLog
from ssl_kernels.trainers.data.faults import Faults, roots_of
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation.report import Report
from ssl_kernels.trainers.fabric import make_fabric
from ssl_kernels.trainers.loop_config import LoopConfig
from ssl_kernels.trainers.optim import make_optimizer, parameter_groups
from ssl_kernels.trainers.processes import own_share
from ssl_kernels.trainers.ranges import SHARE_BELOW_ONE, Range, at_least, require
from ssl_kernels.trainers.use.accuracy import accuracy_of, evaluate, print_table
from ssl_kernels.trainers.use.classifier import Classifier, LabelledBatches, fingerprint_of
from ssl_kernels.trainers.use.command import UseConfig
from ssl_kernels.trainers.use.labelled import Part, read_parts
from ssl_kernels.trainers.use.loading import load_run
from ssl_kernels.trainers.use.probe import raw_pixels
from ssl_kernels.trainers.use.trained import Trained


@tyro.conf.configure(tyro.conf.PositionalMetavarFromFieldName)
@dataclass(kw_only=True)
class FinetuneConfig(LoopConfig):
    """Train a classifier on top of a run's image tower, by a folder with a subfolder of images to each class."""

    run: Positional[str] = ""
    """Folder of the run to start from, or one of its checkpoints."""
    data: Positional[str] = ""
    """A folder with a subfolder of images to each class, or `mnist`."""
    output_dir: Path = Path("runs/finetuned")
    """Folder for logs, checkpoints and pictures."""
    held_out_data: str = ""
    """Another such folder to test on; without it a share of DATA is held out."""
    held_out: float = 0.2
    """Share of each class that is held out."""
    split_seed: int = 0
    """Seed of the held-out split; independent of --seed."""
    on_error: Literal["skip", "stop"] = "skip"
    """What an image that cannot be read does: `skip` leaves it out and names it, `stop` ends the run."""
    freeze: bool = False
    """Train the classifier alone, above the features as they are."""
    layer_decay: float = 0.75
    """Factor on the learning rate from each layer to the one below it; 1 trains all layers alike."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the classes."""
    augment: bool = True
    """Crop the training images at random."""
    mirror: bool = False
    """Mirror half of the training images; leave it off where left and right mean something."""
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 32
    """Images per forward pass, over all processes."""
    lr: float = 1e-3
    """Peak learning rate of the classifier and of the topmost layers."""

    @property
    def leaves_parameters_unused(self) -> bool:
        return True  # a trunk of timm may

    def check(self) -> None:
        super().check()
        if not (self.run and self.data):
            raise UserError("RUN, DATA: expected the folder of a run and a labelled folder")
        if self.init_from:
            raise UserError("--init-from: RUN is what fine-tuning starts from; leave it out")
        require(self, SHARE_BELOW_ONE, "held_out", "label_smoothing")
        require(self, at_least(0), "split_seed")
        require(self, Range("a number in (0, 1]", lambda value: 0 < value <= 1), "layer_decay")


def read(base: Trained, config: FinetuneConfig, console: Console) -> tuple[list[str], Part, Part]:
    """The classes and both parts of the data; their vectors are the features of the run as it is, then raw pixels."""

    def encode(images: Tensor) -> Tensor:
        return torch.cat([base.features(images), raw_pixels(images, base.size)], 1)

    options = UseConfig(run=Path(config.run).expanduser(), on_error=config.on_error)
    return read_parts(
        base, config.data, config.held_out_data, config.held_out, config.split_seed, encode, options, console
    )


def train(config: FinetuneConfig, console: Console) -> None:
    """Train the classifier, evaluate it and report on both."""
    begun = time.perf_counter()
    fabric = make_fabric(config)
    console.quiet = not fabric.is_global_zero
    base = load_run(Path(config.run).expanduser(), fabric.device)
    classes, data, test = read(base, config, console)
    if len(data.labels) < config.batch_size:
        raise UserError(f"--batch-size: {config.batch_size} is more than the {len(data.labels)} images to train on")
    net = Classifier(base, len(classes), freeze=config.freeze, label_smoothing=config.label_smoothing)
    speed.apply(config, net, *([] if config.freeze else [net.tower.trunk]))
    batch_norm.synchronise(net, fabric.device)
    wrapped = fabric.setup_module(net)
    trunk = None if config.freeze else net.tower.trunk
    groups = parameter_groups(net, config.lr, config.weight_decay, trunk=trunk, layer_decay=config.layer_decay)
    optimizer: Any = fabric.setup_optimizers(make_optimizer(groups, config))
    batches = LabelledBatches(
        data, size=base.size, batch_size=config.batch_size, seed=config.seed, augment=config.augment,
        mirror=config.mirror, workers=config.workers, share=own_share(), background=base.background,
        faults=Faults(
            stop=config.on_error == "stop", flag="DATA", roots=roots_of(config.data, config.held_out_data)
        ),
    )  # fmt: skip
    said = {
        "method": f"{base.method} fine-tuned", "image": inputs.of_image(net.tower, background=base.background),
        "text": None, "classes": classes, "weights": {"image": "tower.", "classifier": "tower.head."},
    }  # fmt: skip

    def tuned() -> Trained | None:
        """What is evaluated, for the first process. All take part."""
        weights = sharding.whole(net.state_dict(), keep=fabric.is_global_zero)
        return Trained(said, weights, device=fabric.device) if fabric.is_global_zero else None

    def score() -> dict[str, float]:
        model = tuned()
        return {} if model is None else {"held_out_accuracy": accuracy_of(model, test, console)}

    with FaultLog(
        batches.faults, config.output_dir, console, resume=config.resume, writes=fabric.is_global_zero
    ) as left_out:
        result = loop.fit(
            fabric, wrapped, optimizer, batches, config, before_step=left_out.tell, evaluate=score, inputs=said,
            held_out=fingerprint_of(test.items, test.labels), console=console,
        )  # fmt: skip
    model = tuned()
    if model is None:
        return
    figures = evaluate(model, base, data, test, console)
    end = Report(console, config.output_dir, f"{base.name} fine-tuned on {config.data}", result, begun)
    end.draw_curves(figures)
    total_s = end.summarise(figures)
    print_table(console, end.title, result, figures, total_s)
    left_out.sum_up()
    end.name_files()


def main(argv: Sequence[str] | None = None, prog: str = "ssl-kernels finetune") -> int:
    return command.run(FinetuneConfig, train, argv, prog)
