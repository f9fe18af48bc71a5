"""Items to vectors, a batch at a time: what cannot be read is left out and named, or stops."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from ssl_kernels.trainers.data.images import BadImageError
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.use.command import UseConfig, progress, say_left_out
from ssl_kernels.trainers.use.items import Item, Items, LeftOut
from ssl_kernels.trainers.use.pixels import in_parts, to_pixels
from ssl_kernels.trainers.use.trained import Trained

Encode = Callable[[Tensor], Tensor]  # uint8 images [n, 3, size, size] to rows [n, D]


@dataclass
class Part:
    """What became of a batch: the places of the items that have a vector, the vectors, and the others."""

    kept: list[int]
    names: list[str]
    vectors: Tensor
    left_out: LeftOut
    read: int


def image_parts(model: Trained, items: Iterable[Item], encode: Encode, options: UseConfig) -> Iterator[Part]:
    """The batches of images; while one goes through the network, threads read the next."""

    def pixels(item: Item) -> Tensor:
        assert not isinstance(item.source, str)
        return to_pixels(item.source, model.size, model.background, item.name)

    with ThreadPoolExecutor(options.workers) as pool:
        waiting: deque[tuple[list[Item], list[Future[Tensor]]]] = deque()
        for batch in in_parts(items, options.batch_size):
            waiting.append((batch, [pool.submit(pixels, item) for item in batch]))
            if len(waiting) > 1:
                yield _finish(*waiting.popleft(), encode, options.on_error)
        while waiting:
            yield _finish(*waiting.popleft(), encode, options.on_error)


def _finish(
    batch: list[Item], futures: list[Future[Tensor]], encode: Encode, on_error: Literal["skip", "stop"]
) -> Part:
    images, kept, left_out = [], [], []
    for place, future in enumerate(futures):
        try:
            images.append(future.result())
            kept.append(place)
        except BadImageError as error:
            left_out.append((error.where, error.reason))
            stop_for(left_out, on_error)
    vectors = encode(torch.stack(images)) if images else torch.empty(0, 0)
    return Part(kept, [batch[place].name for place in kept], vectors, left_out, len(batch))


def stop_for(left_out: LeftOut, on_error: str) -> None:
    """Raise `UserError` for the first, if that is what is to be done."""
    if left_out and on_error == "stop":
        raise UserError("DATA: cannot read {}: {} (--on-error skip leaves it out)".format(*left_out[0]))


def text_parts(model: Trained, items: Iterable[Item], batch_size: int) -> Iterator[Part]:
    """The batches of captions."""
    for batch in in_parts(items, batch_size):
        names = [item.name for item in batch]
        yield Part(list(range(len(batch))), names, model.encode_text(names, batch_size), [], len(batch))


@dataclass
class Vectors:
    """Vectors [n, D] of the items that could be read, and the places of these among all."""

    kept: Tensor
    names: list[str]
    vectors: Tensor


def all_images(
    model: Trained,
    items: Items,
    encode: Encode,
    options: UseConfig,
    console: Console,
    what: str,
    *,
    needed: bool = True,
) -> Vectors:
    """The vectors of all images at once; says what is left out. Of what is `needed` some must be there."""
    kept: list[int] = []
    names: list[str] = []
    rows: list[Tensor] = []
    left_out: LeftOut = []
    read = 0
    with progress(console, what, items.count) as advance:
        for part in image_parts(model, items.read(), encode, options):
            kept += [read + place for place in part.kept]
            names += part.names
            rows += [part.vectors] if part.names else []
            left_out += part.left_out
            read += part.read
            advance(part.read)
            stop_for(items.missing, options.on_error)
    left_out += items.missing
    stop_for(left_out, options.on_error)
    say_left_out(console, left_out, read + len(items.missing))
    if not rows and needed:
        raise UserError("DATA: none of the images can be read")
    return Vectors(torch.tensor(kept), names, torch.cat(rows) if rows else torch.empty(0, model.dim))
