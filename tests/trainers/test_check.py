"""`ssl-kernels check` reads everything once and tells what is bad and what is odd."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import drawing, png, rows, write_shard
from PIL import Image

from ssl_kernels import cli
from ssl_kernels.trainers import check
from ssl_kernels.trainers.data import inspection


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Good drawings, bad files, and one odd image of each kind."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, pair in enumerate(rows(6)):
        drawing(*pair).save(folder / f"{i}.png")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    (folder / "cut.jpg").write_bytes(encoded(noise, "JPEG")[:700])
    (folder / "text.jpg").write_text("hello")
    (folder / "named.jpg").write_bytes(encoded(noise.transpose(Image.Transpose.ROTATE_90), "PNG"))
    noise.resize((8, 40)).save(folder / "small.png")
    noise.resize((300, 20)).save(folder / "strip.png")
    upright = Image.Exif()
    upright[0x0112] = 1
    noise.convert("CMYK").save(folder / "cmyk.jpg", exif=upright)
    noise.convert("LA").save(folder / "grey.png")
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)).save(folder / "deep.png")
    Image.new("RGB", (32, 32), "red").save(folder / "red.bmp")
    noise.save(folder / "moving.webp", save_all=True, append_images=[noise.rotate(90)], lossless=True)
    exif = Image.Exif()
    exif[0x0112] = 3
    noise.save(folder / "turned.jpg", exif=exif)
    (folder / "z.png").write_bytes((folder / "3.png").read_bytes())
    return folder


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


ODD = {
    "named.jpg": "PNG inside, named .jpg",
    "small.png": "less than 16 pixels high or wide",
    "strip.png": "more than 8 times as long as wide: only the middle is evaluated",
    "cmyk.jpg": "CMYK: converted to RGB",
    "grey.png": "transparent: laid over --background",
    "deep.png": "of more than 8 bits: scaled",
    "red.bmp": "of one colour",
    "moving.webp": "of several frames: the first is taken",
    "turned.jpg": "lying on its side or mirrored: turned as EXIF says",
}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_folder(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str) -> None:
    arguments = ["check", str(photos), "--workers", workers, "--out", str(tmp_path / "found.jsonl")]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"found in {photos}: 18 images; without labels, for its folders make no classes"
    assert out[1:3] == ["16 images can be read", "bad, left out of training:"]
    assert f"  1 cut short: {photos}/cut.jpg" in out
    assert f"  1 not an image: {photos}/text.jpg" in out
    assert f"  1 copies of another image: {photos}/z.png = {photos}/3.png" in out
    for name, reason in ODD.items():
        assert f"  1 {reason}: {photos}/{name}" in out
    assert len(out) == 4 + 2 + 1 + len(ODD)
    found = [json.loads(line) for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    assert {"where": f"{photos}/cut.jpg", "bad": "cut short"} in found
    assert {"where": f"{photos}/red.bmp", "odd": "of one colour"} in found
    assert len(found) == 2 + 1 + len(ODD)


def test_a_large_image_is_odd(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "LARGE", 1000)
    part = inspection.Inspection([photos / "cmyk.jpg", photos / "gone.jpg"])
    assert [fault.reason for fault in part[0].odd] == ["more than 1,000 pixels: slow to read", ODD["cmyk.jpg"]]
    assert [fault.reason for fault in part[1].bad] == ["no such file"]


def test_good_data_are_called_so(table: Path, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    for data, images in ((str(table), 96), (shards, 48)):
        assert cli.main(["check", data, "--workers", "0"]) == 0
        found, *others = capsys.readouterr().out.splitlines()
        assert found.startswith(f"found in {data}: ")
        assert others == [f"{images} images can be read", "nothing is bad or odd"]


def test_a_table_is_read_with_its_columns(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.png").write_bytes(b"")
    lines = [f"{table.parent}/1.png,one", f"{table.parent}/1.png,one again", "0.png,none"]
    (tmp_path / "pairs.csv").write_text("\n".join(["file,words", *lines]) + "\n")
    columns = ["--image-column", "file", "--caption-column", "words"]
    assert cli.main(["check", str(tmp_path / "pairs.csv"), "--workers", "0", *columns]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1:] == ["1 images can be read", "bad, left out of training:", f"  1 empty file: {tmp_path}/0.png"]


def test_what_a_table_and_a_folder_lack_is_told(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["filepath;title", f"{table.parent}/1.png;one", f"{table.parent}/2.png;", "gone.png;caf\xe9"]
    (tmp_path / "pairs.csv").write_text("\n".join(lines), "latin-1")
    assert cli.main(["check", str(tmp_path / "pairs.csv"), "--workers", "0", "--encoding", "latin-1"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert f"  1 without caption: {tmp_path}/pairs.csv:3" in out
    assert f"  1 with a missing file: {tmp_path}/pairs.csv:4 ({tmp_path}/gone.png)" in out
    for split in ("train", "val"):
        (tmp_path / f"photos/{split}/red").mkdir(parents=True)
        drawing("red", "dot", 0).save(tmp_path / f"photos/{split}/red/1.png")
    (tmp_path / "photos/link.png").symlink_to("nothing")
    assert cli.main(["check", str(tmp_path / "photos"), "--workers", "0"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[1] == "2 images can be read"
    assert f"  1 link to nothing: {tmp_path}/photos/link.png" in out


def test_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shard in range(3):
        pairs = [(png(drawing(*pair)), f"{shard} {pair}") for pair in rows(18)[shard * 6 :][:6]]
        write_shard(
            tmp_path / f"{shard}.tar", [*pairs, (b"<html>", "broken"), (pairs[0][0], " ")][: 8 if shard == 1 else 6]
        )
    with tarfile.open(tmp_path / "2.tar") as tar:
        cut = tar.getmembers()[8].offset
    (tmp_path / "2.tar").write_bytes((tmp_path / "2.tar").read_bytes()[:cut])
    assert cli.main(["check", str(tmp_path), "--workers", "0"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"found in {tmp_path}: 3 shards", "16 images can be read", "bad, left out of training:",
        f"  2 lost from a shard that is cut short: {tmp_path}/2.tar after 4 samples",
        f"  1 not an image: {tmp_path}/1.tar:1-6", f"  1 without caption: {tmp_path}/1.tar:1-7",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "DATA: expected a table, a folder of images or shards, got /nowhere"),
        (["{folder}"], "DATA: no images in {folder}"),
        (["{folder}/*.tar"], "DATA: no shard is named like {folder}/*.tar"),
        (["{table}", "--workers", "-1"], "--workers: expected at least 0, got -1"),
        (["{table}", "--image-column", "photo"], "has no column 'photo'"),
        (
            ["{table}", "--workers", "0", "--out", "/nowhere/a"],
            "--out: cannot write /nowhere/a: No such file or directory",
        ),
    ],
)
def test_mistakes_are_one_line(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    names = {"folder": str(tmp_path), "table": str(table)}
    assert cli.main(["check", *(argument.format(**names) for argument in arguments)]) == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("ssl-kernels check: error: ")
    assert message.format(**names) in err
    assert len(err.splitlines()) == 1


def test_an_interrupt_ends_it(table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "check", interrupt)
    assert cli.main(["check", str(table)]) == 130
    assert capsys.readouterr().err == "ssl-kernels check: interrupted\n"
