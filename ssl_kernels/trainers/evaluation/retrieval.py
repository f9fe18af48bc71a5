"""`retrieval.png`: what a caption finds among the held-out images, and what an image finds among the captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssl_kernels.trainers.data.pairs import ImageTextPairs
from ssl_kernels.trainers.evaluation.drawing import drawn_in, new_figure, save, wrap
from ssl_kernels.trainers.evaluation.fonts import Fonts, fonts_for

_GREEN = "tab:green"
_CAPTIONS = 3  # the nearest of an image that are shown
_LEGEND = (
    "Pairs are spread evenly over the held-out ones. Green: the image that belongs to the caption, and the caption that"
    " belongs to the image. A rank counts from the nearest."
)


def plot_retrieval(
    path: Path, pairs: ImageTextPairs, similarity: Tensor, size: int, credit: str = "", rows: int = 16, top: int = 6,
    title: str = "",
) -> str:  # fmt: skip
    """Captions with the images that lie nearest, and images with the nearest captions; what is right is green.

    `similarity` is caption by image. The pairs are spread evenly over all, not picked for their success; at the end of
    each row stands the rank of the right one. Returned is what could not be drawn, in one line; empty if all could.
    """
    top, rows = min(top, len(pairs)), min(rows, len(pairs))
    shown = [round(i * (len(pairs) - 1) / max(1, rows - 1)) for i in range(rows)]
    found = similarity[:, shown].topk(min(_CAPTIONS, len(pairs)), dim=0).indices.flatten().tolist()
    sheet = _Sheet(pairs, top, fonts_for([title, *(pairs.captions[i] for i in (*shown, *found))]))
    figure = new_figure(0.9 * sheet.width, 0.98 * (rows + 1.6), layout="none")
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, sheet.width), ylim=(1.1 * rows + 0.7, -1))
    axis.axis("off")
    middle = sheet.width / 2
    with drawn_in(sheet.fonts):
        _write(axis, middle, -0.75, sheet.fonts.drawable(title), ha="center", fontsize=12)
        sheet.draw_heads(axis)
        for place, index in enumerate(shown):
            sheet.draw_row(axis, 0.55 + 1.1 * place, index, similarity, size)
        _write(axis, middle, 1.1 * rows + 0.35, f"{_LEGEND}\n{credit}".strip(), ha="center", fontsize=8)
        save(figure, path)
    return sheet.fonts.remark()


class _Sheet:
    """Where the columns of `plot_retrieval` lie, in widths of an image."""

    def __init__(self, pairs: ImageTextPairs, top: int, fonts: Fonts) -> None:
        self.pairs, self.top, self.fonts = pairs, top, fonts
        self.captions_end = 2.9
        self.images = [3.05 + 1.1 * place for place in range(top)]
        self.rank = self.images[-1] + 1.15
        self.image = self.rank + 1.3
        self.captions = self.image + 1.15
        self.caption_rank = self.captions + 3.8
        self.width = self.caption_rank + 1.1
        self.few = min(_CAPTIONS, len(pairs))

    def draw_heads(self, axis: Any) -> None:
        heads = [(self.captions_end, "caption", "right"), (self.image + 0.5, "image", "center")]
        heads += [(x + 0.5, f"rank {place}", "center") for place, x in enumerate(self.images, 1)]
        heads += [(self.rank, "right image", "left"), (self.caption_rank, "right caption", "left")]
        heads += [(self.captions, f"captions of ranks 1 to {self.few}", "left")]
        for x, head, side in heads:
            _write(axis, x, -0.25, head, ha=side, color="dimgray")

    def draw_row(self, axis: Any, y: float, index: int, similarity: Tensor, size: int) -> None:
        """A caption with its nearest images, and its image with the nearest captions."""
        pairs, drawable = self.pairs, self.fonts.drawable
        own = pairs.captions[index]
        right = torch.tensor([caption == own for caption in pairs.captions])
        subset = f"\n({pairs.subsets[index]})" if pairs.subsets else ""
        _write(axis, self.captions_end, y, wrap(drawable(own), 30, 3) + subset, ha="right")
        nearest = similarity[index].topk(self.top).indices.tolist()
        for other, x, image in zip(nearest, self.images, pairs.load(nearest, size), strict=True):
            _show(axis, image, x, y, right=bool(right[other]))
        _write(axis, self.rank, y, _rank(similarity[index], right))
        _show(axis, pairs.load([index], size)[0], self.image, y)
        for line, other in enumerate(similarity[:, index].topk(self.few).indices.tolist()):
            height, colour = y + 0.32 * (line - (self.few - 1) / 2), _GREEN if right[other] else "black"
            _write(axis, self.captions, height, f"{line + 1}", color=colour)
            _write(axis, self.captions + 0.2, height, wrap(drawable(pairs.captions[other]), 38, 1), color=colour)
        _write(axis, self.caption_rank, y, _rank(similarity[:, index], right))


def _write(axis: Any, x: float, y: float, text: str, **options: Any) -> None:
    axis.text(x, y, text, **{"fontsize": 9, "va": "center", "parse_math": False, **options})


def _show(axis: Any, image: Tensor, x: float, y: float, *, right: bool = False) -> None:
    """An image [3, S, S] with a frame, green if it is the right one."""
    from matplotlib.patches import Rectangle

    axis.imshow(image.permute(1, 2, 0).numpy(), extent=(x, x + 1, y + 0.5, y - 0.5), aspect="auto", zorder=1)
    edge: dict[str, Any] = (
        {"edgecolor": _GREEN, "linewidth": 3} if right else {"edgecolor": "lightgray", "linewidth": 1}
    )
    axis.add_patch(Rectangle((x, y - 0.5), 1, 1, facecolor="none", zorder=2, **edge))


def _rank(similarity: Tensor, right: Tensor) -> str:
    """The place of the nearest right one, from 1 on; where a model tells nothing, there is none."""
    if not bool(similarity.isfinite().all()):
        return "no rank"
    return f"rank {1 + int((similarity > similarity[right].max()).sum())}\nof {len(similarity)}"
