"""Tables, shards and the batches made of them."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import drawing, png, rows, write_shard
from PIL import Image

from ssl_kernels.trainers.data import DataConfig, files, load, shard_pairs, shards, splits
from ssl_kernels.trainers.data.batches import Batch
from ssl_kernels.trainers.data.identity import Fingerprints, link
from ssl_kernels.trainers.data.pairs import Batches, ImageTextPairs, jitter, make_batch
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.text_towers import NGramTokenizer

TOKENIZE = NGramTokenizer(buckets=512)


def same(a: Batch, b: Batch) -> bool:
    ids = (a["ids"] is None and b["ids"] is None) or torch.equal(a["ids"], b["ids"])
    texts = all(torch.equal(a["text"][key], b["text"][key]) for key in a["text"])
    return ids and texts and torch.equal(a["images"], b["images"])


def read(path: Path) -> ImageTextPairs:
    return files.read_table(path, "image", "caption")


# -- Tables ----------------------------------------------------------------------------------------------------------


def test_csv_tsv_and_jsonl_read_alike(table: Path, tmp_path: Path) -> None:
    expected = read(table)
    assert len(expected) == 96
    assert expected.captions[0] == "red square number 0"
    assert (expected.categories or [])[0] == "square"
    records = list(csv.DictReader(table.open()))
    for record in records:
        record["image"] = str(table.parent / record["image"])
    jsonl, tsv = tmp_path / "pairs.jsonl", tmp_path / "pairs.tsv"
    jsonl.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    with tsv.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["caption", "category", "image"], delimiter="\t")
        writer.writeheader()
        writer.writerows(records)
    for other in (read(jsonl), read(tsv)):
        assert other.captions == expected.captions
        assert other.categories == expected.categories
        assert torch.equal(other.load([3, 5], 16), expected.load([3, 5], 16))


def test_images_are_decoded_resized_and_cropped_around_the_centre(tmp_path: Path) -> None:
    wide = Image.new("RGB", (60, 20), "black")
    wide.paste((200, 100, 50), (20, 0, 40, 20))
    wide.convert("P").save(tmp_path / "wide.png")  # any mode of PNG
    image = ImageTextPairs([tmp_path / "wide.png"], ["x"]).load([0], 10)
    assert image.shape == (1, 3, 10, 10)
    assert image.dtype == torch.uint8
    assert torch.allclose(image[0, :, 5, 5].float(), torch.tensor([200.0, 100, 50]), atol=8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,text\n0.png,a\n", "no column 'caption'; it has 'image', 'text'"),
        ("image,caption\n0.png,a\n1.png,  \n", ":3: without caption"),
        ("image,caption\nabsent.png,a\n", ":2 ("),
        ("image,caption\n", "holds no pairs"),
        ("image,caption\n0.png\n", ":2 (it has 1 cells, and the header 2): broken"),
    ],
)
def test_a_bad_table_is_named_with_its_line(table: Path, content: str, message: str) -> None:
    path = table.parent / "bad.csv"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        read(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("bad.jsonl", b"[1]\n", "expected a JSON object"), ("bad.jsonl", b"{\n", "cannot read"),
     ("bad.csv", b"image,caption\n\xff\xfe,a\n", "cannot read")],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / f"absent-{name}")


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(png(drawing("red", "dot", 0))[:60])
    with pytest.raises(UserError, match=r"cannot read the image .*broken\.png"):
        ImageTextPairs([tmp_path / "broken.png"], ["x"]).load([0], 8)


@pytest.fixture
def tangled(tmp_path: Path) -> ImageTextPairs:
    """120 rows over 40 distinct images: copies under other names, several captions an image, shared captions."""
    generator = np.random.default_rng(0)
    images, captions = [], []
    for i in range(120):
        colour, shape, shade = rows(40)[int(generator.integers(40))]
        path = tmp_path / f"{i}.png"
        drawing(colour, shape, shade).save(path)
        images.append(path if i % 3 else tmp_path / "." / f"{i}.png")
        captions.append(f"{colour} {shape} {shade} {'again' if generator.random() < 0.5 else 'once'}")
    return ImageTextPairs(images, captions)


def contents(pairs: ImageTextPairs) -> set[bytes]:
    assert isinstance(pairs.images, list)
    return {path.read_bytes() for path in pairs.images}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_held_out_image_or_caption_of_a_table_is_trained_on(tangled: ImageTextPairs, seed: int) -> None:
    train, held_out = splits.split(tangled, 0.2, seed)
    assert 4 <= len(held_out) <= 8
    assert not set(train.captions) & set(held_out.captions)
    assert not contents(train) & contents(held_out)
    assert len(contents(held_out)) == len(set(held_out.captions)) == len(held_out)  # one pair of each group
    backwards = tangled.select(range(len(tangled))[::-1])
    assert not set(splits.split(backwards, 0.2, seed)[0].captions) & set(splits.split(backwards, 0.2, seed)[1].captions)


def test_training_pairs_that_match_given_held_out_pairs_are_dropped(tangled: ImageTextPairs) -> None:
    held_out = tangled.select(range(12))
    train = splits.without(tangled, splits.fingerprints(held_out))
    assert 0 < len(train) < 108
    assert not set(train.captions) & set(held_out.captions)
    assert not contents(train) & contents(held_out)
    kept = {caption for caption, path in zip(tangled.captions, tangled.images, strict=True)
            if caption not in held_out.captions and Path(str(path)).read_bytes() not in contents(held_out)}  # fmt: skip
    assert set(train.captions) == kept  # and nothing else


# -- Batches ---------------------------------------------------------------------------------------------------------


def batches(pairs: ImageTextPairs, **options: object) -> Batches:
    return Batches(pairs, TOKENIZE, **{"size": 16, "batch_size": 10, "seed": 0, **options})  # type: ignore[arg-type]


@pytest.fixture(params=["files", "memory"])
def some(request: pytest.FixtureRequest, table: Path) -> ImageTextPairs:
    pairs = read(table)
    return (
        pairs
        if request.param == "files"
        else ImageTextPairs(pairs.load(range(96), 24), pairs.captions, pairs.categories)
    )


def test_an_epoch_visits_every_pair_at_most_once_in_a_new_order(some: ImageTextPairs) -> None:
    data = batches(some)
    epochs = [np.concatenate([data.indices(epoch, number) for number in range(len(data))]) for epoch in (0, 1)]
    assert len(data) == 9
    assert all(len(set(order)) == 90 for order in epochs)
    assert list(epochs[0]) != list(epochs[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_is_a_function_of_seed_epoch_and_number(some: ImageTextPairs, workers: int) -> None:
    whole = list(batches(some, label_captions=0.3).batches(1))
    torch.rand(7), np.random.default_rng().random()
    state = torch.get_rng_state()
    rest = list(batches(some, label_captions=0.3, workers=workers).batches(1, start=4))
    assert len(rest) == 5
    assert all(same(a, b) for a, b in zip(whole[4:], rest, strict=True))
    if workers == 0:
        assert torch.equal(torch.get_rng_state(), state), "batches must not draw from the global generator"
    assert not same(whole[0], next(batches(some, label_captions=0.3).batches(0)))
    assert not same(whole[0], next(batches(some, label_captions=0.3, seed=1).batches(1)))


def test_augmentation_changes_the_images_and_nothing_else(some: ImageTextPairs) -> None:
    plain, augmented = (next(batches(some, augment=flag).batches(0)) for flag in (False, True))
    assert not torch.equal(plain["images"], augmented["images"])
    assert torch.equal(plain["text"]["tokens"], augmented["text"]["tokens"])
    order = batches(some).indices(0, 0)
    assert torch.equal(plain["images"], some.load(order, 16))


def test_jitter_keeps_the_ground_white_and_the_drawing_near() -> None:
    image = torch.full((1, 3, 48, 48), 255, dtype=torch.uint8)
    image[:, :, 18:30, 18:30] = 0
    moved = jitter(image.expand(64, -1, -1, -1), 32, np.random.default_rng(0))
    assert moved.shape == (64, 3, 32, 32)
    assert (moved[:, :, 0] == 255).all()
    assert (moved[:, :, :, -1] == 255).all()
    ink = (moved < 128).float().sum((1, 2, 3)) / 3
    assert float(ink.min()) > 64 / 1.12**2 - 6  # by area, and a pixel's width of the edge
    assert float(ink.max()) < 64 / 0.88**2 + 6
    assert len({picture.numpy().tobytes() for picture in moved}) == 64


def test_category_words_join_captions_as_often_as_asked(some: ImageTextPairs) -> None:
    words: list[str] = []

    def spy(captions: list[str]) -> dict[str, torch.Tensor]:
        words.extend(captions)
        return TOKENIZE(captions)

    data = batches(some, label_captions=0.25, batch_size=32)
    data.tokenize = spy  # type: ignore[assignment]
    made = [batch for epoch in range(20) for batch in data.batches(epoch)]
    touched = [caption for caption in words if caption not in some.captions]
    assert 0.2 < len(touched) / len(words) < 0.3
    assert any(caption == f"a picture of {category}" for caption in touched for category in some.categories or [])
    assert any(caption.startswith("red ") for caption in touched)
    assert all(batch["ids"] is None for batch in made), "a category alone may name only one image of a batch"
    words.clear()
    list(batches(some, label_captions=0.0).batches(0))
    assert not [caption for caption in words if caption not in some.captions]


def test_pairs_that_share_a_caption_or_an_image_are_positives() -> None:
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    assert make_batch(images, list("abcde"), range(5), TOKENIZE)["ids"] is None
    ids = make_batch(images, ["a", "b", "a", "c", "d"], ["p", "q", "r", "q", "s"], TOKENIZE)["ids"].tolist()
    assert ids[0] == ids[2] != ids[1] == ids[3]
    assert len({ids[0], ids[1], ids[4]}) == 3
    assert len(set(link(["x", "y", "z"], [1, 1, 2], ["k", "l", "l"]))) == 1  # through others
    assert link([]) == []


# -- Shards ----------------------------------------------------------------------------------------------------------


def stream(urls: str, held_out: Fingerprints | None = None, **options: object) -> shards.ShardBatches:
    values = {"size": 16, "batch_size": 5, "seed": 0, "workers": 0, "augment": True, "epoch_pairs": 0, **options}
    return shards.ShardBatches(urls, TOKENIZE, held_out=held_out or Fingerprints(), **values)  # type: ignore[arg-type]


def test_shards_give_every_pair_of_an_epoch_once(shards: str) -> None:
    seen: list[str] = []
    data = stream(shards, batch_size=6, augment=False)
    data.tokenize = lambda captions: seen.extend(captions) or TOKENIZE(captions)  # type: ignore[assignment, func-returns-value]
    made = list(data.batches(0))
    assert len(made) == len(data) == 8
    assert sorted(seen) == sorted(f"{colour} {shape} number {shade}" for colour, shape, shade in rows(48))
    expected = {f"{c} {s} number {n}": (c, s, n) for c, s, n in rows(48)}
    first = torch.from_numpy(np.array(drawing(*expected[seen[0]]).resize((16, 16), Image.Resampling.BILINEAR)))
    assert torch.allclose(made[0]["images"][0].permute(1, 2, 0).float(), first.float(), atol=2)
    other = list(data.batches(1))
    assert not same(made[0], other[0])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores is the point
@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_shards_continue_in_mid_epoch(shards: str, workers: int, start: int) -> None:
    whole = list(stream(shards, workers=workers).batches(2))
    rest = list(stream(shards, workers=workers).batches(2, start=start))
    assert len(whole) == 9
    assert len(rest) == 9 - start
    assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_whose_shards_are_held_out_takes_others(shards: str) -> None:
    from ssl_kernels.trainers.data.shard_pairs import read_all

    _, marks = read_all(shards.replace("{000..003}", "003"), 16)
    sizes = [len(batch["images"]) for batch in stream(shards, marks, workers=4).batches(0)]
    assert sizes == [5] * 7  # of the 36 pairs that are left


def test_a_short_stream_starts_over(shards: str) -> None:
    data = stream(shards, epoch_pairs=120)
    assert len(list(data.batches(0))) == 24


def test_held_out_samples_of_shards_are_not_trained_on(tmp_path: Path, shards: str) -> None:
    pairs = rows(48)
    copies = [(png(drawing(*pair)), f"another name {i}") for i, pair in enumerate(pairs[:6])]
    captions = [
        (png(drawing("black", "dot", 90 + i)), f"{c} {s} number {n}") for i, (c, s, n) in enumerate(pairs[6:10])
    ]
    write_shard(tmp_path / "held.tar", [*copies, *captions, copies[0]])
    held_out, marks = files_or_shards(tmp_path / "held.tar")
    assert len(held_out) == 10
    seen: list[str] = []
    data = stream(shards, marks, batch_size=38, augment=False)
    data.tokenize = lambda captions: seen.extend(captions) or TOKENIZE(captions)  # type: ignore[assignment, func-returns-value]
    assert len(list(data.batches(0))) == 1
    assert sorted(seen) == sorted(f"{c} {s} number {n}" for c, s, n in pairs[10:])


def files_or_shards(path: Path) -> tuple[ImageTextPairs, Fingerprints]:
    return shard_pairs.read_all(str(path), 16)


def test_missing_and_broken_shards_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data: cannot read the shard .*001.tar"):
        stream(str(tmp_path / "{001..002}.tar"))
    (tmp_path / "001.tar").write_bytes(b"no tar" * 400)
    with pytest.raises(UserError, match=r"0 pairs of an epoch .*1 lost from a shard that is no tar file: .*001\.tar"):
        stream(str(tmp_path / "001.tar"))


# -- load ------------------------------------------------------------------------------------------------------------


def config(**options: object) -> DataConfig:
    return DataConfig(**{"image_size": 16, **options})  # type: ignore[arg-type]


def test_load_splits_a_table(table: Path) -> None:
    data = load(config(data=str(table), held_out=0.25), TOKENIZE, batch_size=8, seed=0, workers=0)
    assert data.train is not None
    assert data.held_out is not None
    assert (len(data.train), len(data.held_out)) == (72, 24)
    inner = load(
        config(data=str(table), held_out=0.25, evaluate_on="validation"), TOKENIZE, batch_size=8, seed=0, workers=0
    )
    assert inner.train is not None
    assert inner.held_out is not None
    assert set(inner.train.captions) | set(inner.held_out.captions) == set(data.train.captions)


def test_load_takes_held_out_data_of_either_kind(table: Path, shards: str, tmp_path: Path) -> None:
    held = tmp_path / "held.csv"
    shutil.copy(table.parent / "5.png", tmp_path / "copy.png")
    held.write_text("image,caption\ncopy.png,a copy of number five\n")
    with_table = load(config(data=str(table), held_out_data=str(held)), TOKENIZE, batch_size=8, seed=0, workers=0)
    assert with_table.train is not None
    assert read(table).captions[5] not in with_table.train.captions
    assert len(with_table.train) == 95
    with_shards = load(config(data=str(table), held_out_data=shards), TOKENIZE, batch_size=8, seed=0, workers=0)
    assert with_shards.train is not None
    assert len(with_shards.train) == 48
    streamed = load(config(data=shards, held_out_data=str(held)), TOKENIZE, batch_size=8, seed=0, workers=0)
    assert streamed.train is None
    assert streamed.batches.epoch_pairs == 47  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda table, shards: config(data="pictures.zip"), "--data: expected openmoji, a table"),
        (lambda table, shards: config(data=str(table), held_out_data="x.zip"), "--held-out-data: expected"),
        (lambda table, shards: config(data=str(table), held_out_data="x.csv"), "--held-out-data: no such file"),
        (lambda table, shards: config(held_out_data=str(table)), "--held-out-data: openmoji brings its own"),
    ],
)
def test_load_names_the_bad_argument(
    table: Path, shards: str, make: Callable[[Path, str], DataConfig], message: str
) -> None:  # fmt: skip
    with pytest.raises(UserError, match=message):
        load(make(table, shards), TOKENIZE, batch_size=8, seed=0, workers=0)


@pytest.mark.parametrize("kind", ["table", "shards"])
def test_a_batch_larger_than_the_data_is_refused(table: Path, shards: str, kind: str) -> None:
    name = str(table) if kind == "table" else shards
    with pytest.raises(UserError, match=r"--batch-size: 500 is more than the \d+"):
        load(config(data=name), TOKENIZE, batch_size=500, seed=0, workers=0)
    if kind == "shards":
        with pytest.raises(UserError, match=r"--workers: 9 is more than the 4 shards"):
            load(config(data=name), TOKENIZE, batch_size=4, seed=0, workers=9)
