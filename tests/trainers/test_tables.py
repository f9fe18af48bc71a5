"""Tables of pairs as people have them: every row is read, or counted by its reason, or the table is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cases.tables import COUNT, GOOD, LEFT_OUT, ODD, REFUSED, Pairs, delimited, json_lines, objects, write_images
from conftest import drawing, png, write_shard

from ssl_kernels.trainers import siglip
from ssl_kernels.trainers.data import DataConfig, contents, files, load, splits
from ssl_kernels.trainers.data.faults import Faults
from ssl_kernels.trainers.data.fingerprint import names_within
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.pairs import Batches, ImageTextPairs
from ssl_kernels.trainers.data.tables import STRAY_MARK
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.text_towers import NGramTokenizer

TOKENIZE = NGramTokenizer(buckets=512)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pairs with spaces")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> Pairs:
    return write_images(folder)


def rows_of(read: ImageTextPairs) -> list[tuple[str, ...]]:
    assert isinstance(read.images, list)
    others = read.others or [()] * len(read)
    return [
        (f"base/{path.name}", caption, *more)
        for path, caption, more in zip(read.images, read.captions, others, strict=True)
    ]


# -- Reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOOD)
def test_a_table_is_read_by_what_it_holds(
    folder: Path, pairs: Pairs, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    content, expected = GOOD[name](pairs, folder)
    (folder / name).write_bytes(content)
    found = Found(name)
    read = files.read_table(folder / name, found=found)
    assert rows_of(read) == expected
    assert found.holds["pairs"] == found.holds["images"] == COUNT
    assert found.holds["captions"] == len({caption for _, *captions in expected for caption in captions})
    assert read.categories is None
    assert not found.oddities
    assert torch.equal(read.load([3], 16), files.read_table(folder / name).load([3], 16))


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_row_that_cannot_be_used_is_counted_and_named(folder: Path, pairs: Pairs, name: str) -> None:
    write, left_out, reason, where = LEFT_OUT[name]
    (folder / name).write_text(write(pairs))
    faults = Faults()
    read = files.read_table(folder / name, faults=faults)
    assert rows_of(read) == [pair for i, pair in enumerate(pairs) if i not in left_out]
    assert [fault.reason for fault in faults] == [reason] * len(left_out)
    assert all(where in fault.where for fault in faults)
    with pytest.raises(UserError, match=reason) as error:
        files.read_table(folder / name)  # --on-error stop
    assert where in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="--max-bad 0%"):
        files.read_table(folder / name, faults=Faults(max_bad=0.0))


@pytest.mark.parametrize("name", ODD)
def test_a_row_that_is_used_but_odd_is_named(folder: Path, pairs: Pairs, name: str) -> None:
    write, oddity, caption, where = ODD[name]
    (folder / name).write_text(write(pairs))
    found = Found(name)
    read = files.read_table(folder / name, found=found)
    assert len(read) == COUNT
    assert read.captions[5] == caption.format(pairs[5][1].removeprefix("a "))
    assert read.captions[6:30] == [caption for _, caption in pairs[6:30]]
    assert {what: tally.count for what, tally in found.oddities.items()} == {oddity: 1}
    assert found.oddities[oddity].places[0].endswith(where)


def test_lines_are_counted_on_after_an_unclosed_mark(folder: Path, pairs: Pairs) -> None:
    lines = [f'{a},"{b}' if i in (2, 4) else f"{a}," if i == 7 else f"{a},{b}" for i, (a, b) in enumerate(pairs)]
    (folder / "unclosed.csv").write_text("image,caption\n" + "\n".join(lines))
    found, faults = Found("x"), Faults()
    read = files.read_table(folder / "unclosed.csv", found=found, faults=faults)
    assert len(read) == COUNT - 1
    places = [f"{folder}/unclosed.csv:{line}" for line in (4, 6, 9)]
    assert found.oddities[STRAY_MARK].places == places[:2]
    assert [fault.where for fault in faults] == places[2:]


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_cannot_be_read_is_refused_in_one_line(folder: Path, pairs: Pairs, name: str) -> None:
    write, message = REFUSED[name]
    (folder / name).write_bytes(write(pairs))
    with pytest.raises(UserError) as error:
        files.read_table(folder / name, faults=Faults())
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert name in str(error.value)


def test_an_encoding_is_named_where_the_file_does_not(folder: Path, pairs: Pairs) -> None:
    path = folder / "cafe.csv"
    captions = [f"{caption} café" for _, caption in pairs]
    path.write_bytes(delimited([(image, c) for (image, _), c in zip(pairs, captions, strict=True)]).encode("latin-1"))
    assert files.read_table(path, encoding="latin-1").captions == captions
    path.write_text(delimited([(image, c) for (image, _), c in zip(pairs, captions, strict=True)]), "utf-16")
    assert files.read_table(path, encoding="latin-1").captions == captions  # its mark decides
    with pytest.raises(UserError, match="--encoding: expected an encoding that Python knows, such as latin-1, got 'x'"):
        DataConfig(encoding="x").check_data()


def test_columns_that_are_named_decide(folder: Path, pairs: Pairs) -> None:
    path = folder / "many columns.csv"
    lines = [(image, f"title {i}", caption, "kind") for i, (image, caption) in enumerate(pairs)]
    path.write_text(delimited(lines, ";", head=("image", "caption", "Long, Text", "Category")))
    assert files.read_table(path).captions[1] == "title 1"
    found = Found("x")
    read = files.read_table(path, caption_column="long, text", found=found)
    assert read.captions == [caption for _, caption in pairs]
    assert read.categories == ["kind"] * COUNT
    assert (
        "semicolons between cells in UTF-8; images from the column 'image', captions from 'Long, " in found.lines()[0]
    )
    with pytest.raises(UserError, match="has no column 'words'; it has 'image', 'caption', 'Long, Text', 'Category'"):
        files.read_table(path, caption_column="words")


def test_many_bad_rows_stop_the_run_with_their_reasons(folder: Path, pairs: Pairs) -> None:
    path = folder / "many bad.csv"
    path.write_text(
        delimited([(a if i % 3 else f"gone/{i}", b if i % 10 else "nan") for i, (a, b) in enumerate(pairs)])
    )
    with pytest.raises(
        UserError, match=r"--max-bad 1%: 16 of 40 .*12 with a missing file: .*:5 .* 4 without caption: .*:2"
    ) as error:
        files.read_table(path, faults=Faults())
    assert "\n" not in str(error.value)
    faults = Faults(max_bad=0.5)
    assert len(files.read_table(path, faults=faults)) == COUNT - 16
    assert faults.lost() == 16


def test_a_table_in_which_nothing_can_be_used_says_why(folder: Path) -> None:
    (folder / "few.csv").write_text("image,caption\nnope.png,a\nbase/000.png,\n")
    with pytest.raises(
        UserError, match=r"few.csv holds no pairs that can be used: 1 without caption: .*; 1 with a missing file"
    ):
        files.read_table(folder / "few.csv", faults=Faults())


def test_paths_relative_to_the_working_directory_are_told(
    folder: Path, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.csv").write_text(delimited(pairs))
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"expected paths relative to the table's folder, got 'base/000.png', which is"):
        files.read_table(tmp_path / "pairs.csv", faults=Faults())


# -- Folders with a table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("metadata.csv", lambda pairs: delimited(pairs, head=("file_name", "text"))),
        ("metadata.jsonl", lambda pairs: json_lines([{"file_name": a, "text": b, "width": 3} for a, b in pairs])),
    ],
)
def test_a_folder_of_hugging_face_datasets_is_read_by_its_metadata(
    folder: Path, pairs: Pairs, tmp_path: Path, name: str, write: object
) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    (tmp_path / name).write_text(write(pairs))  # type: ignore[operator]
    data = load(DataConfig(data=str(tmp_path), image_size=16), TOKENIZE, batch_size=8, seed=0, workers=0)
    assert data.train is not None
    assert data.held_out is not None
    assert sorted([*data.train.captions, *data.held_out.captions]) == sorted(caption for _, caption in pairs)
    (tmp_path / "metadata.parquet").write_text("[]")
    with pytest.raises(UserError, match=r"--data: expected one table in .*, got metadata.*; name one"):
        DataConfig(data=str(tmp_path)).find_data()


def test_a_folder_without_metadata_names_what_it_holds(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "metadata.csv").write_text("file_name,text\n")
    with pytest.raises(UserError, match=r"--data: .* has tables in test, train; name one, such as .*/train"):
        DataConfig(data=str(tmp_path)).find_data()
    shutil.rmtree(tmp_path / "test")
    shutil.rmtree(tmp_path / "train")
    (tmp_path / "pairs.tsv").write_text("image\tcaption\n")
    with pytest.raises(UserError, match=r"--data: .* is a folder without metadata.csv .*; it holds pairs.tsv"):
        DataConfig(data=str(tmp_path)).find_data()


# -- Several captions ------------------------------------------------------------------------------------------------


def test_each_epoch_draws_one_of_an_images_captions(folder: Path, pairs: Pairs) -> None:
    (folder / "several.jsonl").write_text(json_lines(objects([(a, [b, f"{b}, or so", "x"]) for a, b in pairs])))
    read = files.read_table(folder / "several.jsonl")
    assert isinstance(read.images, list)

    def drawn(epoch: int, start: int = 0, seed: int = 0) -> list[str]:
        words: list[str] = []

        def listen(captions: Sequence[str]) -> dict[str, torch.Tensor]:
            words.extend(captions)
            return {}

        list(Batches(read, listen, size=8, batch_size=10, seed=seed).batches(epoch, start))
        return words

    first = drawn(0)
    assert first == drawn(0)
    assert first[20:] == drawn(0, start=2)
    assert first != drawn(1)
    assert first != drawn(0, seed=1)
    every = [caption for epoch in range(8) for caption in drawn(epoch)]
    assert set(every) <= {caption for _, b in pairs for caption in (b, f"{b}, or so", "x")}
    for share in (every.count("x"), sum(caption.endswith(", or so") for caption in every)):
        assert 0.25 < share / len(every) < 0.42
    one = files.read_table(folder / "several.jsonl")
    one.others = None
    assert len({Batches(own, TOKENIZE, size=8, batch_size=10, seed=0).fingerprint for own in (read, one)}) == 2


def test_no_caption_of_a_held_out_image_is_trained_on(folder: Path, pairs: Pairs) -> None:
    several = [(a, [b, f"{b}, or so", f"like number {i + 1 - i % 2}"]) for i, (a, b) in enumerate(pairs)]
    (folder / "linked.jsonl").write_text(json_lines(objects(several)))
    read, found = files.read_table(folder / "linked.jsonl"), Found("x")
    train, held_out = splits.split(read, 0.2, 0, found)
    assert len(held_out) == 4  # of 20 groups of two images
    assert len(train) == COUNT - 8
    assert found.left_out[splits.LEAKING].count == 4

    def captions(part: ImageTextPairs) -> set[str]:
        return {*part.captions, *(caption for own in part.others or [] for caption in own)}

    assert not captions(train) & captions(held_out)
    left = splits.without(read, splits.fingerprints(held_out))
    assert left.captions == train.captions


# -- Splits ----------------------------------------------------------------------------------------------------------


def table_of(folder: Path, name: str, rows: list[tuple[str, str]]) -> str:
    (folder / name).write_text(delimited(rows))
    return str(folder / name)


def loaded(**options: object):  # type: ignore[no-untyped-def]
    return load(DataConfig(image_size=16, **options), TOKENIZE, batch_size=4, seed=0, workers=0)  # type: ignore[arg-type]


def test_copies_of_an_image_are_on_one_side(folder: Path, pairs: Pairs) -> None:
    (folder / "copies").mkdir(exist_ok=True)
    copies = []
    for image, caption in pairs:
        shutil.copy(folder / image, folder / "copies" / Path(image).name)
        copies.append((f"copies/{Path(image).name}", f"{caption}, once more"))
    data = loaded(data=table_of(folder, "copies.csv", [*pairs, *copies]), held_out=0.25)
    trained, held = ({path.read_bytes() for path in part.images} for part in (data.train, data.held_out))
    assert (len(data.train), len(data.held_out)) == (60, 10)
    assert len(held) == 10
    assert not trained & held
    assert data.found.holds == {"pairs": 80, "images": 40, "captions": 80}
    assert data.found.left_out[splits.LEAKING].count == 10


def test_captions_that_are_classes_lose_no_class(folder: Path, pairs: Pairs) -> None:
    classes = [(image, ("cat", "dog", "cow")[i % 3]) for i, (image, _) in enumerate(pairs)]
    data = loaded(data=table_of(folder, "classes.csv", classes), held_out=0.3)
    assert set(data.train.captions) == set(data.held_out.captions) == {"cat", "dog", "cow"}
    assert (len(data.train), len(data.held_out)) == (28, 12)
    assert not set(data.train.images) & set(data.held_out.images)
    assert data.held_out.categories == data.held_out.captions
    assert any("captions are names of classes" in remark for remark in data.found.remarks)
    held = table_of(folder, "held classes.csv", classes[:9])
    data = loaded(data=str(folder / "classes.csv"), held_out_data=held)
    assert data.held_out.captions == [caption for _, caption in classes[:9]]
    assert data.train.captions == [caption for _, caption in classes[9:]]
    assert data.held_out.categories == data.held_out.captions


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        (lambda i, own: "the same", r"all 40 images have the caption 'the same'"),
        (lambda i, own: "image" if i % 3 else own, r"26 of 40 images have the caption 'image'"),
    ],
)
def test_a_table_of_one_caption_stops_unless_it_is_allowed(
    folder: Path, pairs: Pairs, caption: object, message: str
) -> None:
    path = table_of(folder, "filler.csv", [(a, caption(i, b)) for i, (a, b) in enumerate(pairs)])  # type: ignore[operator]
    with pytest.raises(UserError, match=rf"--data .*filler.csv: {message} \(--allow-suspicious goes on\)"):
        loaded(data=path)
    data = loaded(data=path, allow_suspicious=True)
    for seed in range(12):  # the caption that all share is never held out
        assert len(loaded(data=path, allow_suspicious=True, split_seed=seed).train) >= 36
    assert any(line.startswith("suspicious: ") for line in data.found.lines())


def test_a_held_out_caption_that_would_take_much_of_the_training_stops(folder: Path, pairs: Pairs) -> None:
    (folder / "others").mkdir(exist_ok=True)
    for image, _ in pairs:  # other images, for the same would be dropped with good reason
        (folder / "others" / Path(image).name).write_bytes((folder / image).read_bytes() + b"\0")
    train = [(a, "image" if 4 <= i < 16 else b) for i, (a, b) in enumerate(pairs)] * 2
    path = table_of(folder, "filled.csv", [(a, f"{b} {i}" if b != "image" else b) for i, (a, b) in enumerate(train)])
    held = table_of(folder, "held image.csv", [("others/000.png", "image"), ("others/001.png", "another")])
    with pytest.raises(UserError, match="the held-out caption 'image' is that of 24 of 80 training pairs"):
        loaded(data=path, held_out_data=held, held_out=0.1)
    data = loaded(data=path, held_out_data=held, allow_suspicious=True)
    assert len(data.train) == 56
    assert data.found.left_out[splits.LEAKING].count == 24


def test_what_held_out_pairs_take_from_shards_is_told(tmp_path: Path) -> None:
    image = png(drawing("black", "frame", 200))
    write_shard(tmp_path / "0.tar", [(png(drawing("red", "dot", i)), "image" if i < 20 else f"{i}") for i in range(48)])
    write_shard(tmp_path / "held.tar", [(image, "image")])
    with pytest.raises(UserError, match="20 of 48 pairs share a caption or an image with one of 1 held-out pairs"):
        loaded(data=str(tmp_path / "0.tar"), held_out_data=str(tmp_path / "held.tar"))
    data = loaded(data=str(tmp_path / "0.tar"), held_out_data=str(tmp_path / "held.tar"), allow_suspicious=True)
    assert data.found.lines()[:3] == [
        f"found in {tmp_path}/0.tar: 1 shards, 28 pairs an epoch",
        f"found in {tmp_path}/held.tar: 1 pairs",
        f"left out: 20 {splits.LEAKING}",
    ]


# -- What is told ----------------------------------------------------------------------------------------------------


def test_what_was_found_is_told_in_lines_and_numbers(folder: Path, pairs: Pairs) -> None:
    rows = [(a if i != 4 else "gone.png", b if i != 6 else "") for i, (a, b) in enumerate(pairs)]
    data = loaded(data=table_of(folder, "told.csv", rows))
    name = f"{folder}/told.csv"
    assert data.found.lines(data.faults) == [
        f"found in {name}: 38 pairs, 38 images, 38 captions; commas between cells in UTF-8; images from the column"
        " 'image', captions from 'caption'",
        f"left out: 1 without caption: {name}:8; 1 with a missing file: {name}:6 ({folder}/gone.png)",
        "training pairs: 34, held out: 4",
    ]
    told = data.found.as_dict()
    assert told["holds"] == {"pairs": 38, "images": 38, "captions": 38}
    assert told["uses"] == {"training pairs": 34, "held out": 4}


def test_a_run_tells_what_it_found_before_it_trains(
    folder: Path, pairs: Pairs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classes = [(image, ("cat", "dog", "cow")[i % 3] if i != 5 else "") for i, (image, _) in enumerate(pairs)]
    path = table_of(folder, "run.csv", classes)
    arguments = ["--data", path, "--held-out", "0.3", "--batch-size", "8", "--epochs", "1", "--image-size", "8"]
    assert siglip.main([*arguments, "--dim", "8", "--accelerator", "cpu", "--output-dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"found in {path}: 39 pairs, 39 images, 3 captions; commas between cells in UTF-8; ")
    assert f"left out: 1 without caption: {path}:7" in out.splitlines()
    assert out.index("training pairs: 27, held out: 12") < out.index("step 3/3")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["data"]["holds"] == {"pairs": 39, "images": 39, "captions": 3}
    assert [figure["name"] for figure in summary["figures"]] == ["3 captions as classes, balanced"]
    assert "supervised" not in summary["figures"][0]["note"]  # by their own captions alone


def test_a_moved_copy_is_the_same_data(
    folder: Path, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table_of(folder, "moved.csv", pairs)
    shutil.copytree(folder / "base", tmp_path / "elsewhere" / "base")
    shutil.copy(folder / "moved.csv", tmp_path / "elsewhere")
    here = loaded(data=str(folder / "moved.csv"))
    monkeypatch.chdir(tmp_path)
    there = loaded(data="elsewhere/moved.csv")
    assert here.batches.fingerprint == there.batches.fingerprint
    assert here.train.captions == there.train.captions
    monkeypatch.chdir("/")
    assert there.train.load([0], 16).shape == (1, 3, 16, 16)  # wherever the process has gone since
    table_of(tmp_path / "elsewhere", "moved.csv", pairs[::-1])
    assert loaded(data=str(tmp_path / "elsewhere" / "moved.csv")).batches.fingerprint != here.batches.fingerprint


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/b/c.png", "/a/b/d.png"], ["c.png", "d.png"]),
        (["/a/b/c.png", "/a/bc/d.png", "/a/b/e/f.png"], ["b/c.png", "bc/d.png", "b/e/f.png"]),
        (["/x/y.png"], ["y.png"]),
        ([], []),
    ],
)
def test_names_do_not_tell_where_the_data_lie(paths: list[str], names: list[str]) -> None:
    assert names_within(paths) == names
    assert names_within([Path(path) for path in paths]) == names


def test_equal_files_have_one_number(tmp_path: Path) -> None:
    tail = b"t" * 5000
    files_of = {"a": b"x" + tail, "b": b"y" + tail, "c": b"x" + tail, "d": b"", "e": b"", "f": b"short", "g": b"trohs"}
    for name, content in files_of.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "link").symlink_to("b")
    paths = [tmp_path / name for name in [*files_of, "link", "gone"]]
    assert contents.same(paths) == [0, 1, 0, 3, 4, 5, 6, 1, 8]
