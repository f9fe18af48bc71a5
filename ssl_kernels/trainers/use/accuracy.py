"""What a fine-tuned run reached, beside what needs no fine-tuning to reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from ssl_kernels.trainers.evaluation import report
from ssl_kernels.trainers.evaluation.classifiers import linear_probe
from ssl_kernels.trainers.training import Result
from ssl_kernels.trainers.use.command import UseConfig
from ssl_kernels.trainers.use.embedding import all_images
from ssl_kernels.trainers.use.items import Items
from ssl_kernels.trainers.use.labelled import Part
from ssl_kernels.trainers.use.trained import Trained

_CAPTION = (
    "frozen probe: logistic regression on the run's features as they were; raw pixels: the same on small images;"
    " chance: always the largest class"
)


@dataclass
class ClassFigure:
    """One line of the closing table."""

    name: str
    model: float
    frozen_probe: float
    raw_pixels: float
    chance: float
    note: str = ""


def guess_of(tuned: Trained, test: Part, console: Console) -> Tensor:
    """The class [n] that a fine-tuned model says of each image."""
    items = Items(lambda: iter(test.items), len(test.items), "")
    return all_images(tuned, items, tuned.classify, UseConfig(run=Path()), console, "evaluating").vectors.argmax(1)


def accuracy_of(tuned: Trained, test: Part, console: Console) -> float:
    """How often that is right."""
    return float((guess_of(tuned, test, console) == test.labels).float().mean())


def evaluate(tuned: Trained, base: Trained, train: Part, test: Part, console: Console) -> list[ClassFigure]:
    """Accuracy on the part to test on, over all images and as the mean over the classes."""
    width = base.image.width
    parts = {"features": slice(0, width), "pixels": slice(width, None)}
    guesses = [
        guess_of(tuned, test, console),
        *(linear_probe(test.vectors[:, part], train.vectors[:, part], train.labels) for part in parts.values()),
        train.labels.mode().values.expand(len(test.labels)),
    ]
    right = torch.stack([guess == test.labels for guess in guesses]).double()  # [4, n]
    balanced = torch.stack([right[:, test.labels == label].mean(1) for label in test.labels.unique()]).mean(0)
    note = f"{len(train.labels)} images trained on, {len(test.labels)} held out"
    figures = []
    for name, scores, remark in (
        ("accuracy", right.mean(1), note),
        ("accuracy, balanced", balanced, "mean of classes"),
    ):
        model, probe, pixels, chance = scores.tolist()
        figures.append(ClassFigure(name, model, probe, pixels, chance, remark))
    return figures


def print_table(console: Console, title: str, result: Result, figures: Sequence[ClassFigure], total_s: float) -> None:
    """What the run reached, each figure beside what needs no fine-tuning to reach."""
    rows = [
        (figure.name, [f"{score:.3f}" for score in
                       (figure.model, figure.frozen_probe, figure.raw_pixels, figure.chance)], figure.note)
        for figure in figures
    ]  # fmt: skip
    training: list[report.Row] = []
    if result.records:
        first, last = result.records[0]["loss"], result.records[-1]["loss"]
        training.append(("training loss", [f"{last:.3f}", f"{first:.3f}"], "last, first step"))
    columns = ("fine-tuned", "frozen probe", "raw pixels", "chance")
    report.closing_table(console, title, _CAPTION, columns, rows, training, result, total_s)
