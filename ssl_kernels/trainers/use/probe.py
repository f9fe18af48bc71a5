"""`ssl-kernels probe RUN DATA`: what a run's features are worth on any labelled folder, without training them further.

Nearest neighbours, a linear probe and few labels, each beside the same network untrained and beside raw pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tyro.conf import Positional

from ssl_kernels.trainers import inputs
from ssl_kernels.trainers.checkpoints import write_atomically
from ssl_kernels.trainers.data.images import resize
from ssl_kernels.trainers.evaluation.figures import FeatureFigure
from ssl_kernels.trainers.evaluation.probes import STAGES, Space, classification
from ssl_kernels.trainers.evaluation.progress import Stages
from ssl_kernels.trainers.ranges import SHARE_BELOW_ONE, at_least, require
from ssl_kernels.trainers.use import command
from ssl_kernels.trainers.use.command import UseConfig
from ssl_kernels.trainers.use.labelled import read_parts
from ssl_kernels.trainers.use.loading import device_of, load_run
from ssl_kernels.trainers.use.trained import Trained

RAW_SIZE = 32  # pixels a side of the images that are compared as they are


@dataclass(kw_only=True)
class ProbeConfig(UseConfig):
    """Classify held-out images of a labelled folder by a run's features: k-NN, a linear probe and few labels."""

    data: Positional[str]
    """A folder with a subfolder of images to each class, or `mnist`."""
    held_out_data: str = ""
    """Another such folder to test on; without it a share of DATA is held out."""
    held_out: float = 0.2
    """Share of each class that is held out."""
    split_seed: int = 0
    """Seed of the held-out split and of the choice of few labelled images."""
    embedding: bool = False
    """Probe the embedding that a run of clip or siglip compares with texts, instead of the trunk's features."""
    out: Path | None = None
    """File to write the figures to, as JSON."""

    def check(self) -> None:
        super().check()
        require(self, SHARE_BELOW_ONE, "held_out")
        require(self, at_least(0), "split_seed")


def untrained(model: Trained) -> Trained:
    """The same networks with random weights, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = inputs.image_tower(model.inputs["image"])
    about = {**model.inputs, "text": None, "classes": [], "weights": {"image": ""}}
    return Trained(about, tower.state_dict(), device=model.device)


def raw_pixels(images: Tensor, size: int) -> Tensor:
    """uint8 images as rows of numbers, no larger than 32 pixels a side."""
    return resize(images, min(size, RAW_SIZE)).flatten(1).float() / 255


def spaces_of(options: ProbeConfig, model: Trained, console: Console) -> tuple[list[Space], Tensor, Tensor]:
    """The features of both parts by the model, by the untrained network and as raw pixels; and the labels."""
    initial = untrained(model)
    encoders = (
        model.encode_image if options.embedding else model.features,
        initial.encode_image if options.embedding else initial.features,
        lambda images: raw_pixels(images, model.size),
    )
    widths: list[int] = []

    def encode(images: Tensor) -> Tensor:
        rows = [encoder(images) for encoder in encoders]
        widths[:] = [row.shape[1] for row in rows]
        return torch.cat(rows, 1)

    _, train, test = read_parts(
        model, options.data, options.held_out_data, options.held_out, options.split_seed, encode, options, console
    )
    split = zip(train.vectors.split(widths, 1), test.vectors.split(widths, 1), strict=True)
    spaces = [Space(gallery, queries) for gallery, queries in split]
    mean = spaces[-1].gallery.mean(0)  # most of what pixels share is the ground
    spaces[-1] = Space(spaces[-1].gallery - mean, spaces[-1].clean - mean)
    return spaces, train.labels, test.labels


def print_figures(console: Console, title: str, figures: Sequence[FeatureFigure]) -> None:
    """A line to each figure."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for column in ("model", "untrained", "raw pixels", "largest class"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("remarks")
    for figure in figures:
        scores = (figure.model, figure.initial, figure.raw, figure.chance)
        table.add_row(figure.name, *(f"{score:.3f}" for score in scores), figure.note)
    console.print(table)


def work(options: ProbeConfig, console: Console) -> None:
    model = load_run(options.run, device_of(options.device))
    spaces, labels, truth = spaces_of(options, model, console)
    with Stages(console) as stages:
        stages.plan(STAGES * len(spaces))
        figures = classification(spaces, labels, truth, np.random.default_rng((options.split_seed, 2)), stages)
    print_figures(console, f"accuracy of {model.name} on {options.data}", figures)
    if options.out is not None:
        content = json.dumps({"figures": [asdict(figure) for figure in figures]}, indent=2)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, lambda path: path.write_text(content + "\n"))
        console.print(f"written: {options.out}", highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None, prog: str = "ssl-kernels probe") -> int:
    return command.run(ProbeConfig, work, argv, prog)
