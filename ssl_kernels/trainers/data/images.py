"""Single images: read, resized, cropped; and why one cannot be read."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from ssl_kernels.trainers.data.faults import EVALUATION, TRAINING, Fault, Faults, place
from ssl_kernels.trainers.data.pixels import WHITE, Colour, to_rgb
from ssl_kernels.trainers.errors import UserError

with contextlib.suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()

# Endings of files that are taken for images, in any case. What is in a file decides how it is read.
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".heic", ".heif",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2",
)  # fmt: skip
MOST_PIXELS = 178_956_970  # Pillow's limit, twice the size from which it warns: who unpacks to more is to be distrusted
_HEIC, _AVIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1"), (b"avif", b"avis")
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
STRIP = 8  # times its shorter side, of what is resized of a strip
_SAMPLE, _SAMPLE_BYTES = 100, 100 * 2**20  # files that are tried when training starts, and their size

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadImageError(UserError):
    """An image that cannot be read: `where` it is, and for what `reason` in a few words."""

    def __init__(self, where: str, reason: str) -> None:
        self.where, self.reason = where, reason
        super().__init__(where, reason)

    def __str__(self) -> str:
        return f"cannot read the image {self.where}: {self.reason}"


def open_image(
    source: Path | bytes, background: Colour = WHITE, where: str = "", *,
    look: Callable[[Image.Image], object] | None = None,
) -> Image.Image:  # fmt: skip
    """A file, or what is in one, in RGB (see `pixels`). Raises `BadImageError`; `where` names what has no path.

    `look` is shown the image as it is in the file.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            if look is not None:
                look(image)
            return to_rgb(image, background)
    except MemoryError:
        raise
    except Exception as error:  # each decoder has its own
        name = where or (place(source) if isinstance(source, Path) else "an image")
        raise BadImageError(name, _reason(error, source)) from None


def _reason(error: Exception, source: Path | bytes) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {MOST_PIXELS:,} pixels"
    if isinstance(error, UnidentifiedImageError):
        return _kind(source)
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})"
    if isinstance(error, EOFError | struct.error) or "truncated" in str(error).lower():
        return "cut short"
    return "cannot be decoded"


def _kind(source: Path | bytes) -> str:
    """What something is in which Pillow finds no image."""
    if isinstance(source, Path):
        with open(source, "rb") as file:
            source = file.read(12)
    brand = source[8:12] if source[4:8] == b"ftyp" else b""
    if brand in _HEIC and "HEIF" not in Image.OPEN:
        return "HEIC, which needs the package pillow-heif"
    if brand in _AVIF and not features.check("avif"):
        return "AVIF, which needs Pillow 11.3 or later"
    if source.startswith(_BEGINNINGS) or brand in _HEIC + _AVIF:
        return "cannot be decoded"
    return "not an image" if source else "empty file"


def load_images(images: Tensor | list[Path], indices: Sequence[int], size: int, background: Colour = WHITE) -> Tensor:
    """The chosen images as evaluation sees them: uint8 [n, 3, size, size], resized and cropped around the centre."""
    if isinstance(images, Tensor):
        return resize(images[list(indices)], size)
    return torch.stack([centre_crop(open_image(images[i], background), size) for i in indices])


def load_readable(
    images: Tensor | list[Path], indices: Sequence[int], size: int, background: Colour, faults: Faults
) -> tuple[Tensor, list[int]]:
    """As `load_images`, of those that can be read, and which these are. `faults` is told of the others."""
    if isinstance(images, Tensor):
        return resize(images[list(indices)], size), list(indices)
    shown, kept = [torch.empty(0, 3, size, size, dtype=torch.uint8)], []
    for index in indices:
        try:
            shown.append(centre_crop(open_image(images[index], background), size)[None])
            kept.append(index)
        except BadImageError as error:
            faults.add(error.reason, error.where, of=EVALUATION)
    return torch.cat(shown), kept


def try_some(paths: Sequence[Path], faults: Faults, of: str = TRAINING) -> None:
    """Read some files, spread evenly over all of them, before anything that takes long, and tell `faults`.

    They are at most a hundred, of 100 MiB together, and the same in every process. Raises `UserError` if there are too
    many bad ones among them.
    """
    chosen, left = [], _SAMPLE_BYTES
    for index in np.unique(np.linspace(0, len(paths) - 1, min(_SAMPLE, len(paths)), dtype=int)).tolist():
        with contextlib.suppress(OSError):
            left -= paths[index].stat().st_size
        if left >= 0:
            chosen.append(paths[index])
    with ThreadPoolExecutor(8) as threads:
        found = [fault for fault in threads.map(_fault, chosen) if fault is not None]
    faults.update(fault._replace(of=of) for fault in found)
    if of == TRAINING:
        faults.check(len(chosen))


def _fault(path: Path) -> Fault | None:
    try:
        open_image(path)
    except BadImageError as error:
        return Fault(error.where, error.reason)
    return None


def resize(images: Tensor, size: int) -> Tensor:
    """uint8 images [N, 3, H, W] at another size."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), size=(size, size), mode="area").round().to(torch.uint8)


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """uint8 [3, size, size]: the shorter side resized, the middle kept."""
    from torchvision.transforms import v2

    cropped: Tensor = v2.Compose([v2.Resize(size), v2.CenterCrop(size), v2.PILToTensor()])(_middle(image))
    return cropped


def _middle(image: Image.Image) -> Image.Image:
    """What may be seen of a strip: resized as a whole, it could fill the memory."""
    width, height = image.size
    longest = STRIP * min(width, height)
    x, y = max(0, width - longest) // 2, max(0, height - longest) // 2
    return image.crop((x, y, width - x, height - y)) if x or y else image


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
