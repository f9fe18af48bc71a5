"""`ssl-kernels embed RUN DATA --out vectors.npy`: the embeddings of many images, or of captions, in a file.

Rows go to a file beside the result as they are made, and a second file tells how far they have come. After a kill the
same command goes on from there, and what it writes is what it would have written without.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from tyro.conf import Positional

from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.use import command
from ssl_kernels.trainers.use.command import ReadConfig
from ssl_kernels.trainers.use.embedding import image_parts, stop_for, text_parts
from ssl_kernels.trainers.use.items import captions_of, images_of
from ssl_kernels.trainers.use.loading import device_of, load_run
from ssl_kernels.trainers.use.rows import Rows, write_result

SUFFIXES = (".npy", ".parquet")


@dataclass(kw_only=True)
class EmbedConfig(ReadConfig):
    """Write the embeddings of images or captions to a file. After a kill the same command goes on where it stopped."""

    data: Positional[str]
    """A folder of images, a .txt list of image files, a table, shards, one image, `openmoji` or `mnist`. With --text a
    .txt file with a caption on each line, a table, shards or `openmoji`."""
    out: Path
    """File to write: .npy, with the names of the rows in a .json file beside it, or .parquet, with both."""
    text: bool = False
    """Embed captions instead of images."""
    features: bool = False
    """Write the features of the image tower's trunk instead of the embeddings."""
    overwrite: bool = False
    """Replace a file that is there."""

    def check(self) -> None:
        super().check()
        if self.out.suffix not in SUFFIXES:
            raise UserError(f"--out: expected a file that ends in {' or '.join(SUFFIXES)}, got {self.out}")
        if self.text and self.features:
            raise UserError("--features: expected images, whose trunk has features, but --text asks for captions")


def work(options: EmbedConfig, console: Console) -> None:
    if options.out.exists() and not options.overwrite:
        raise UserError(f"--out: {options.out} is there already; --overwrite replaces it")
    model = load_run(options.run, device_of(options.device))
    items = captions_of(options.data, options) if options.text else images_of(options.data, model.size, options)
    items.tell(console)
    if options.text:
        model.tokenize("")  # or say that there is no text tower
    begun = time.perf_counter()
    header = {
        "model": model.checksum, "data": items.fingerprint, "batch_size": options.batch_size, "text": options.text,
        "features": options.features, "on_error": options.on_error,
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with Rows(options.out, header) as rows:
        if rows.read:
            console.print(f"going on after {rows.read} of an interrupted run", highlight=False)
        source = itertools.islice(items.read(), rows.read, None)
        with command.progress(console, "embedding", items.count, rows.read) as advance:
            encode = model.features if options.features else model.encode_image
            parts = (
                text_parts(model, source, options.batch_size)
                if options.text
                else image_parts(model, source, encode, options)
            )
            for part in parts:
                rows.append(part)
                advance(part.read)
                stop_for(items.missing, options.on_error)
        stop_for(items.missing, options.on_error)
        if not rows.names:
            raise UserError(f"DATA: nothing in {options.data} can be read")
        written = write_result(options.out, rows, "caption" if options.text else "path", str(options.run), model.method)
    command.say_left_out(console, [*rows.left_out, *items.missing], rows.read + len(items.missing))
    seconds = time.perf_counter() - begun
    console.print(
        f"{len(rows.names)} {'captions' if options.text else 'images'} in {seconds:.1f} s, [{len(rows.names)},"
        f" {rows.width}] fp32:",
        *map(str, written), highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None, prog: str = "ssl-kernels embed") -> int:
    return command.run(EmbedConfig, work, argv, prog)
