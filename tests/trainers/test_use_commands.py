"""The commands that use a run: what they write, that they go on after a kill, and one clear line for a mistake."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TrainedRun, drawing, png, write_shard
from PIL import Image
from rich.console import Console

import ssl_kernels
from ssl_kernels import cli
from ssl_kernels.trainers.data.pixels import Colour
from ssl_kernels.trainers.use import embedding, labelled, rows, search, sheet
from ssl_kernels.trainers.use.command import UseConfig
from ssl_kernels.trainers.use.trained import Trained


@pytest.fixture(scope="module")
def model(trained: TrainedRun) -> Trained:
    return ssl_kernels.trainers.load(trained.folder)


@pytest.fixture
def photos(trained: TrainedRun, tmp_path: Path) -> Path:
    """Twenty of the drawings, one of them cut short."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(trained.drawings.glob("*.png"))[:20]:
        shutil.copy(path, folder)
    broken = sorted(folder.iterdir())[5]
    broken.write_bytes(broken.read_bytes()[:60])
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the images that are read."""
    names: list[str] = []
    to_pixels = embedding.to_pixels

    def count(source: Any, size: int, background: Colour, name: str) -> torch.Tensor:
        names.append(name)
        return to_pixels(source, size, background, name)

    monkeypatch.setattr(embedding, "to_pixels", count)
    return names


def run(*arguments: object) -> int:
    return cli.main([*map(str, arguments)])


def test_embed_writes_the_embeddings_and_their_names(
    trained: TrainedRun, model: Trained, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "vectors.npy"
    assert run("embed", trained.folder, photos, "--out", out, "--batch-size", 8) == 0
    told = capsys.readouterr().out
    good = [path for i, path in enumerate(sorted(photos.iterdir())) if i != 5]
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["paths"] == [str(path) for path in good]
    assert about["shape"] == [19, 16]
    vectors = np.load(out)
    assert vectors.dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(vectors), model.encode_image(good), rtol=0, atol=1e-6)
    assert "left out 1 of 20, which cannot be read:" in told
    assert str(sorted(photos.iterdir())[5]) in told
    assert "19 images" in told
    assert sorted(path.name for path in out.parent.iterdir()) == ["vectors.json", "vectors.npy"]


def test_embed_writes_parquet_and_features(trained: TrainedRun, model: Trained, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{path}\n" for path in trained.images[:3]))
    assert run("embed", trained.folder, listed, "--out", tmp_path / "v.parquet", "--features") == 0
    table = parquet.read_table(tmp_path / "v.parquet").to_pydict()
    assert table["path"] == [str(path) for path in trained.images[:3]]
    expected = model.features(trained.images[:3])
    torch.testing.assert_close(torch.tensor(table["embedding"]), expected, rtol=0, atol=1e-6)


def test_embed_takes_captions_tables_and_shards(
    trained: TrainedRun, model: Trained, table: Path, tmp_path: Path
) -> None:
    (tmp_path / "captions.txt").write_text("red square\n\nblue bar\n")
    write_shard(tmp_path / "s.tar", [(png(drawing("red", "dot", 0)), "red dot"), (b"no image", "blue dot")])
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "latin1.csv").write_bytes(f"where,words\n{trained.images[0]},caf".encode() + b"\xe9\n")
    named = ["--image-column", "where", "--caption-column", "words"]
    cases: list[tuple[list[object], list[str], torch.Tensor]] = [
        (
            [tmp_path / "captions.txt", "--text"],
            ["red square", "blue bar"],
            model.encode_text(["red square", "blue bar"]),
        ),
        ([tmp_path / "s.tar", "--text"], ["red dot", "blue dot"], model.encode_text(["red dot", "blue dot"])),
        ([tmp_path / "s.tar"], [], model.encode_image(drawing("red", "dot", 0))),
        ([table], [str(table.parent / f"{i}.png") for i in range(96)], torch.empty(0)),
        ([tmp_path / "latin1.txt", "--text", "--encoding", "latin-1"], ["caf\xe9"], torch.empty(0)),
        ([tmp_path / "latin1.csv", "--text", *named, "--encoding", "latin-1"], ["caf\xe9"], torch.empty(0)),
        ([table, "--text"], [], torch.empty(0)),
    ]
    for i, (arguments, names, expected) in enumerate(cases):
        out = tmp_path / f"{i}.npy"
        assert run("embed", trained.folder, *arguments, "--out", out) == 0
        about = json.loads(out.with_suffix(".json").read_text())
        found = about["captions" if "--text" in arguments else "paths"]
        assert found == names or not names
        if len(expected):
            torch.testing.assert_close(torch.from_numpy(np.load(out)), expected, rtol=0, atol=1e-6)
    assert found[:2] == ["red square number 0", "red bar number 0"]


def test_what_is_missing_in_a_shard_is_named(
    trained: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dots = [(png(drawing("red", "dot", shade)), f"dot {shade}" if shade != 1 else "") for shade in range(6)]
    write_shard(tmp_path / "s.tar", dots)
    content = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(content[: content.index(dots[4][0])])
    arguments = ("embed", trained.folder, tmp_path / "s.tar", "--out", tmp_path / "v.npy")
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    assert np.load(tmp_path / "v.npy").shape == (3, 16)
    assert "s.tar:s-1: without caption" in out
    assert "s.tar after 3 samples: lost from a shard" in out
    assert run(*arguments, "--overwrite", "--on-error", "stop") == 2
    assert "DATA: cannot read" in capsys.readouterr().err


def test_embed_goes_on_where_a_kill_stopped_it(
    trained: TrainedRun, photos: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    arguments = ("embed", trained.folder, photos, "--batch-size", 4, "--workers", 2)
    assert run(*arguments, "--out", tmp_path / "whole.npy") == 0
    assert len(read) == 20
    append = rows.Rows.append

    def killed(self: rows.Rows, part: embedding.Part) -> None:
        if self.read == 8:  # in the middle of the third batch: its rows are there in part, its line is not
            assert self._files is not None
            self._files[0].write(b"\1" * 100)
            self._files[1].write('{"names": ["')
            raise KeyboardInterrupt
        append(self, part)

    out = tmp_path / "resumed.npy"
    monkeypatch.setattr(rows.Rows, "append", killed)
    assert run(*arguments, "--out", out) == 130
    assert not out.exists()
    monkeypatch.setattr(rows.Rows, "append", append)
    read.clear()
    capsys.readouterr()
    assert run(*arguments, "--out", out) == 0
    told = capsys.readouterr().out
    assert "going on after 8 of an interrupted run" in told
    assert "left out 1 of 20" in told  # which the first of them has met
    assert len(read) == 12
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()
    paths = [json.loads(path.read_text())["paths"] for path in tmp_path.glob("*.json")]
    assert paths[0] == paths[1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_embed_begins_anew_where_the_data_or_the_batches_are_others(
    trained: TrainedRun, photos: Path, tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    append = rows.Rows.append

    def stop(self: rows.Rows, part: embedding.Part) -> None:
        append(self, part)
        raise KeyboardInterrupt

    arguments = ("embed", trained.folder, photos, "--out", tmp_path / "v.npy", "--overwrite", "--batch-size")
    for change in (lambda: 10, lambda: os.remove(sorted(photos.iterdir())[19]) or 4):
        monkeypatch.setattr(rows.Rows, "append", stop)
        assert run(*arguments, 4) == 130
        monkeypatch.setattr(rows.Rows, "append", append)
        size = change()
        read.clear()
        assert run(*arguments, size) == 0
        assert len(read) == len([*photos.iterdir()])


def test_search_finds_the_image(
    trained: TrainedRun, tmp_path: Path, read: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.drawings, tmp_path / "photos")
    arguments = ("search", trained.folder, tmp_path / "photos", "--top", 4)
    assert run(*arguments, "--query", "blue cross number 1", "--out", tmp_path / "sheet.png") == 0
    lines = capsys.readouterr().out.splitlines()
    blue_crosses = {str(tmp_path / "photos" / f"{14 + 24 * shade}.png") for shade in range(4)}
    assert {line.split()[2] for line in lines[:4]} == blue_crosses
    assert [line.split()[0] for line in lines[:4]] == ["1", "2", "3", "4"]
    similarities = [float(line.split()[1]) for line in lines[:4]]
    assert similarities == sorted(similarities, reverse=True)
    assert Image.open(tmp_path / "sheet.png").size[0] > 4 * 150
    read.clear()
    # Again, when one file is another one, and one is gone: only the new one is read.
    drawing("red", "frame", 120).save(tmp_path / "photos" / "14.png")
    (tmp_path / "photos" / "38.png").unlink()
    assert run(*arguments, "--image", tmp_path / "photos" / "14.png") == 0
    lines = capsys.readouterr().out.splitlines()
    assert read == [str(tmp_path / "photos" / "14.png")]
    assert lines[0].split()[1:] == ["1.000", str(tmp_path / "photos" / "14.png")]
    assert not any("38.png" in line for line in lines)


def test_searching_by_an_image_in_a_read_only_run(
    trained: TrainedRun, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained.folder, tmp_path / "run", ignore=shutil.ignore_patterns("embeddings"))
    (tmp_path / "run" / "embeddings").write_text("in the way")
    assert run("search", tmp_path / "run", photos, "--image", sorted(photos.iterdir())[2], "--top", 1) == 0
    out = capsys.readouterr().out
    assert "note: embeddings are not kept" in out
    assert f"1  1.000  {sorted(photos.iterdir())[2]}" in out


def test_a_bad_image_shifts_nothing(
    trained: TrainedRun, model: Trained, shapes: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither what is drawn nor labels, in batches after the one that it was in."""
    drawn: list[sheet.Cell] = []
    monkeypatch.setattr(search, "draw_sheet", lambda path, title, cells, credit: drawn.extend(cells) or "")
    query = sorted(photos.iterdir())[17]
    arguments = ("search", trained.folder, photos, "--image", query, "--top", 1, "--batch-size", 4)
    assert run(*arguments, "--out", tmp_path / "s.png") == 0
    assert [cell.item.name for cell in drawn] == [str(query)] * 2  # the query, and what is nearest to it

    shutil.copytree(shapes, tmp_path / "shapes")
    next((tmp_path / "shapes" / "bar").iterdir()).write_bytes(b"")
    options = UseConfig(run=trained.folder, batch_size=10)
    classes, *parts = labelled.read_parts(
        model, str(tmp_path / "shapes"), "", 0.3, 0, model.features, options, Console(quiet=True)
    )
    assert sum(len(part.items) for part in parts) == 95
    for part in parts:
        assert [Path(item.name).parent.name for item in part.items] == [classes[i] for i in part.labels.tolist()]
        features = model.features(item.source for item in part.items)  # type: ignore[misc]
        torch.testing.assert_close(part.vectors, features, rtol=0, atol=1e-5)
    assert not {item.name for item in parts[0].items} & {item.name for item in parts[1].items}


def test_folders_may_be_split_and_hold_strays(
    trained: TrainedRun, model: Trained, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A split of the folder's own is kept, copies are on one side, and an image beside the classes has no label."""
    for shape in ("bar", "dot"):
        files = sorted((shapes / shape).iterdir())
        for part, own in (("train", files[:10]), ("val", [*files[10:], files[0]])):
            (tmp_path / "data" / part / shape).mkdir(parents=True)
            for path in own:
                shutil.copy(path, tmp_path / "data" / part / shape)
    shutil.copy(files[1], tmp_path / "data" / "train" / "stray.png")
    options, console = UseConfig(run=trained.folder), Console()
    arguments = (model, str(tmp_path / "data"), "", 0.5, 0, model.features, options, console)
    classes, train, test = labelled.read_parts(*arguments)
    out = capsys.readouterr().out
    assert classes == ["bar", "dot"]
    assert (len(train.items), len(test.items)) == (18, 14)
    assert all("val" in item.name for item in test.items)
    assert not any("stray" in item.name for item in train.items)
    assert "copies of held-out images" in out
    assert train.labels.tolist() == [0] * 9 + [1] * 9


def test_classify_by_labels(
    trained: TrainedRun, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "labels.txt").write_text("square\nbar\ncross\ndot\ncorner\nframe\n")
    arguments = ("classify", trained.folder, shapes, "--labels", tmp_path / "labels.txt", "--out", tmp_path / "t.csv")
    assert run(*arguments, "--templates", *(f"{colour} {{}} number 1" for colour in ("red", "green", "blue"))) == 0
    out = capsys.readouterr().out
    with open(tmp_path / "t.csv", newline="") as file:
        found = list(csv.DictReader(file))
    assert [*found[0]] == ["path", "label", "square", "bar", "cross", "dot", "corner", "frame"]
    right = np.mean([Path(row["path"]).parent.name == row["label"] for row in found])
    assert right > 0.8
    assert f"accuracy {right:.3f} of 96 images in labelled folders; always the largest class 0.167" in out
    for row in found:
        assert row["label"] == max([*row][2:], key=lambda name: float(row[name]))
    assert "and 76 more; --out writes all of them" in out


def test_probe_sets_the_features_beside_the_untrained_net_and_pixels(
    trained: TrainedRun, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("probe", trained.folder, shapes, "--out", tmp_path / "probe.json") == 0
    figures = {figure["name"]: figure for figure in json.loads((tmp_path / "probe.json").read_text())["figures"]}
    assert [*figures] == [
        "10 labels a class, 1-NN", "clean query, 5-NN", "clean query, weighted 20-NN", "clean query, linear probe",
    ]  # fmt: skip
    for figure in figures.values():
        assert figure["chance"] == pytest.approx(1 / 6)
        assert figure["raw_augmented"] is None
    assert figures["clean query, linear probe"]["model"] > 0.9
    assert "78 labelled, 18 held out" in capsys.readouterr().out


def test_probe_of_pixels_is_that_of_pixels(trained: TrainedRun, model: Trained, tmp_path: Path) -> None:
    """Classes that are a shade of grey: pixels tell them apart, and a net that is given noise does not."""
    rng = np.random.default_rng(0)
    for name, grey in (("dark", 60), ("light", 190)):
        for part in ("data", "test"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(12):
                noise = rng.integers(0, 50, (16, 16, 3)) + grey
                Image.fromarray(noise.astype(np.uint8)).save(tmp_path / part / name / f"{i}.png")
    arguments = ("probe", trained.folder, tmp_path / "data", "--held-out-data", tmp_path / "test", "--embedding")
    assert run(*arguments, "--out", tmp_path / "probe.json") == 0
    for figure in json.loads((tmp_path / "probe.json").read_text())["figures"]:
        assert figure["raw"] == 1.0
        assert figure["chance"] == 0.5
    (tmp_path / "test" / "light").rename(tmp_path / "test" / "bright")
    assert run(*arguments) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "nowhere", "x", "--out", "v.npy"], "RUN: no checkpoint at nowhere; expected a run's folder"),
        (["embed", "RUN", "PHOTOS", "--out", "v.csv"], "--out: expected a file that ends in .npy or .parquet"),
        (["embed", "RUN", "nowhere", "--out", "v.npy"], "DATA: expected a folder of images, a list, a table"),
        (["embed", "RUN", "EMPTY", "--out", "v.npy"], "DATA: no images in "),
        (["embed", "RUN", "SPLIT", "--out", "v.npy"], "DATA: the folders of "),
        (["probe", "RUN", "SPLIT", "--held-out-data", "EMPTY"], "DATA: the folders of "),
        (["probe", "RUN", "PHOTOS", "--held-out-data", "EMPTY"], "--held-out-data: no images in "),
        (["embed", "RUN", "PHOTOS", "--out", "v.npy", "--on-error", "stop"], "(--on-error skip leaves it out)"),
        (["embed", "RUN", "PHOTOS", "--out", "v.npy", "--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["embed", "RUN", "PHOTOS", "--out", "v.npy", "--device", "abacus"], "--device: cannot use 'abacus'"),
        (["embed", "RUN", "PHOTOS", "--text", "--out", "v.npy"], "photos is a folder without metadata.csv"),
        (["embed", "RUN", "nowhere", "--text", "--out", "v.npy"], "DATA: expected with --text a .txt file of captions"),
        (["embed", "RUN", "PHOTOS", "--text", "--features", "--out", "v.npy"], "--features: expected images"),
        (["search", "RUN", "PHOTOS"], "--query: expected either a text to search for, or an image in --image"),
        (["search", "RUN", "PHOTOS", "--query", "x", "--image", "x.png"], "--query: expected either a text"),
        (["search", "RUN", "PHOTOS", "--image", "x.png"], "--image: no such file: x.png"),
        (["search", "RUN", "PHOTOS", "--query", "x", "--out", "x.doc"], "--out: expected a picture (.png"),
        (["classify", "RUN", "PHOTOS"], "--labels: expected a text file of labels, for"),
        (["classify", "RUN", "PHOTOS", "--labels", "absent.txt"], "--labels: cannot read absent.txt"),
        (["classify", "RUN", "PHOTOS", "--labels", "TWICE"], "--labels: expected two labels or more, each once, got a"),
        (["classify", "RUN", "PHOTOS", "--templates", "no place"], "--templates: expected texts with one {} for the"),
        (["classify", "RUN", "PHOTOS", "--templates", "{} {0}"], "--templates: expected texts with one {} for the"),
        (["probe", "RUN", "PHOTOS"], "has no labels; expected a folder with a subfolder to each class, or mnist"),
        (["probe", "RUN", "PHOTOS", "--held-out", "1"], "--held-out: expected a number in [0, 1), got 1"),
        (["export", "RUN", "PHOTOS"], "is not empty; --overwrite writes into it"),
        (["export", "RUN", "new", "--format", "open_clip"], "--format open_clip: open_clip builds timm's image towers"),
        (["export", "RUN", "new", "--format", "transformers"], "--format transformers: transformers wraps timm's net"),
        (["finetune", "RUN", "PHOTOS"], "has no labels; expected a folder with a subfolder to each class, or mnist"),
        (["finetune", "RUN", "PHOTOS", "--layer-decay", "0"], "--layer-decay: expected a number in (0, 1], got 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_argument(
    trained: TrainedRun, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "twice.txt").write_text("a\na\n")
    for folder in ("empty", "split/train", "split/test"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("train", "test"):
        shutil.copy(photos / "0.png", tmp_path / "split" / folder)
    places = {
        "RUN": str(trained.folder),
        "PHOTOS": str(photos),
        "TWICE": "twice.txt",
        "EMPTY": "empty",
        "SPLIT": "split",
    }
    assert run(*(places.get(word, word) for word in arguments)) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"ssl-kernels {arguments[0]}: error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "v.npy").exists()
    assert not (tmp_path / "new").exists()


def test_a_result_is_not_written_over(trained: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "v.npy").write_text("dear")
    arguments = ("embed", trained.folder, trained.images[0], "--out", tmp_path / "v.npy")
    assert run(*arguments) == 2
    assert "--out: " in capsys.readouterr().err
    assert (tmp_path / "v.npy").read_text() == "dear"
    assert run(*arguments, "--overwrite") == 0
    assert np.load(tmp_path / "v.npy").shape == (1, 16)


def test_a_folder_that_cannot_be_written_to_is_one_line(
    trained: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert run("embed", trained.folder, trained.images[0], "--out", tmp_path / "file" / "v.npy") == 2
    err = capsys.readouterr().err.strip()
    assert "file" in err
    assert len(err.splitlines()) == 1
