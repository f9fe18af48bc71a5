"""A contact sheet: images in their order, each with a line above and its name below."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssl_kernels.trainers.checkpoints import write_atomically
from ssl_kernels.trainers.use.items import Item
from ssl_kernels.trainers.use.pixels import to_pixels

_SIDE = 160  # pixels of an image on the sheet


class Cell(NamedTuple):
    """An image with what is said of it."""

    item: Item
    above: str


def draw_sheet(path: Path, title: str, cells: Sequence[Cell], columns: int = 6, credit: str = "") -> None:
    """Draw the cells in rows of so many."""
    from matplotlib.figure import Figure

    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis in axes:
        axis.axis("off")
    for axis, (item, above) in zip(axes, cells, strict=False):
        assert not isinstance(item.source, str)
        axis.imshow(to_pixels(item.source, _SIDE, name=item.name).permute(1, 2, 0).numpy())
        axis.set_title(above, fontsize=8)
        below = textwrap.shorten(
            Path(item.name).name if isinstance(item.source, Path) else item.name, 44, placeholder="…"
        )
        axis.text(0.5, -0.04, _plain("\n".join(textwrap.wrap(below, 22))), ha="center", va="top", fontsize=6,
                  transform=axis.transAxes)  # fmt: skip
    figure.suptitle(_plain(title), fontsize=10)
    figure.supxlabel(credit, fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # of a name in letters that the font lacks
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110, format=path.suffix[1:]))


def _plain(text: str) -> str:
    """A dollar sign would begin a formula."""
    return text.replace("$", r"\$")
