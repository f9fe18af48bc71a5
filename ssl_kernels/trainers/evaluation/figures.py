"""The figures of a run's evaluation, each beside what it is to be judged by, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from ssl_kernels.trainers.evaluation.report import Row, closing_table, loss_difference
from ssl_kernels.trainers.training import Result

_OF_FEATURES = (
    "initial: the same net before training; raw: centred pixels; raw + aug: with distorted copies in the gallery too;"
    " chance: always the largest class, or any image"
)
_OF_PAIRS = "baseline, where no other is remarked: captions matched by TF-IDF to training images, and those to pixels"
_WATCHED = (
    ("embedding_std", "1: spread evenly, 0: collapsed"),
    ("embedding_rank", "directions in use"),
    ("teacher_entropy_share", "of ln K, of an image; 1: teaches nothing, 0: one-hot"),
    ("marginal_entropy_share", "of ln K, of the batch's mean; 0: all images alike"),
    ("center_norm", "of the teacher's centre"),
    ("kl", "from the teacher to the student"),
)


@dataclass
class FeatureFigure:
    """What features reach, and beside it what takes no training to reach (see `probes`)."""

    name: str
    model: float
    initial: float
    raw: float
    raw_augmented: float | None
    chance: float
    note: str = ""


@dataclass
class PairFigure:
    """What a model of images and texts reaches, and what is to be had without it (see `image_text`)."""

    name: str
    model: float
    baseline: float | None
    chance: float
    majority: float | None = None
    note: str = ""


def print_features(
    console: Console, title: str, result: Result, figures: Sequence[FeatureFigure], total_s: float
) -> None:
    """What a run on images alone reached."""
    rows = [
        (f.name, _cells(f.model, f.initial, f.raw, f.raw_augmented, f.chance), f.note) for f in figures
    ]  # fmt: skip
    training: list[Row] = []
    if result.records:
        first, last = result.records[0], result.records[-1]
        training.append(("training loss", [f"{last['loss']:.3f}", f"{first['loss']:.3f}"], "last, first step"))
        for name, note in _WATCHED:
            if name in last:
                training.append((name.replace("_", " "), [f"{last[name]:.3g}", f"{first[name]:.3g}"], note))
    columns = ("model", "initial", "raw", "raw + aug", "chance")
    closing_table(console, title, _OF_FEATURES, columns, rows, training, result, total_s)


def print_pairs(console: Console, title: str, result: Result, figures: Sequence[PairFigure], total_s: float) -> None:
    """What a run on images and texts reached."""
    rows = [(f.name, _cells(f.model, f.baseline, f.chance, f.majority), f.note) for f in figures]
    training: list[Row] = []
    if result.records:
        first, last = result.records[0], result.records[-1]
        training.append(("training loss", [f"{first['loss']:.2f} -> {last['loss']:.2f}"], "first -> last step"))
        worst = loss_difference(result)
        if worst is not None:
            steps = sum("loss_reference" in record for record in result.records)
            remark = f"relative difference, worst of {steps} steps"
            training.append(("same loss by the reference", [f"{worst:.1e}"], remark))
        for name in ("image", "text"):
            if f"{name}_std" in last:
                cells = [f"{last[f'{name}_std']:.3g}, {last[f'{name}_rank']:.3g}"]
                training.append((f"spread of {name}s, directions", cells, "1: spread evenly, 0: collapsed"))
    columns = ("model", "baseline", "chance", "majority")
    caption = _OF_PAIRS if any(figure.baseline is not None for figure in figures) else ""
    closing_table(console, title, caption, columns, rows, training, result, total_s)


def _cells(*scores: float | None) -> list[str]:
    return ["" if score is None else f"{score:.3f}" for score in scores]
