"""`curves.png`: what was logged over the steps, and what the run reached beside its baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ssl_kernels.trainers.evaluation.drawing import drawn_in, new_figure, save
from ssl_kernels.trainers.evaluation.fonts import Fonts, fonts_for

_NOT_DRAWN = ("step", "epoch", "elapsed_s", "loss_check", "loss_reference")
_NAMES = {
    "lr": "learning rate", "grad_norm": "norm of the gradient", "images_per_s": "images per second",
    "peak_mb": "peak memory, MB", "logit_scale": "scale of the logits", "logit_bias": "bias of the logits",
}  # fmt: skip


def plot_curves(path: Path, records: Sequence[dict[str, Any]], title: str = "", figures: Sequence[Any] = ()) -> str:
    """Every logged metric over the steps, and below the held-out figures beside their baselines.

    Returned is what could not be drawn, in one line; empty if all could.
    """
    fonts = fonts_for([title, *(figure.name for figure in figures)])
    names = [name for name in dict.fromkeys(key for record in records for key in record) if name not in _NOT_DRAWN]
    columns, below = 3, 0.6 + 0.24 * len(figures) if figures else 0.0
    rows = -(-len(names) // columns)
    figure = new_figure(4.2 * columns, 2.4 * rows + below + 0.4)
    heights = [2.4] * rows + [below] * bool(figures)
    grid = figure.add_gridspec(rows + bool(figures), columns, height_ratios=heights)
    with drawn_in(fonts):
        for place, name in enumerate(names):
            _draw_curve(figure.add_subplot(grid[place // columns, place % columns]), name, records)
        if figures:
            _draw_figures(figure.add_subplot(grid[rows, :]), [asdict(figure) for figure in figures], fonts)
        figure.suptitle(fonts.drawable(title), fontsize=11, parse_math=False)
        save(figure, path)
    return fonts.remark()


def _draw_curve(axis: Any, name: str, records: Sequence[dict[str, Any]]) -> None:
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None and math.isfinite(r[name])]
    steps, values = [step for step, _ in points], [value for _, value in points]
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(_NAMES.get(name, name.replace("_", " ")), fontsize=9)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.3)
    if name != "loss" or len(points) < 2:
        axis.plot(steps, values, linewidth=1, marker="o" if len(points) < 10 else "", markersize=3)
        return
    low, high = loss_limits(values)
    axis.plot(steps, values, linewidth=0.8, alpha=0.4, label="each step")
    axis.plot(steps, running_mean(values), color="tab:blue", linewidth=1.6, label="running mean")
    if low > 0:
        axis.set_yscale("log")
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks("{x:g}")
        axis.tick_params(which="both", labelsize=7)
    axis.set_ylim(low, high)
    beyond = f"{values[0]:.3g} at step {steps[0]}" if values[0] > high else None
    axis.legend(fontsize=7, title=beyond, title_fontsize=7)


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of a twentieth of the values around each; of those that there are, at the ends."""
    reach, places = len(values) // 40, np.arange(len(values))
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=np.float64))])
    begin, end = np.maximum(places - reach, 0), np.minimum(places + reach + 1, len(values))
    means: list[float] = ((sums[end] - sums[begin]) / (end - begin)).tolist()
    return means


def loss_limits(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis that shows all values but the largest of a first tenth and single ones that stick out."""
    later = np.asarray(values[len(values) // 10 :], dtype=np.float64)
    low, high = float(min(values)), float(np.quantile(later, 0.99))
    high = max(high, running_mean(later.tolist())[0])
    if low > 0:  # the axis is a logarithmic one
        margin = max(1.02, (high / low) ** 0.05)
        return low / margin, high * margin
    margin = max(0.05 * (high - low), 1e-3 * abs(high), 1e-9)
    return low - margin, high + margin


def _draw_figures(axis: Any, figures: Sequence[dict[str, Any]], fonts: Fonts) -> None:
    """A line to each figure: the model's score as a point, and those that it is to be judged by."""
    sources = [key for key in figures[0] if key not in ("name", "note")]
    places = range(len(figures))
    for number, (source, marker) in enumerate(zip(sources, "osDv^xP*", strict=False)):
        known = [(figure[source], place) for place, figure in zip(places, figures, strict=True)
                 if figure.get(source) is not None]  # fmt: skip
        axis.scatter(
            [score for score, _ in known], [place for _, place in known], marker=marker, label=source.replace("_", " "),
            s=20 if number else 40, color=f"C{number}", zorder=10 - number,
        )  # fmt: skip
    axis.set_yticks(places, [fonts.drawable(figure["name"]) for figure in figures], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("held-out figures beside their baselines", fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
