"""Any image is shown as what it is: deep ones scaled, transparent ones over the background, of frames the first."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_kernels.trainers.data.images import (
    MOST_PIXELS,
    BadImageError,
    centre_crop,
    open_image,
    random_crop,
)
from ssl_kernels.trainers.data.pixels import WHITE, Colour, parse_colour, to_rgb
from ssl_kernels.trainers.errors import UserError

RAMP = np.arange(16).reshape(4, 4)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def shown(image: Image.Image, kind: str = "PNG", background: Colour = WHITE, **options: object) -> np.ndarray:
    """The pixels of an image that was written to a file."""
    return np.asarray(open_image(encoded(image, kind, **options), background))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_of_grey_are_scaled(kind: str) -> None:
    values = (RAMP * 4369).astype(np.uint16)  # 0 to 65535
    pixels = shown(Image.fromarray(values), kind)
    assert np.array_equal(pixels, np.repeat((RAMP * 17)[..., None], 3, 2))
    assert shown(Image.fromarray(np.full((2, 2), 128, np.uint16)), kind).max() == 0
    assert shown(Image.fromarray(np.full((2, 2), 129, np.uint16)), kind).max() == 1  # to the nearest


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),  # floats up to 1 are shares of 255
        ([0.0, 0.25], [0, 64]),
        ([0.0, 1.5, 200.0], [0, 2, 200]),  # up to 255 what they are
        ([-1.0, 0.0, 1.0], [0, 128, 255]),  # and others are stretched
        ([1000.0, 1500.0, 2000.0], [0, 128, 255]),
        ([float("nan"), 0.5, 1.0], [0, 128, 255]),
        ([float("-inf"), 0.5, float("inf")], [0, 128, 255]),
        ([700.0, 700.0], [128, 128]),
        ([float("nan")] * 2, [0, 0]),
    ],
)
def test_floats_are_shown_by_their_range(values: list[float], expected: list[int]) -> None:
    pixels = shown(Image.fromarray(np.array([values], np.float32)), "TIFF")
    assert pixels[0, :, 0].tolist() == pixels[0, :, 2].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 1], [0, 1]),
        ([0, 7, 255], [0, 7, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([0, 1, 65536], [0, 0, 255]),
        ([-100, 0, 100], [0, 128, 255]),
        ([70000, 70000], [128, 128]),
    ],
)
def test_whole_numbers_are_shown_by_their_range(values: list[int], expected: list[int]) -> None:
    assert shown(Image.fromarray(np.array([values], np.int32)), "TIFF")[0, :, 1].tolist() == expected


def transparent(mode: str) -> Image.Image:
    """Red at the left, and black, of which nothing is seen, at the right."""
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((0, 0), (200, 0, 0, 255))
    if mode != "P":
        return image.convert(mode)
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    return palette


@pytest.mark.parametrize(
    ("mode", "kind", "options"),
    [
        ("RGBA", "PNG", {}), ("LA", "PNG", {}), ("P", "PNG", {"transparency": 1}),
        ("P", "PNG", {"transparency": bytes([255, 0])}), ("P", "GIF", {"transparency": 1}),
        ("RGBA", "WEBP", {"lossless": True}), ("RGBA", "TIFF", {}),
    ],
)  # fmt: skip
def test_what_is_transparent_shows_the_background(mode: str, kind: str, options: dict[str, object]) -> None:
    red = [60] * 3 if mode == "LA" else [200, 0, 0]
    assert shown(transparent(mode), kind, **options)[0].tolist() == [red, [255, 255, 255]]
    assert shown(transparent(mode), kind, (1, 2, 3), **options)[0].tolist() == [red, [1, 2, 3]]


def test_half_transparent_is_half_of_each() -> None:
    pixels = shown(Image.new("RGBA", (1, 1), (0, 100, 200, 128)), background=(255, 255, 0))
    assert np.abs(pixels[0, 0].astype(int) - [127, 177, 100]).max() <= 1
    colour_key = Image.new("RGB", (2, 1), (9, 9, 9))
    colour_key.putpixel((1, 0), (5, 6, 7))
    assert shown(colour_key, transparency=(5, 6, 7))[0].tolist() == [[9, 9, 9], [255, 255, 255]]
    assert to_rgb(Image.new("La", (1, 1))).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK"])
def test_opaque_images_are_what_pillow_converts_them_to(mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    with Image.open(io.BytesIO(encoded(image, kind))) as written:
        assert np.array_equal(shown(image, kind), np.asarray(written.convert("RGB")))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "AVIF"])
def test_photographs_are_turned_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    """By the same amount from a file, in evaluation and in an image of Pillow that a user has opened."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[:2, :3], pixels[2:, :3] = (255, 0, 0), (0, 255, 0)
    options = (
        {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": "4:4:4"} if kind == "AVIF" else {}
    )
    (tmp_path / "a.jpg").write_bytes(encoded(Image.fromarray(pixels), kind, exif=exif, **options))
    turns = {2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1], 5: lambda x: x.swapaxes(0, 1),
             6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip
    expected = turns.get(orientation, lambda x: x)(pixels).astype(int)
    with Image.open(tmp_path / "a.jpg") as opened:
        for image in (open_image(tmp_path / "a.jpg"), to_rgb(opened)):
            assert image.size == expected.shape[1::-1]
            assert np.abs(np.asarray(image) - expected).max() <= 8
        assert opened.format == kind
    assert centre_crop(open_image(tmp_path / "a.jpg"), 4).shape == (3, 4, 4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_deep_images_are_turned_too_and_damaged_exif_does_no_harm() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = (RAMP * 4369).astype(np.uint16)
    assert np.array_equal(shown(Image.fromarray(values), exif=exif)[..., 0], np.rot90(RAMP * 17, -1))
    older = Image.fromarray(np.full((2, 2), 200, np.int32))  # what older Pillows make of a PNG of 16 bits
    older.format, older.getexif()[0x0112] = "PNG", 6
    assert np.asarray(to_rgb(older)).max() == 1
    content = encoded(Image.new("RGB", (6, 4)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert open_image(content).size == (6, 4)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    options = {"lossless": True} if kind == "WEBP" else {}
    assert shown(frames[0], kind, save_all=True, append_images=frames[1:], **options)[0, 0].tolist() == [200, 0, 0]


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "a.jfif", "a.webp", "a.bmp", "a.tif", "a.gif", "a.avif", "a.wrong"])
def test_formats_are_told_by_content(tmp_path: Path, name: str) -> None:
    ending = name.split(".")[1].lower()
    kind = {"jpg": "JPEG", "jfif": "JPEG", "tif": "TIFF", "wrong": "PNG"}.get(ending, ending.upper())
    if kind == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    (tmp_path / name).write_bytes(encoded(Image.new("RGB", (8, 8), (0, 0, 200)), kind))
    pixel = np.array(open_image(tmp_path / name).getpixel((4, 4)))
    assert np.abs(pixel - [0, 0, 200]).max() < 5


@pytest.mark.parametrize("size", [(1, 1), (10_000, 3), (3, 10_000), (2_000, 16)])
def test_dots_and_strips_are_cropped_like_any_other(size: tuple[int, int]) -> None:
    """The middle of a strip is what is seen of it, whatever its ends hold."""
    width, height = size
    image = Image.new("RGB", size, "red")
    image.paste((0, 0, 250), (width // 4, height // 4, width - width // 4, height - height // 4))
    for crop in (centre_crop(image, 24), random_crop(image, 24, 0)):
        assert crop.shape == (3, 24, 24)
    if max(size) > 1:
        assert centre_crop(image, 24)[:, 12, 12].tolist() == [0, 0, 250]


def test_a_strip_is_cropped_as_the_whole_would_be() -> None:
    generator = np.random.default_rng(0)
    strip = Image.fromarray(generator.integers(0, 256, (16, 400, 3)).astype(np.uint8))
    whole = centre_crop(strip.crop((136, 0, 264, 16)), 16)  # eight times as wide as high: not cut
    assert torch.equal(centre_crop(strip, 16), whole)


CUT = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)), "JPEG")[:3000]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>403 Forbidden</html>", "not an image"),
        (b"\0" * 100, "not an image"),
        (CUT, "cut short"),
        (b"\xff\xd8\xff" + b"\0" * 40, "cannot be decoded"),
        (b"\0\0\0\x20ftypheic" + b"\0" * 40, "HEIC, which needs the package pillow-heif"),
    ],
)
def test_why_an_image_cannot_be_read_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    if "heic" in reason.lower() and "HEIF" in Image.OPEN:
        pytest.skip("pillow-heif is installed")
    (tmp_path / "a.jpg").write_bytes(content)
    for source, where in ((tmp_path / "a.jpg", ""), (content, "0.tar:7")):
        with pytest.raises(BadImageError) as error:
            open_image(source, where=where)
        assert error.value.reason == reason
        assert str(error.value) == f"cannot read the image {where or tmp_path / 'a.jpg'}: {reason}"


@pytest.mark.filterwarnings("ignore:Image size")
def test_missing_files_folders_and_bombs_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in (("no.jpg", "no such file"), ("folder.jpg", "cannot be read (Is a directory)")):
        with pytest.raises(BadImageError) as error:
            open_image(tmp_path / name)
        assert error.value.reason == reason
    assert MOST_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert open_image(encoded(Image.new("RGB", (10, 10)), "PNG")).size == (10, 10)
    with pytest.raises(BadImageError, match="more than 178,956,970 pixels"):
        open_image(encoded(Image.new("RGB", (10, 11)), "PNG"))


def test_a_file_name_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "new\nline \udce9.jpg"
    with pytest.raises(BadImageError) as error:
        open_image(path)
    assert str(error.value).endswith(r"new\nline \udce9.jpg: no such file")


def test_backgrounds() -> None:
    colours = {"white": WHITE, "1,2,3": (1, 2, 3), "#0a0b0c": (10, 11, 12), " 7, 8,9": (7, 8, 9)}
    assert {text: parse_colour(text) for text in colours} == colours
    for text in ("", "1,2", "1,2,300", "256,0,0", "-1,0,0", "whitish"):
        with pytest.raises(UserError, match="--background: expected R,G,B such as 128,128,128, or a name"):
            parse_colour(text)
