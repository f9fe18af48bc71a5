"""Everything in a table, a folder or shards, read once: what cannot be used, and what is odd but used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch.utils.data import Dataset

from ssl_kernels.trainers.data.batches import loader
from ssl_kernels.trainers.data.faults import Fault, place
from ssl_kernels.trainers.data.images import STRIP, BadImageError, open_image
from ssl_kernels.trainers.data.pixels import orientation_of
from ssl_kernels.trainers.data.tars import samples

SMALL, LARGE = 16, 50_000_000  # pixels a side, and in all
_ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jfif", ".jpe"), "MPO": (".jpg", ".jpeg", ".mpo"), "PNG": (".png",),
    "WEBP": (".webp",), "BMP": (".bmp",), "TIFF": (".tif", ".tiff"), "GIF": (".gif",), "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"), "PPM": (".ppm", ".pgm", ".pbm", ".pnm"), "JPEG2000": (".jp2",),
}  # fmt: skip


@dataclass
class Part:
    """What was found in a file: in an image, or in all samples of a shard."""

    bad: list[Fault] = field(default_factory=list)
    odd: list[Fault] = field(default_factory=list)  # what is used all the same
    contents: list[tuple[bytes, str]] = field(default_factory=list)  # a digest of each image, and where it is


class Inspection(Dataset[Part]):
    """Image files or shards, whose captions have an encoding; an item is what was found in one."""

    def __init__(self, files: Sequence[Path] | Sequence[str], encoding: str = "utf-8") -> None:
        self.files, self.encoding = files, encoding

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Part:
        file, part = self.files[number], Part()
        if isinstance(file, Path):
            _look(file, place(file), part)
        else:
            for sample in samples(file, part.bad, encoding=self.encoding):
                _look(sample.image, sample.where, part)
        return part

    def parts(self, workers: int) -> Iterator[Part]:
        """What was found in each, in their order; `workers` processes look."""
        return iter(loader(self, workers, sampler=range(len(self))))  # type: ignore[arg-type]


def _look(source: Path | bytes, where: str, part: Part) -> None:
    odd: list[str] = []
    ending = source.suffix.lower() if isinstance(source, Path) else ""
    try:
        content = source.read_bytes() if isinstance(source, Path) else source
        picture = open_image(content, where=where, look=lambda image: odd.extend(_oddities(image, ending)))
    except OSError as error:
        part.bad.append(Fault(where, "no such file" if isinstance(error, FileNotFoundError) else str(error.strerror)))
    except BadImageError as error:
        part.bad.append(Fault(where, error.reason))
    else:
        if max(high - low for low, high in picture.getextrema()) == 0:  # type: ignore[misc]
            odd.append("of one colour")
        part.odd += [Fault(where, reason) for reason in odd]
        part.contents.append((hashlib.sha256(content).digest()[:12], where))


def _oddities(image: Image.Image, ending: str) -> Iterator[str]:
    """What is unusual about an image as it is in its file."""
    width, height = image.size
    if ending and ending not in _ENDINGS.get(image.format or "", (ending,)):
        yield f"{image.format} inside, named {ending}"
    if min(width, height) < SMALL:
        yield f"less than {SMALL} pixels high or wide"
    if max(width, height) > STRIP * min(width, height):
        yield f"more than {STRIP} times as long as wide: only the middle is evaluated"
    if width * height > LARGE:
        yield f"more than {LARGE:,} pixels: slow to read"
    if getattr(image, "n_frames", 1) > 1:
        yield "of several frames: the first is taken"
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        yield "of more than 8 bits: scaled"
    elif image.has_transparency_data:
        yield "transparent: laid over --background"
    elif image.mode not in ("RGB", "L", "P", "1", "RGBX"):
        yield f"{image.mode}: converted to RGB"
    if orientation_of(image) != 1:
        yield "lying on its side or mirrored: turned as EXIF says"
