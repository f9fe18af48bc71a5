"""Single images: read, resized, cropped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ssl_kernels.trainers.errors import UserError


def load_images(images: Tensor | list[Path], indices: Sequence[int], size: int) -> Tensor:
    """The chosen images as evaluation sees them: uint8 [n, 3, size, size], resized and cropped around the centre."""
    if isinstance(images, Tensor):
        return resize(images[list(indices)], size)
    return torch.stack([centre_crop(open_image(images[i]), size) for i in indices])


def open_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"--data: cannot read the image {path}: {error}") from None


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, 3, H, W] at another size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), size=(size, size), mode="area").round().to(torch.uint8)


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """uint8 [3, size, size]: the shorter side resized, the middle kept."""
    from torchvision.transforms import v2

    cropped: Tensor = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])(image)
    return cropped


def random_crop(image: Image.Image, size: int, seed: int) -> Tensor:
    """A random resized crop, uint8 [3, size, size]."""
    from torchvision.transforms import v2

    crop = v2.Compose([v2.RandomResizedCrop(size, scale=(0.6, 1.0)), v2.PILToTensor()])
    with torch_draws_from(seed):
        cropped: Tensor = crop(image)
    return cropped


def image_seeds(rng: np.random.Generator, n: int) -> list[int]:
    """One for each image of a batch: whoever makes some of them only need not see the others."""
    seeds: list[int] = rng.integers(2**62, size=n).tolist()
    return seeds


@contextlib.contextmanager
def torch_draws_from(seed: int) -> Iterator[None]:
    """Seeds torch's global generator, from which torchvision draws, and in the end leaves it as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
