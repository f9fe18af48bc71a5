"""`ssl-kernels search RUN --query "a red circle" PHOTOS`: the images that lie nearest to a text or to an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from torch import Tensor
from tyro.conf import Positional

from ssl_kernels.ops.unit_rows import unit_rows
from ssl_kernels.trainers.data import openmoji
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.ranges import at_least, require
from ssl_kernels.trainers.use import command
from ssl_kernels.trainers.use.cache import cached_images
from ssl_kernels.trainers.use.command import ReadConfig
from ssl_kernels.trainers.use.items import Item, images_of
from ssl_kernels.trainers.use.loading import device_of, load_run
from ssl_kernels.trainers.use.sheet import Cell, draw_sheet
from ssl_kernels.trainers.use.trained import Trained

PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


@dataclass(kw_only=True)
class SearchConfig(ReadConfig):
    """Find the images that lie nearest to a text or to an image. Embeddings are kept in the run's folder, so that a
    second search among the same files is quick."""

    data: Positional[str]
    """The images to search: a folder, a .txt list of files, a table, shards, `openmoji` or `mnist`."""
    query: str = ""
    """The text to search for, with a run of clip or siglip."""
    image: Path | None = None
    """The image to search for, instead of a text; any run will do."""
    top: int = 12
    """Number of images to show."""
    out: Path | None = None
    """Picture to write, with the images that were found in their order, such as sheet.png."""

    def check(self) -> None:
        super().check()
        require(self, at_least(1), "top")
        if bool(self.query.strip()) == (self.image is not None):
            raise UserError("--query: expected either a text to search for, or an image in --image")
        if self.out is not None and self.out.suffix.lower() not in PICTURES:
            raise UserError(f"--out: expected a picture ({', '.join(PICTURES)}), got {self.out}")


def nearest(query: Tensor, vectors: Tensor, top: int) -> tuple[list[float], list[int]]:
    """The largest cosines between a query [D] and vectors [N, D], and whose they are."""
    similarity = unit_rows(vectors) @ unit_rows(query)
    found = similarity.topk(min(top, len(similarity)))
    return found.values.tolist(), found.indices.tolist()


def query_of(model: Trained, options: SearchConfig) -> Tensor:
    """The vector [dim] of what is searched for."""
    if options.image is None:
        return model.encode_text(options.query)[0]
    if not options.image.is_file():
        raise UserError(f"--image: no such file: {options.image}")
    return model.encode_image(options.image)[0]


def work(options: SearchConfig, console: Console) -> None:
    model = load_run(options.run, device_of(options.device))
    query = query_of(model, options)
    items = images_of(options.data, model.size, options)
    gallery = cached_images(model, items, options.data, options, console)
    similarities, places = nearest(query, gallery.vectors, options.top)
    for rank, (similarity, place) in enumerate(zip(similarities, places, strict=True), 1):
        console.print(
            f"{rank:>4}  {similarity:.3f}  {gallery.names[place]}", highlight=False, markup=False, soft_wrap=True
        )
    if options.out is not None:
        of_all = gallery.kept[places].tolist()
        sources = {i: item for i, item in enumerate(items.read()) if i in set(of_all)}
        shown = enumerate(zip(of_all, similarities, strict=True), 1)
        cells = [Cell(sources[i], f"{rank}   {similarity:.3f}") for rank, (i, similarity) in shown]
        if options.image is not None:
            cells.insert(0, Cell(Item(str(options.image), options.image), "query"))
        title = f'"{options.query}"' if options.image is None else f"nearest to {options.image.name}"
        credit = openmoji.CREDIT if options.data == "openmoji" else ""
        remark = draw_sheet(options.out, f"{title}   {options.run}", cells, credit=credit)
        if remark:
            console.print(f"{options.out.name}: {remark}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"written: {options.out}", highlight=False, markup=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None, prog: str = "ssl-kernels search") -> int:
    return command.run(SearchConfig, work, argv, prog)
