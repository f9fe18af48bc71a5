"""Any image that Pillow opens as RGB of 8 bits.

- **More than 8 bits.** 16-bit grey is divided by 257. Floats within [0, 1] are multiplied by 255, and numbers within
  [0, 255] stay what they are. 32-bit integers within [0, 65535] count as 16-bit. Anything else is stretched from the
  image's least to its largest finite number; where all are equal it becomes a middle grey.
- **Transparent images**, and palettes with transparent entries, are laid over the background.
- **Of animations and documents** the first frame or page is taken.
- **Photographs** are turned upright, as their EXIF orientation says. Colour profiles are left alone.
"""

from __future__ import annotations

import warnings

import numpy as np
from PIL import ExifTags, Image, ImageColor, ImageOps

from ssl_kernels.trainers.errors import UserError

Colour = tuple[int, int, int]
WHITE: Colour = (255, 255, 255)

warnings.filterwarnings("ignore", message="Corrupt EXIF data", category=UserWarning)

_DEEP_FORMATS = ("PNG", "PPM")  # whose mode "I" are 16 bits


def parse_colour(text: str) -> Colour:
    """The value of --background."""
    try:
        red, green, blue = ImageColor.getrgb(f"rgb({text})" if "," in text and "(" not in text else text)[:3]
    except ValueError:
        red = green = blue = 256
    if max(red, green, blue) > 255:
        raise UserError(f"--background: expected R,G,B such as 128,128,128, or a name such as white, got {text!r}")
    return red, green, blue


def to_rgb(image: Image.Image, background: Colour = WHITE) -> Image.Image:
    """The image in RGB and upright; an opaque one of 8 bits is what Pillow's `convert` makes of it."""
    image = _upright(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray(_from_16_bits(np.asarray(image))).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        deep = image.mode == "I" and image.format in _DEEP_FORMATS
        return Image.fromarray(_from_16_bits(values) if deep else _stretched(values)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # which Pillow converts to nothing else
        image = image.convert("LA")
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, (*background, 255)), over).convert("RGB")


def orientation_of(image: Image.Image) -> int:
    """How an image lies in its file, by EXIF: 1 is upright. What cannot be read of EXIF says nothing."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF is no fault of the image's, and each part of Pillow has its own errors for it
        return 1


def _upright(image: Image.Image) -> Image.Image:
    if orientation_of(image) not in range(2, 9):
        return image
    kind, turned = image.format, ImageOps.exif_transpose(image)
    turned.format = kind  # which tells how deep an image is
    return turned


def _from_16_bits(values: np.ndarray) -> np.ndarray:
    """0 to 65535 as 0 to 255, to the nearest."""
    return ((values.astype(np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8)


def _stretched(values: np.ndarray) -> np.ndarray:
    """Numbers of no known range, as the module's docstring says."""
    numbers = values.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    whole = np.issubdtype(values.dtype, np.integer)
    if low >= 0 and whole and 255 < high <= 65535:
        return _from_16_bits(values)
    if low >= 0 and not whole and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= 255:
        low, high = 0.0, 255.0
    elif low == high:
        return np.full(values.shape, 128, dtype=np.uint8)
    numbers = np.nan_to_num((numbers - low) * 255 / (high - low), nan=0.0, posinf=255.0, neginf=0.0)
    return np.rint(numbers).clip(0, 255).astype(np.uint8)
