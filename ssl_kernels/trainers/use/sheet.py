"""A contact sheet: images in their order, each with a line above and its name below."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssl_kernels.trainers.checkpoints import write_atomically
from ssl_kernels.trainers.evaluation.drawing import drawn_in, new_figure, wrap
from ssl_kernels.trainers.evaluation.fonts import fonts_for
from ssl_kernels.trainers.use.items import Item
from ssl_kernels.trainers.use.pixels import to_pixels

_SIDE = 160  # pixels of an image on the sheet


class Cell(NamedTuple):
    """An image with what is said of it."""

    item: Item
    above: str


def draw_sheet(path: Path, title: str, cells: Sequence[Cell], columns: int = 6, credit: str = "") -> str:
    """Draw the cells in rows of so many; a line on what of the names cannot be drawn, or nothing."""
    names = [item.source.name if isinstance(item.source, Path) else item.name for item, _ in cells]
    fonts = fonts_for([title, *names])
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)

    def drawable(text: str, width: int, most: int) -> str:
        return wrap(fonts.drawable(text), width, most).replace("$", r"\$")  # which would begin a formula

    with drawn_in(fonts), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of characters that nobody sees
        figure = new_figure(1.7 * columns, 2.1 * rows + 0.5)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")
        for axis, (item, above), name in zip(axes, cells, names, strict=False):
            assert not isinstance(item.source, str)
            axis.imshow(to_pixels(item.source, _SIDE, name=item.name).permute(1, 2, 0).numpy())
            axis.set_title(above, fontsize=8)
            below = drawable(name, 22, 2)
            axis.text(0.5, -0.04, below, ha="center", va="top", fontsize=6, transform=axis.transAxes)
        figure.suptitle(drawable(title, 19 * columns, 2), fontsize=10)
        figure.supxlabel(credit, fontsize=6)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format=path.suffix[1:].lower()))
    return fonts.remark()
