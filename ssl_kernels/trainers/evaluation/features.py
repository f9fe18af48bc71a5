"""`features.png`: what networks make of the places of an image."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.trainers.evaluation.drawing import drawn_in, new_figure, save, wrap
from ssl_kernels.trainers.evaluation.fonts import fonts_for

_LEGEND = (
    "Colours are the three principal components of the features over all of the images: alike features have alike"
    " colours. Brighter places have more attention."
)


def plot_features(path: Path, images: Tensor, maps: dict[str, Tensor], credit: str = "", title: str = "") -> str:
    """Images [n, 3, S, S] above maps [n, C, h, w] of them: a map of one channel as it is, others by their three
    principal components over all of the images, as red, green and blue. Alike features have alike colours.

    Returned is what could not be drawn, in one line; empty if all could.
    """
    fonts = fonts_for([title])
    rows, columns = 1 + len(maps), len(images)
    figure = new_figure(1.1 * columns + 1, 1.15 * rows + 0.8)
    axes = figure.subplots(rows, columns, squeeze=False)
    with drawn_in(fonts):
        for axis, image in zip(axes[0], images, strict=True):
            axis.imshow(image.permute(1, 2, 0).numpy())
        axes[0, 0].set_ylabel("image", fontsize=8)
        for row, (name, channels) in zip(axes[1:], maps.items(), strict=True):
            row[0].set_ylabel(name, fontsize=8)
            colours = channels if channels.shape[1] == 1 else principal_components(channels)
            for axis, colour in zip(row, colours, strict=True):
                axis.imshow(colour.permute(1, 2, 0).numpy(), cmap="viridis")
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
        figure.suptitle(fonts.drawable(title), fontsize=10, parse_math=False)
        legend = "\n".join([wrap(_LEGEND, 18 * columns, 9), *([credit] if credit else [])])
        figure.supxlabel(legend, fontsize=7)
        save(figure, path)
    return fonts.remark()


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
