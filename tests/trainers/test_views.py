"""Images without captions: digits, folders, their splits, and two random views of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COLOURS, drawing, rows
from torch import Tensor

from ssl_kernels.trainers.data import digits, image_data
from ssl_kernels.trainers.data.image_data import ImageConfig
from ssl_kernels.trainers.data.image_sets import Images, read_folder
from ssl_kernels.trainers.data.views import DrawingView, PhotoView, View, ViewBatches
from ssl_kernels.trainers.errors import UserError

STILL = DrawingView(degrees=0, scale=1, shift=0, shear=0)
LIVELY = DrawingView(degrees=25, scale=1.25, shift=0.075, shear=0.2, brightness=0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawings of each of four colours, a folder to a colour."""
    folder = tmp_path_factory.mktemp("colours")
    for colour, shape, shade in rows(48):
        (folder / colour).mkdir(exist_ok=True)
        drawing(colour, shape, shade).save(folder / colour / f"{shape}{shade}.png")
    return folder


def random_images(n: int = 12, size: int = 16) -> Images:
    generator = torch.Generator().manual_seed(0)
    return Images(torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator))


def test_the_digits_are_five_hundred_of_each_on_a_black_ground() -> None:
    images, labels = digits.load()
    assert images.shape == (5000, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [500] * 10
    assert images[:, :, :2].max() == images[..., -2:].max() == 0
    assert images.max() == 255
    assert 0.1 < images[::50].float().mean() / 255 * 32**2 / 28**2 < 0.16  # ink covers an eighth of a digit's box


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5])
def test_a_split_is_stratified_and_complete(share: float) -> None:
    labels = torch.arange(300) % 3
    kept, held_out = digits.split(labels, share, seed=1)
    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(300))
    assert labels[held_out].bincount(minlength=3).tolist() == [round(100 * share)] * 3
    again, other = digits.split(labels, share, seed=1)[1], digits.split(labels, share, seed=2)[1]
    assert torch.equal(held_out, again)
    assert share == 0 or not torch.equal(held_out, other)


def images_of(data: Images) -> set[bytes]:
    assert isinstance(data.images, Tensor)
    return {image.tobytes() for image in data.images.numpy()}


@pytest.mark.parametrize("name", ["mnist", "openmoji"])
def test_validation_images_are_never_the_held_out_ones(name: str) -> None:
    final = image_data.load(ImageConfig(data=name, image_size=16), batch_size=8, seed=0, workers=0)
    tuning = image_data.load(ImageConfig(name, 16, evaluate_on="validation"), batch_size=8, seed=0, workers=0)
    share = {"mnist": 0.2, "openmoji": 0.1}[name]
    assert len(final.held_out) == pytest.approx(share * (len(final.train) + len(final.held_out)), rel=0.05)
    assert len(tuning.held_out) == pytest.approx(0.2 * len(final.train), abs=1)
    assert len(tuning.train) + len(tuning.held_out) == len(final.train)
    assert not images_of(tuning.held_out) & (images_of(final.held_out) | images_of(tuning.train))
    assert not images_of(final.train) & images_of(final.held_out)


def test_a_folder_is_labelled_by_its_subfolders(folder: Path) -> None:
    images = read_folder(folder)
    assert isinstance(images.images, list)
    assert images.labels is not None
    names = sorted(COLOURS)
    assert [path.parent.name for path in images.images] == [names[i] for i in images.labels]
    data = image_data.load(ImageConfig(data=str(folder), image_size=16, held_out=0.25), batch_size=4, seed=0, workers=0)
    assert data.held_out.labels is not None
    assert data.held_out.labels.bincount().tolist() == [3] * 4
    flat = read_folder(folder / "red")
    assert flat.labels is None
    assert len(flat) == 12


def test_hidden_files_and_folders_are_left_out(tmp_path: Path) -> None:
    names = ("a/1.png", "a/2.png", "b/1.png", ".checkpoints/1.png", "a/._1.png", "b/.thumbnails/1.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        drawing("red", "dot", 0).save(tmp_path / name)
    images = read_folder(tmp_path)
    assert images.images == [tmp_path / name for name in names[:3]]
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]


def test_folders_of_splits_are_not_taken_for_classes(tmp_path: Path) -> None:
    for name in ("train/red/1.png", "val/red/1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        drawing("red", "dot", 0).save(tmp_path / name)
    with pytest.raises(UserError, match=r"--data: the folders of .* are splits, not classes \(train, val\)"):
        read_folder(tmp_path)


def test_bad_data_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data: expected mnist, openmoji or a folder of images, got 'cifar'"):
        image_data.load(ImageConfig(data="cifar"), batch_size=4, seed=0, workers=0)
    with pytest.raises(UserError, match="--data: no images in"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="--batch-size: 99 is more than the 44 training images"):
        image_data.load(ImageConfig(data=str(folder)), batch_size=99, seed=0, workers=0)
    for options, flag in (({"held_out": 1.0}, "--held-out"), ({"image_size": 7}, "--image-size")):
        with pytest.raises(UserError, match=flag):
            ImageConfig(**options).check_data()  # type: ignore[arg-type]


def test_a_view_that_does_nothing_returns_the_image() -> None:
    images = random_images()
    assert torch.equal(STILL(images, [3, 1], 16, np.random.default_rng(0)), images.images[[3, 1]])


def test_a_drawing_moves_over_its_ground() -> None:
    """A dot in the middle of a ground of 200 stays a dot, moves by no more than it may, and leaves no other trace."""
    pixels = torch.full((64, 3, 41, 41), 200, dtype=torch.uint8)
    pixels[..., 19:22, 19:22] = 0
    view = DrawingView(degrees=30, scale=1.5, shift=0.2, shear=0.1, ground=200.0)
    shown = view(Images(pixels), range(64), 41, np.random.default_rng(0))
    ink = 200 - shown[:, 0].float()
    assert ink.min() == 0
    places = torch.arange(41.0)
    y, x = (ink.sum(axis) @ places / ink.sum((1, 2)) - 20 for axis in (2, 1))
    reach = 0.2 * 41 * 1.5 * 1.2  # a shrunken image is also shifted by less of its own pixels
    assert 5 < y.abs().max() < reach
    assert 5 < x.abs().max() < reach
    area = ink.sum((1, 2)) / (9 * 200)
    assert 0.4 < area.min() < 0.7 < 1.4 < area.max() < 2.5  # of scales from 1/1.5 to 1.5, squared


@pytest.mark.parametrize("view", [LIVELY, PhotoView()], ids=["drawing", "photo"])
def test_views_come_from_their_generator_alone(view: View, folder: Path) -> None:
    images = random_images() if isinstance(view, DrawingView) else read_folder(folder)
    before = torch.get_rng_state()
    one, same, other = (view(images, range(4), 16, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert one.shape == (4, 3, 16, 16)
    assert one.dtype == torch.uint8
    assert torch.equal(one, same)
    assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])


def test_batches_are_a_function_of_seed_epoch_and_number(folder: Path) -> None:
    def batches(seed: int, workers: int = 0) -> ViewBatches:
        return ViewBatches(read_folder(folder), PhotoView(), size=16, batch_size=8, seed=seed, workers=workers)

    whole = [batch["views"] for batch in batches(0).batches(epoch=2)]
    assert len(whole) == len(batches(0)) == 6
    for first, second in whole:
        assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    late = [batch["views"] for batch in batches(0, workers=1).batches(epoch=2, start=3)]
    assert all(torch.equal(a, b) for x, y in zip(whole[3:], late, strict=True) for a, b in zip(x, y, strict=True))
    for other in (batches(1)[2, 0], batches(0)[3, 0], batches(0)[2, 1]):
        assert not torch.equal(other["views"][0], whole[0][0])


def test_an_epoch_shows_every_image_once() -> None:
    images = random_images()
    data = ViewBatches(images, STILL, size=16, batch_size=4, seed=0)
    shown = torch.cat([batch["views"][0] for batch in data.batches(epoch=0)])
    assert images_of(Images(shown)) == images_of(images)
    assert not torch.equal(shown, images.images)


def test_the_views_of_an_image_differ_and_return_in_another_run() -> None:
    first, second = ViewBatches(random_images(), LIVELY, size=16, batch_size=4, seed=0)[1, 2]["views"]
    again, _ = ViewBatches(random_images(), LIVELY, size=16, batch_size=4, seed=0)[1, 2]["views"]
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first, again)


def test_the_fingerprint_tells_data_apart(folder: Path) -> None:
    def fingerprint(images: Images) -> str:
        return ViewBatches(images, STILL, size=16, batch_size=4, seed=0).fingerprint

    images, files = random_images(), read_folder(folder)
    prints = [fingerprint(x) for x in (images, images.select(range(11)), files, files.select(range(1, 48)))]
    assert len(set(prints)) == 4
    assert fingerprint(random_images()) == prints[0]
