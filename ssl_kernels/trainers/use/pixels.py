"""From what a user has, files or images of Pillow or tensors, to what an image tower takes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from ssl_kernels.trainers.data.images import centre_crop, open_image, resize
from ssl_kernels.trainers.data.pixels import WHITE, Colour, to_rgb

ImageLike = Image.Image | str | os.PathLike[str]

T = TypeVar("T")


def to_pixels(image: ImageLike | bytes | Tensor, size: int, background: Colour = WHITE, name: str = "") -> Tensor:
    """One image as evaluation sees it: uint8 [3, size, size]. `name` is what an error calls encoded bytes."""
    if isinstance(image, Tensor):
        return tensor_to_pixels(image[None], size)[0]
    if isinstance(image, bytes):
        return centre_crop(open_image(image, background, name), size)
    if isinstance(image, str | os.PathLike):
        return centre_crop(open_image(Path(image), background), size)
    if isinstance(image, Image.Image):
        return centre_crop(to_rgb(image, background), size)
    raise TypeError(f"image: expected one of Pillow or the path of a file, got {type(image).__name__}")


def tensor_to_pixels(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, 3, H, W] at another size, of those that are not square the middle."""
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise TypeError(
            f"images: expected uint8 [N, 3, H, W], got {images.dtype} {[*images.shape]}; the model normalises itself,"
            " and model.transform makes such tensors of files and of Pillow's images"
        )
    side = min(images.shape[2:])
    top, left = ((length - side) // 2 for length in images.shape[2:])
    return resize(images[:, :, top : top + side, left : left + side], size)


def batches_of(
    images: ImageLike | Tensor | Iterable[ImageLike], size: int, batch_size: int, background: Colour = WHITE
) -> Iterator[Tensor]:
    """Batches uint8 [n, 3, size, size] of one image or many."""
    if isinstance(images, Tensor):
        pixels = tensor_to_pixels(images, size)
        yield from pixels.split(batch_size) if len(pixels) else ()
        return
    many = [images] if isinstance(images, Image.Image | str | os.PathLike) else images
    for part in in_parts(many, batch_size):
        yield torch.stack([to_pixels(image, size, background) for image in part])


def in_parts(items: Iterable[T], n: int) -> Iterator[list[T]]:
    """Lists of n items, the last perhaps shorter."""
    iterator = iter(items)
    while part := list(itertools.islice(iterator, n)):
        yield part
