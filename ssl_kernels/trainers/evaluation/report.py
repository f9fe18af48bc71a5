"""The closing table, the summary and the pictures of a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ssl_kernels.trainers.checkpoints import BEST, CHECKPOINT, write_atomically
from ssl_kernels.trainers.data.faults import EVALUATION, TRAINING, Faults
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.pairs import ImageTextPairs
from ssl_kernels.trainers.loggers import METRICS
from ssl_kernels.trainers.loop import Result

Row = tuple[str, Sequence[str], str]  # a name, the cells of the first columns, and a remark


def closing_table(
    console: Console, title: str, caption: str, columns: Sequence[str], figures: Sequence[Row], training: Sequence[Row],
    result: Result, total_s: float,
) -> None:  # fmt: skip
    """Print what the run reached, a line to each figure, and below how it got there: by what training, time, memory."""
    table = Table(title=title, title_justify="left", title_style="bold", caption=caption, caption_justify="left")
    table.add_column("", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("remarks")
    seconds = f"{result.elapsed_s:.0f} / {total_s:.0f}"
    speed = result.images_per_s
    costs: list[Row] = [
        ("seconds", [seconds], f"training ({result.steps} steps) / all"),
        *([] if speed is None else [("images a second", [f"{speed:.0f}"], "in training, without the first step")]),
        ("peak memory, MB", [f"{result.peak_mb:.0f}"], "CPU: whole process with its libraries"),
    ]
    for rows in (figures, [*training, *costs]):
        for name, cells, remark in rows:
            table.add_row(name, *cells, *[""] * (len(columns) - len(cells)), remark)
        table.add_section()
    console.print(table)
    for note in result.notes:
        console.print(note, highlight=False, soft_wrap=True)


def print_written(console: Console, folder: Path, *pictures: str) -> None:
    """Name the files of a finished run, `pictures` among them."""
    files = (CHECKPOINT, BEST, METRICS, "config.json", "tensorboard", "curves.png", "summary.json", *pictures)
    written = [folder / file for file in files if (folder / file).exists()]
    console.print("written:", *map(str, written), highlight=False, soft_wrap=True)


def loss_difference(result: Result) -> float | None:
    """The largest relative difference between the loss and the reference's; None if they were not compared."""
    compared = [r for r in result.records if "loss_reference" in r]
    differences = [abs(r["loss_check"] - r["loss_reference"]) / max(abs(r["loss_reference"]), 1e-12) for r in compared]
    return max(differences, default=None)


def write_summary(
    path: Path, result: Result, figures: Sequence[Any], total_s: float, faults: Faults | None = None,
    found: Found | None = None,
) -> None:  # fmt: skip
    """What a run reached, what was found of its data, and what of it was left out, for programs."""
    faults = Faults() if faults is None else faults
    first, last = (result.records[i]["loss"] if result.records else None for i in (0, -1))
    summary: dict[str, Any] = {
        "figures": [asdict(figure) for figure in figures], "loss_first": first, "loss_last": last,
        "loss_difference": loss_difference(result), "steps": result.steps, "training_s": result.elapsed_s,
        "data": None if found is None else found.as_dict(),
        "total_s": total_s, "peak_mb": result.peak_mb, "images_per_s": result.images_per_s, "notes": result.notes,
        "left_out": {of: faults.counts(of) for of in (TRAINING, EVALUATION)},
    }  # fmt: skip
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(summary, indent=2) + "\n"))


def plot_curves(path: Path, records: Sequence[dict[str, float]]) -> None:
    """Every logged metric over the steps."""
    names = [name for name in records[-1] if name not in ("step", "epoch", "elapsed_s", "loss_check", "loss_reference")]
    columns = 3
    rows = -(-len(names) // columns)
    figure, axes = _subplots(rows, columns, width=4 * columns, height=2.4 * rows)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(r["step"], r[name]) for r in records if name in r]
        axis.plot([step for step, _ in points], [value for _, value in points], linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        if name == "loss":
            axis.set_yscale("log")
    _save(figure, path)


def plot_retrieval(
    path: Path, pairs: ImageTextPairs, similarity: Tensor, size: int, credit: str = "", rows: int = 16, top: int = 6
) -> None:
    """Text queries with the images that lie nearest, the right one framed in green; `similarity` is text by image.

    The queries are spread evenly over the pairs, not picked for their success.
    """
    top, rows = min(top, len(pairs)), min(rows, len(pairs))
    queries = [round(i * (len(pairs) - 1) / max(1, rows - 1)) for i in range(rows)]
    figure, axes = _subplots(
        len(queries), top + 1, width=1.1 * top + 4, height=1.1 * len(queries), width_ratios=[3.2] + [1] * top
    )
    for row, query in zip(axes, queries, strict=True):
        subset = f"\n({pairs.subsets[query]})" if pairs.subsets else ""
        row[0].text(1, 0.5, _wrap(pairs.captions[query]) + subset, ha="right", va="center", fontsize=8)
        row[0].axis("off")
        nearest = similarity[query].topk(top).indices.tolist()
        for axis, index, image in zip(row[1:], nearest, pairs.load(nearest, size), strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy())
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                right = pairs.captions[index] == pairs.captions[query]
                spine.set(color="tab:green" if right else "lightgray", linewidth=3 if right else 1)
    figure.supxlabel(credit, fontsize=7)
    _save(figure, path)


def plot_features(path: Path, images: Tensor, maps: dict[str, Tensor], credit: str = "") -> None:
    """Images [n, 3, S, S] above maps [n, C, h, w] of them: a map of one channel as it is, others by their three
    principal components over all of the images, as red, green and blue. Alike features have alike colours.
    """
    rows, columns = 1 + len(maps), len(images)
    figure, axes = _subplots(rows, columns, width=1.1 * columns + 1, height=1.15 * rows + 0.2)
    for axis, image in zip(axes[0], images, strict=True):
        axis.imshow(image.permute(1, 2, 0).numpy())
    for row, (name, channels) in zip(axes[1:], maps.items(), strict=True):
        row[0].set_ylabel(name, fontsize=8)
        colours = channels if channels.shape[1] == 1 else principal_components(channels)
        for axis, colour in zip(row, colours, strict=True):
            axis.imshow(colour.permute(1, 2, 0).numpy(), cmap="viridis")
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    figure.supxlabel(credit, fontsize=7)
    _save(figure, path)


def principal_components(maps: Tensor) -> Tensor:
    """Maps [n, C, h, w] by their three principal components over all places, each scaled to [0, 1]: [n, 3, h, w]."""
    places = maps.movedim(1, -1)
    x = places.flatten(0, -2).double()
    x = x - x.mean(0)
    _, directions = torch.linalg.eigh(x.T @ x)  # by rising variance
    components = F.pad(x @ directions[:, -3:].flip(1), (0, max(0, 3 - x.shape[1])))
    low, high = (components.quantile(q, 0) for q in (0.02, 0.98))  # a few extreme places would leave the others grey
    scaled = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return scaled.view(*places.shape[:-1], 3).movedim(-1, 1).float()


def _wrap(text: str, width: int = 34) -> str:
    import textwrap

    return textwrap.fill(textwrap.shorten(text, 3 * width), width)


def _subplots(
    rows: int, columns: int, *, width: float, height: float, width_ratios: Sequence[float] | None = None
) -> tuple[Any, Any]:
    """A figure that no window shows, and its axes [rows, columns]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, width_ratios=width_ratios)


def _save(figure: Any, path: Path) -> None:
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))
