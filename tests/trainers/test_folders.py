"""Folders of images as people have them: nothing is left out or labelled without a word."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cases import folders as cases
from cases.folders import CLASSES, Expected

from ssl_kernels.trainers import simclr
from ssl_kernels.trainers.data import folders, image_data, views
from ssl_kernels.trainers.data.faults import Faults
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.image_data import ImageConfig, ImageData
from ssl_kernels.trainers.data.image_sets import Images, read_folder
from ssl_kernels.trainers.data.views import ViewBatches
from ssl_kernels.trainers.errors import UserError

STILL = views.DrawingView(degrees=0, scale=1, shift=0, shear=0)


def by_class(images: Images) -> dict[str, int]:
    labels = [folders.UNLABELLED] * len(images) if images.labels is None else images.labels.tolist()
    return dict(Counter(images.classes[label] if label >= 0 else "" for label in labels))


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.__name__)
def test_a_folder_is_read_whole(tmp_path: Path, case: Callable[[Path], Expected]) -> None:
    expected = case(tmp_path / "data")
    found, faults = Found("data"), Faults()
    images = read_folder(tmp_path / "data", found, faults)
    assert by_class(images) == expected.classes
    assert {what: tally.count for what, tally in found.left_out.items()} == expected.left_out
    assert faults.counts() == expected.faults
    assert found.holds["images"] == len(images)
    assert found.holds.get("classes", 0) == len(expected.classes.keys() - {""})
    assert all(line.isprintable() for line in found.lines(faults))
    assert isinstance(images.images, list)
    for path, label in zip(images.images, [] if images.labels is None else images.labels.tolist(), strict=False):
        assert label == folders.UNLABELLED or images.classes[label] in path.parts
    assert len(set(images.images)) == len(images)
    again = read_folder(tmp_path / "data", faults=Faults())
    assert again.images == images.images


def test_what_is_labelled_how_is_told(tmp_path: Path) -> None:
    cases.stray(tmp_path / "data")
    (tmp_path / "data/none").mkdir()
    data = loaded(tmp_path / "data", held_out=0.25)
    assert data.found.lines() == [
        f"found in {tmp_path}/data: 49 images, 4 classes; labelled by folder: black 12, blue 12, green 12, red 12;"
        " 1 outside of these folders have no label; 1 is a copy of others",
        "left out: 1 class folders without images: none",
        "training images: 37, held out: 12",
    ]


def test_a_folder_without_images_says_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data: no images in .*; expected files such as .jpg, .jpeg, .jfif$"):
        read_folder(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.png").symlink_to("nothing")
    with pytest.raises(
        UserError, match=r"--data: no images in .* \(1 other files: .*a.txt; 1 link to nothing: .*b.png\)"
    ):
        read_folder(tmp_path, faults=Faults())


def test_many_links_to_nothing_stop_the_run(tmp_path: Path) -> None:
    cases.classes(tmp_path / "data")
    for i in range(12):
        (tmp_path / f"data/red/link {i}.png").symlink_to("nothing")
    with pytest.raises(UserError, match="--max-bad 1%: 12 of 60 training examples cannot be used"):
        read_folder(tmp_path / "data", faults=Faults())


# -- Splits ----------------------------------------------------------------------------------------------------------


def loaded(folder: Path, **options: object) -> ImageData:
    config = ImageConfig(data=str(folder), image_size=16, **options)  # type: ignore[arg-type]
    return image_data.load(config, batch_size=4, seed=0, workers=0)


@pytest.mark.parametrize(
    ("names", "used"), [(("train", "val"), "val"), (("Training", "valid", "TEST"), "TEST"), (("train", "dev"), "dev")]
)
@pytest.mark.parametrize("inside", ["{split}/{colour}", "set/{split}/images/{colour}", "{split}"])
def test_folders_of_splits_are_used_as_such(tmp_path: Path, names: tuple[str, ...], used: str, inside: str) -> None:
    cases.split(tmp_path / "data", names, inside)
    data = loaded(tmp_path / "data")
    assert (len(data.train), len(data.held_out)) == (48, 12)
    assert all(used in path.parts for path in data.held_out.images)
    if inside == "{split}":
        assert data.train.labels is None
    else:
        assert by_class(data.train) == dict.fromkeys(CLASSES, 12)
        assert by_class(data.held_out) == dict.fromkeys(CLASSES, 3)
    assert data.found.left_out.keys() == ({"images of other splits"} if len(names) > 2 else set())
    with pytest.raises(UserError, match=r"--data: the folders of .* are splits, not classes \(.*\); name one of them"):
        read_folder(tmp_path / "data")
    inner = loaded(tmp_path / "data", evaluate_on="validation")
    assert not set(inner.held_out.images) & set(data.held_out.images)
    assert set(inner.train.images) | set(inner.held_out.images) == set(data.train.images)


def test_a_split_with_classes_is_preferred_to_one_without(tmp_path: Path) -> None:
    cases.split(tmp_path / "data", ("train", "val"))
    cases.write(tmp_path / "data/test", 8, place=lambda colour, shape: "")
    data = loaded(tmp_path / "data")
    assert by_class(data.held_out) == dict.fromkeys(CLASSES, 3)
    assert data.found.left_out["images of other splits"].count == 8


def test_images_of_a_split_that_are_held_out_are_not_trained_on(tmp_path: Path) -> None:
    cases.split(tmp_path / "data")
    for name in ("000", "004"):
        copied = next(tmp_path.glob(f"data/val/*/{name}.png"))
        (tmp_path / f"data/train/red/again {name}.png").write_bytes(copied.read_bytes())
        (tmp_path / f"data/val/red/again {name}.png").write_bytes(copied.read_bytes())
    data = loaded(tmp_path / "data")
    assert (len(data.train), len(data.held_out)) == (48, 12)
    assert data.found.left_out["copies of held-out images"].count == 4


def test_copies_of_an_image_are_on_one_side(tmp_path: Path) -> None:
    cases.copies(tmp_path / "data")
    data = loaded(tmp_path / "data", held_out=0.25)
    train, held_out = ({path.read_bytes() for path in part.images} for part in (data.train, data.held_out))
    assert (len(data.train), len(data.held_out)) == (72, 12)
    assert (len(train), len(held_out)) == (36, 12)
    assert not train & held_out
    assert by_class(data.held_out) == dict.fromkeys(CLASSES, 3)
    assert data.found.left_out["copies of held-out images"].count == 12
    assert "48 are copies of others" in data.found.remarks


def test_an_image_without_a_label_is_trained_on(tmp_path: Path) -> None:
    cases.classes(tmp_path / "data")
    for i in range(20):
        cases.noise(tmp_path / f"data/{i}.png", i)
    data = loaded(tmp_path / "data", held_out=0.25)
    assert by_class(data.train) == dict.fromkeys(CLASSES, 9) | {"": 20}
    assert by_class(data.held_out) == dict.fromkeys(CLASSES, 3)


def test_a_class_too_small_to_split_is_trained_on(tmp_path: Path) -> None:
    cases.tiny_class(tmp_path / "data")
    data = loaded(tmp_path / "data", held_out=0.25)
    assert by_class(data.train) == dict.fromkeys(CLASSES, 9) | {"rare": 1}
    assert by_class(data.held_out) == dict.fromkeys(CLASSES, 3)
    assert "no image is held out of the classes rare" in data.found.remarks


def test_an_image_in_two_classes_is_named(tmp_path: Path) -> None:
    cases.classes(tmp_path / "data")
    (tmp_path / "data/blue/again.png").write_bytes((tmp_path / "data/red/000.png").read_bytes())
    odd = loaded(tmp_path / "data").found.oddities["copies of an image of another class"]
    assert (odd.count, odd.places) == (1, [f"{tmp_path}/data/red/000.png"])


# -- Names -----------------------------------------------------------------------------------------------------------


def test_a_moved_folder_is_the_same_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cases.not_utf8(tmp_path / "data")

    def fingerprint(folder: str | Path) -> str:
        return ViewBatches(read_folder(Path(folder)), STILL, size=16, batch_size=4, seed=0).fingerprint

    here = fingerprint(tmp_path / "data")
    (tmp_path / "moved/to").mkdir(parents=True)
    (tmp_path / "data").rename(tmp_path / "moved/to/another name")
    monkeypatch.chdir(tmp_path / "moved")
    assert fingerprint("to/another name") == here
    (tmp_path / "moved/to/another name/red/000.png").rename(tmp_path / "moved/to/another name/red/0000.png")
    assert fingerprint("to/another name") != here


def test_names_that_are_not_utf8_last_through_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases.not_utf8(tmp_path / "data")
    shutil.copy(tmp_path / "data/red/000.png", tmp_path / "data/stray.png")
    (tmp_path / "data/red/new\nline\udce9.png").write_text("x")
    arguments = ["--data", str(tmp_path / "data"), "--held-out", "0.25", "--image-size", "8", "--batch-size", "8"]
    arguments += ["--epochs", "1", "--hidden", "8", "--dim", "8", "--accelerator", "cpu"]
    assert simclr.main([*arguments, "--output-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert (
        "labelled by folder: red 14, black 12, bl\\udcfe 12, green 12; 1 outside of these folders have no label" in out
    )
    assert "1 not an image: " in out
    assert f"{tmp_path}/data/red/new\\nline\\udce9.png" in out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["data"]["holds"] == {"images": 51, "classes": 4}
    assert summary["figures"][1]["chance"] == pytest.approx(0.25, abs=0.1)
    assert (tmp_path / "run/last.pt").is_file()
