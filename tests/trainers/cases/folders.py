"""Folders of images as people have them: each case writes one and says what is found in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conftest import COLOURS, drawing, rows
from PIL import Image

CLASSES = sorted(COLOURS)


@dataclass
class Expected:
    """What a folder holds: images by class ("" for those without a label), and what is left out of it how often."""

    classes: dict[str, int]
    left_out: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)


def write(folder: Path, count: int = 48, place: Callable[[str, str], str] = lambda colour, shape: colour) -> None:
    """Drawings, each in the folder that `place` names for its colour and its shape."""
    for i, (colour, shape, shade) in enumerate(rows(count)):
        own = folder / place(colour, shape)
        own.mkdir(parents=True, exist_ok=True)
        drawing(colour, shape, shade).save(own / f"{i:03}.png")


EVEN = dict.fromkeys(CLASSES, 12)


def classes(folder: Path) -> Expected:
    write(folder)
    return Expected(EVEN)


def flat(folder: Path) -> Expected:
    write(folder, place=lambda colour, shape: "")
    return Expected({"": 48})


def in_one_folder(folder: Path) -> Expected:
    write(folder, place=lambda colour, shape: "images")
    return Expected({"": 48})


def deep(folder: Path) -> Expected:
    write(folder, place=lambda colour, shape: f"data/images/{colour}/{shape}")
    return Expected(EVEN)


def stray(folder: Path) -> Expected:
    write(folder)
    shutil.copy(folder / "red/000.png", folder / "stray.png")
    return Expected(EVEN | {"": 1})


def stray_above_deep(folder: Path) -> Expected:
    write(folder, place=lambda colour, shape: f"images/{colour}")
    shutil.copy(folder / "images/red/000.png", folder / "stray.png")
    shutil.copy(folder / "images/red/000.png", folder / "images/stray.png")
    return Expected(EVEN | {"": 2})


def mostly_beside(folder: Path) -> Expected:
    """A flat folder with two small ones in it, which are hardly its classes."""
    write(folder, 40, place=lambda colour, shape: "")
    write(folder / "old", 4, place=lambda colour, shape: "")
    write(folder / "new", 4, place=lambda colour, shape: "")
    return Expected({"": 48})


def linked_classes(folder: Path) -> Expected:
    write(folder.with_name(f"{folder.name} elsewhere"))
    folder.mkdir()
    for name in CLASSES:
        (folder / name).symlink_to(folder.with_name(f"{folder.name} elsewhere") / name)
    return Expected(EVEN)


def linked_root(folder: Path) -> Expected:
    write(folder.with_name(f"{folder.name} elsewhere"))
    folder.symlink_to(folder.with_name(f"{folder.name} elsewhere"))
    return Expected(EVEN)


def links_in_circles(folder: Path) -> Expected:
    write(folder)
    (folder / "a self").symlink_to(folder)
    (folder / "red/up").symlink_to("..")
    (folder / "red/above").symlink_to(folder.parent)
    (folder.parent / "beside").mkdir()
    drawing("red", "dot", 9).save(folder.parent / "beside/a.png")
    (folder / "a second red").symlink_to("red")
    (folder / "snake").symlink_to("snake")
    return Expected(EVEN, {"links to folders that are read already": 4, "other files": 1})


def links_into_each_other(folder: Path) -> Expected:
    """Links to a folder elsewhere, and to one in that, which is read once."""
    elsewhere = folder.with_name(f"{folder.name} elsewhere")
    write(elsewhere / "all", place=lambda colour, shape: colour)
    write(folder, 12, place=lambda colour, shape: "own")
    (folder / "a").symlink_to(elsewhere / "all/red")
    (folder / "b").symlink_to(elsewhere)
    return Expected({"own": 12, "a": 12, "b": 36}, {"links to folders that are read already": 1})


def linked_file(folder: Path) -> Expected:
    write(folder)
    other = folder.with_name(f"{folder.name} elsewhere.png")
    drawing("black", "dot", 99).save(other)
    (folder / "red/link.png").symlink_to(other)
    return Expected(EVEN | {"red": 13})


def dangling(folder: Path) -> Expected:
    write(folder)
    (folder / "red/link.png").symlink_to("/nonexistent/a.png")
    return Expected(EVEN, faults={"link to nothing": 1})


def endings(folder: Path) -> Expected:
    kinds = {
        "JPG": "JPEG", "jpeg": "JPEG", "jfif": "JPEG", "jpe": "JPEG", "PNG": "PNG", "webp": "WEBP", "BMP": "BMP",
        "tif": "TIFF", "TIFF": "TIFF", "gif": "GIF", "avif": "AVIF", "ppm": "PPM", "jp2": "JPEG2000", "tga": "TGA",
        "heic": "JPEG",
    }  # fmt: skip
    folder.mkdir()
    for ending, kind in kinds.items():
        drawing("red", "dot", len(ending)).save(folder / f"a.{ending}", kind)
    (folder / "a.pdf").write_text("x")
    (folder / "notes.txt").write_text("x")
    (folder / "no ending").write_text("x")
    return Expected({"": len(kinds)}, {"other files": 3})


def hidden(folder: Path) -> Expected:
    write(folder)
    names = (".hidden.png", "._000.png", ".cache/a.png", "Thumbs.db", "desktop.ini", "__MACOSX/red/._a.png",
             "red/.DS_Store", "@eaDir/a.png")  # fmt: skip
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("x")
    return Expected(EVEN, {"hidden and system files": 8})


def not_utf8(folder: Path) -> Expected:
    write(folder)
    shutil.copy(folder / "red/000.png", os.fsencode(folder) + b"/red/caf\xe9.png")
    os.rename(folder / "blue", os.fsencode(folder) + b"/bl\xfe")
    return Expected({"bl\udcfe": 12, "black": 12, "green": 12, "red": 13})


def line_breaks(folder: Path) -> Expected:
    write(folder)
    shutil.copy(folder / "red/000.png", folder / "red" / "new\nline.png")
    return Expected(EVEN | {"red": 13})


def folder_like_a_file(folder: Path) -> Expected:
    write(folder)
    (folder / "folder.jpg").mkdir()
    return Expected(EVEN, {"class folders without images": 1})


def empty_class(folder: Path) -> Expected:
    write(folder)
    (folder / "none/below").mkdir(parents=True)
    (folder / "texts").mkdir()
    (folder / "texts/a.txt").write_text("x")
    return Expected(EVEN, {"class folders without images": 2, "other files": 1})


def tiny_class(folder: Path) -> Expected:
    write(folder)
    (folder / "rare").mkdir()
    drawing("black", "dot", 99).save(folder / "rare/a.png")
    return Expected(EVEN | {"rare": 1})


def class_called_test(folder: Path) -> Expected:
    write(folder)
    (folder / "red").rename(folder / "test")
    return Expected(dict.fromkeys([*CLASSES[:3], "test"], 12))


def classes_called_train_and_test(folder: Path) -> Expected:
    write(folder)
    (folder / "red").rename(folder / "test")
    (folder / "blue").rename(folder / "train")
    return Expected(dict.fromkeys(["black", "green", "test", "train"], 12))


CASES: Sequence[Callable[[Path], Expected]] = (
    classes, flat, in_one_folder, deep, stray, stray_above_deep, mostly_beside, linked_classes, linked_root,
    links_in_circles, links_into_each_other, linked_file, dangling, endings, hidden, not_utf8, line_breaks,
    folder_like_a_file, empty_class, tiny_class, class_called_test, classes_called_train_and_test,
)  # fmt: skip


def split(folder: Path, names: Sequence[str] = ("train", "val"), inside: str = "{split}/{colour}") -> None:
    """Twelve images to train on of each class, and three for each other split."""
    for split in names:
        for i, (colour, shape, shade) in enumerate(rows(48 if split.lower().startswith("train") else 24)):
            own = folder / inside.format(split=split, colour=colour)
            own.mkdir(parents=True, exist_ok=True)
            image = drawing(colour, shape, shade + 40 * names.index(split))
            if split.lower().startswith("train") or i % 2 == 0:
                image.save(own / f"{i:03}.png")


def copies(folder: Path) -> None:
    """Each image twice, with another name and another ending."""
    write(folder)
    for path in sorted(folder.rglob("*.png")):
        shutil.copy(path, path.with_name(f"copy of {path.stem}.PNG"))


def noise(path: Path, seed: int) -> None:
    Image.effect_noise((8, 8), seed + 1).save(path)
