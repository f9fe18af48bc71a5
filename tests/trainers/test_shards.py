"""Shards as people have them: named and packed in many ways, with samples missing, broken, or cut off."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import drawing, png, rows
from PIL import Image

from ssl_kernels.trainers.data import DataConfig, load, shard_names, tars
from ssl_kernels.trainers.data.batches import Batch
from ssl_kernels.trainers.data.faults import EVALUATION, Fault, Faults
from ssl_kernels.trainers.data.identity import Fingerprints
from ssl_kernels.trainers.data.images import centre_crop
from ssl_kernels.trainers.data.shard_pairs import read_all
from ssl_kernels.trainers.data.shards import ShardBatches
from ssl_kernels.trainers.errors import UserError

PICTURES = [png(drawing(*pair)) for pair in rows(12)]
CAPTIONS = [f"{colour} {shape}" for colour, shape, _ in rows(12)]
Members = list[tuple[str, bytes]]


def members(count: int = 6, image: str = "png", caption: str = "txt", prefix: str = "") -> Members:
    """An image and a caption of each of some samples."""
    found: Members = []
    for i in range(count):
        found += [(f"{prefix}{i:03}.{image}", PICTURES[i]), (f"{prefix}{i:03}.{caption}", CAPTIONS[i].encode())]
    return found


def write(path: Path, content: Members) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in content:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(path: Path | str, **options: Any) -> tuple[list[tuple[bytes, str]], list[Fault]]:
    """Images and captions of a shard, and what is left out of it."""
    found: list[Fault] = []
    return [(sample.image, sample.captions[0]) for sample in tars.samples(str(path), found, **options)], found


EXPECTED = list(zip(PICTURES[:6], CAPTIONS[:6], strict=True))


def dumps(value: object) -> bytes:
    return json.dumps(value).encode()


def as_json(record: Callable[[str], object]) -> Members:
    """Samples whose captions are in JSON."""
    return [
        (name.replace(".txt", ".json"), dumps(record(data.decode())) if name.endswith("txt") else data)
        for name, data in members()
    ]


@pytest.mark.parametrize(
    "content",
    [
        members(image="jpg"), members(image="JPEG"), members(image="gif"), members(image="avif"), members(image="TIF"),
        members(caption="text"), members(caption="cls"), members(caption="TXT"), members(caption="caption"),
        members(prefix="sub/dir.with.dots/"), members(prefix="./"),
        [("__index__.json", b"{}"), ("._000.png", b"x"), ("README.md", b"x"), *members()],
        sorted(members(), key=lambda member: member[0].split(".")[1]),  # all images, then all captions
        sorted(members(), key=lambda member: member[0].split(".")[1], reverse=True),
        as_json(lambda caption: {"caption": caption}), as_json(lambda caption: {"caption": [caption, "b"], "url": "x"}),
        [*members(), *((f"{i:03}.json", dumps({"caption": "of another kind"})) for i in range(6))],
        [(name, b"\xef\xbb\xbf " + content if "txt" in name else content) for name, content in members()],
    ],
)  # fmt: skip
def test_shards_of_many_kinds_hold_the_same_samples(tmp_path: Path, content: Members) -> None:
    assert read(write(tmp_path / "0.tar", content)) == (EXPECTED, [])


def test_a_caption_is_the_first_that_is_not_empty(tmp_path: Path) -> None:
    others = [("0.json", dumps({"caption": "from json"})), ("0.cls", b"7")]
    for texts, caption in (
        ([("0.txt", b"own"), *others], "own"),
        ([*others, ("0.txt", b"own")], "own"),
        ([("0.txt", b" \n"), *others], "from json"),
        ([("0.json", dumps({"caption": None})), others[1]], "7"),
        ([("0.json", b"[1]"), others[1]], "7"),
    ):
        assert read(write(tmp_path / "0.tar", [("0.png", PICTURES[0]), *texts])) == ([(PICTURES[0], caption)], [])


def change(key: str, ending: str, content: bytes | None) -> Callable[[], Members]:
    """Samples of which one has another member, or none."""
    name = f"{key}.{ending}"
    return lambda: [(n, c if n != name else content) for n, c in members() if n != name or content is not None]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (change("003", "txt", None), "without caption"),
        (change("003", "txt", b"\n "), "without caption"),
        (change("003", "png", None), "without image"),
        (change("005", "txt", None), "without caption"),
        (change("003", "png", b""), "with an empty image"),
        (change("003", "txt", "caf\xe9".encode("latin-1")), "with a caption that is not UTF-8"),
        (lambda: [*members(3), ("003.png", PICTURES[3]), ("003.json", b"{")], "with a .json that is none"),
        (lambda: [*members(), ("003.v2.png", PICTURES[3]), ("100.v2.png", PICTURES[3])], "without image"),
    ],
)  # fmt: skip
def test_an_incomplete_sample_is_left_out_and_named(tmp_path: Path, make: Callable[[], Members], reason: str) -> None:
    shard = write(tmp_path / "0.tar", make())
    found, faults = read(shard)
    ((where, why, lost, *_),) = faults
    assert (why, lost) == (reason, 1)
    key = where.removeprefix(f"{shard}:")
    assert found == [EXPECTED[i] for i in range(3 if "json" in reason else 6) if f"{i:03}" != key]


def test_captions_may_have_another_encoding(tmp_path: Path) -> None:
    content = [(name, b"caf\xe9" if name == "002.txt" else data) for name, data in members()]
    content.append(("100.png", PICTURES[9]))
    content.append(("100.json", '{"caption": "caf\u00e9"}'.encode()))  # JSON is UTF-8
    found, faults = read(write(tmp_path / "0.tar", content), encoding="latin-1")
    assert ([found[2][1], found[6][1]], faults) == (["caf\xe9"] * 2, [])
    data = stream(tmp_path, encoding="latin-1")
    assert data.epoch_pairs == 7
    pairs, _ = read_all(str(tmp_path), 16, encoding="latin-1")
    assert "caf\xe9" in pairs.captions
    assert len(list(data.batches(0))) == 1
    assert not data.faults


def test_the_option_encoding_reaches_the_captions_of_shards(tmp_path: Path) -> None:
    """In those to train on as in those held out."""
    for folder, caption in (("train", b"caf\xe9 %d"), ("held_out", b"th\xe9 %d")):
        (tmp_path / folder).mkdir()
        first = 8 * (folder == "held_out")
        content = [(name, caption % int(name[:3]) if "txt" in name else data) for name, data in members(12)]
        write(tmp_path / folder / "0.tar", content[2 * first : 24 if first else 16])
    data, held_out = (str(tmp_path / folder) for folder in ("train", "held_out"))
    config = DataConfig(data=data, held_out_data=held_out, encoding="latin-1", image_size=16)
    loaded = load(config, lambda c: {"captions": list(c)}, batch_size=8, seed=0, workers=0)  # type: ignore[arg-type, dict-item]
    (batch,) = loaded.batches.batches(0)
    assert sorted(batch["text"]["captions"]) == [f"caf\xe9 {i}" for i in range(8)]
    assert loaded.held_out is not None
    assert loaded.held_out.captions == [f"th\xe9 {i}" for i in range(8, 12)]
    assert not loaded.faults
    with pytest.raises(UserError, match=r"--held-out-data: .*: 4 with a caption that is not UTF-8"):
        load(replace(config, encoding="utf-8"), lambda c: {}, batch_size=8, seed=0, workers=0)


def test_a_name_that_returns_is_left_out_and_named(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", [*members(), ("002.png", PICTURES[9]), ("002.txt", b"other")])
    assert read(shard) == (EXPECTED, [Fault(f"{shard}:002 again", "with the name of another")])


def ends(content: Members) -> list[int]:
    """Where the members of a shard begin, and the last ends."""
    found = [0]
    for _, data in content:
        found.append(found[-1] + 512 + -(-len(data) // 512) * 512)
    return found


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(
    ("member", "further", "left"),
    [(7, 515, 3), (7, 100, 3), (7, 600, 4), (6, 600, 3), (6, 0, 3), (7, 0, 3), (1, 0, 0), (0, 700, 0), (12, 0, 6)],
)
def test_a_shard_that_is_cut_short_loses_the_rest_and_says_so(
    tmp_path: Path, pack: Callable[[bytes], bytes], member: int, further: int, left: int
) -> None:
    """Also where it is cut between two members, which tarfile takes for its end, or before the zeros at its end."""
    whole = write(tmp_path / "whole.tar", members()).read_bytes()
    path = tmp_path / "0.tar"
    path.write_bytes(pack(whole[: ends(members())[member] + further]))
    found, faults = read(path, expected=6)
    assert found == EXPECTED[:left]
    where = f"{path} after {left} samples" if left else str(path)
    assert faults == [Fault(where, "lost from a shard that is cut short", max(1, 6 - left))]


def test_a_compressed_shard_that_is_cut_short_says_so(tmp_path: Path) -> None:
    packed = gzip.compress(write(tmp_path / "whole.tar", members(12)).read_bytes())
    (tmp_path / "0.tgz").write_bytes(packed[: len(packed) // 2])
    found, ((_, reason, lost, *_),) = read(tmp_path / "0.tgz", expected=12)
    assert 0 < len(found) < 12
    assert (reason, lost) == ("lost from a shard that is cut short", 12 - len(found))


def test_what_follows_garbage_is_lost_and_said(tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path / "0.tar", members()).read_bytes())
    begin = ends(members())[6]
    whole[begin : begin + 512] = b"x" * 512
    (tmp_path / "0.tar").write_bytes(whole)
    found, faults = read(tmp_path / "0.tar", expected=6)
    assert found == EXPECTED[:3]
    assert [fault.lost for fault in faults] == [3]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "lost from a shard that is empty"),
        (b"<html>403</html>", "lost from a shard that is no tar file"),
        (b"<html>403 forbidden</html>" * 1000, "lost from a shard that is no tar file"),
        (gzip.compress(b"<html>403</html>" * 1000, mtime=0), "lost from a shard that is no tar file"),
    ],
)
def test_a_file_that_is_no_shard_is_lost_as_a_whole(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "0.tar").write_bytes(content)
    assert read(tmp_path / "0.tar", expected=60) == ([], [Fault(str(tmp_path / "0.tar"), reason, 60)])


@pytest.mark.parametrize("content", [[], [("0.npy", b"x"), ("README.md", b"x")]])
def test_a_shard_of_nothing_is_lost(tmp_path: Path, content: Members) -> None:
    shard = write(tmp_path / "0.tar", content)
    found = [Fault("another", "bad")]
    assert list(tars.samples(str(shard), found, expected=60)) == []
    assert found[1:] == [Fault(str(shard), "lost from a shard without images and captions", 60)]


def test_a_shard_that_has_gone_is_lost(tmp_path: Path) -> None:
    reason = "lost from a shard that cannot be read (No such file or directory)"
    assert read(tmp_path / "0.tar", expected=1) == ([], [Fault(str(tmp_path / "0.tar"), reason)])


# -- Names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards, of which two are compressed, beside what img2dataset writes."""
    folder = tmp_path / "with space"
    folder.mkdir()
    for i in range(4):
        write(folder / f"{i:05}.tar", members(prefix=f"{i}-"))
        (folder / f"{i:05}.parquet").write_bytes(b"PAR1")
        (folder / f"{i:05}_stats.json").write_text("{}")
    for i, ending in ((1, ".tar.gz"), (2, ".TGZ")):
        whole = folder / f"{i:05}.tar"
        (folder / f"{i:05}{ending}").write_bytes(gzip.compress(whole.read_bytes(), mtime=0))
        whole.unlink()
    (folder / ".00009.tar").write_bytes(b"")
    return folder


NAMES = ["00000.tar", "00001.tar.gz", "00002.TGZ", "00003.tar"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("", NAMES), ("/", NAMES), ("/0*.tar", NAMES[::3]), ("/0000[03].tar", NAMES[::3]),
        ("/{00000,00003}.tar", NAMES[::3]), ("/0000{0..0}.tar::{}/00001.tar.gz", NAMES[:2]), ("/*.tar.gz", NAMES[1:2]),
    ],
)  # fmt: skip
def test_shards_are_found_by_folder_glob_and_braces(
    folder: Path, name: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    for root in (str(folder), "~/with space"):
        text = root + name.replace("::{}", f"::{folder}")
        assert shard_names.is_shards(text)
        assert shard_names.expand(text) == [str(folder / each) for each in expected]
    assert sum(len(read(each)[0]) for each in shard_names.expand(str(folder))) == 24


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/9*.tar", "no shard is named like "), ("/00009.tar", "cannot read the shard .*00009.tar: No such file"),
        ("/0000{0..9}.tar", "cannot read the shard .*00001.tar: No such file"),
        ("/{0.tar", "alanced"),
    ],
)  # fmt: skip
def test_shards_that_are_not_there_are_named(folder: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--held-out-data: .*{message}") as error:
        shard_names.expand(f"{folder}{name}", "--held-out-data")
    assert "\n" not in str(error.value)


def test_what_is_no_shard(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", members())
    (tmp_path / "photos").mkdir()
    for name in ("pairs.csv", "openmoji", str(tmp_path / "photos"), "https://x/pairs.csv"):
        assert not shard_names.is_shards(name)
    for name in (str(tmp_path), "a.tar", "a.tgz", "https://x/0.tar?token=1", "s3://b/0.tar", "pipe:cat 0.tar"):
        assert shard_names.is_shards(name)
    with pytest.raises(UserError, match=r"--data: cannot read s3://b/0.tar: expected a file, one of http://"):
        shard_names.expand("s3://b/0.tar")


def test_commands_are_shards(tmp_path: Path) -> None:
    shard = write(tmp_path / "0.tar", members())
    assert shard_names.expand(f"pipe:cat {shard}") == [f"pipe:cat {shard}"]
    assert read(f"pipe:cat {shard}") == (EXPECTED, [])
    reason = "lost from a shard that cannot be read (its command failed with status 3)"
    assert read("pipe:exit 3", expected=60) == ([], [Fault("pipe:exit 3", reason, 60)])


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# -- Training and evaluation -----------------------------------------------------------------------------------------


def stream(folder: Path | str, **options: object) -> ShardBatches:
    values = {"size": 16, "batch_size": 5, "seed": 0, "workers": 0, "augment": False, "epoch_pairs": 0, **options}
    values.setdefault("held_out", Fingerprints())
    return ShardBatches(str(folder), lambda c: {"captions": list(c)}, **values)  # type: ignore[arg-type, dict-item]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """Four shards of twelve samples: one without caption, one that is no image; the last shard ends after ten."""
    for shard in range(4):
        content = [(f"{shard}-{name}", data) for name, data in members(12)]
        content = [(n, d) for n, d in content if n != "0-005.txt"]
        content = [(n, b"<html>" if n == "1-005.png" else d) for n, d in content]
        write(tmp_path / f"{shard}.tar", content[: 20 if shard == 3 else None])
    whole = (tmp_path / "3.tar").read_bytes()
    (tmp_path / "3.tar").write_bytes(whole[: len(whole.rstrip(b"\0"))])
    return tmp_path


def known(folder: Path) -> dict[str, tuple[str, int]]:
    return {
        f"{folder}/0.tar:0-005": ("without caption", 1), f"{folder}/1.tar:1-005": ("not an image", 1),
        f"{folder}/3.tar after 10 samples": ("lost from a shard that is cut short", 2),
    }  # fmt: skip


def told(data: ShardBatches) -> dict[str, tuple[str, int]]:
    return {fault.where: (fault.reason, fault.lost) for fault in data.faults}


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a["images"], b["images"]) and a["text"] == b["text"]


def test_an_epoch_of_broken_shards_has_what_is_left(broken: Path) -> None:
    data = stream(broken)
    assert data.epoch_pairs == 45
    made = list(data.batches(0))
    assert [len(batch["images"]) for batch in made] == [5] * 9
    assert told(data) == known(broken)
    assert not any("faults" in batch for batch in made)
    captions = [caption for batch in made for caption in batch["text"]["captions"]]
    for kind in (0, 5):  # of which there are four each
        assert captions.count(CAPTIONS[kind]) in ((4, 5) if kind == 0 else (2, 3))
    with_length = stream(broken, epoch_pairs=48)  # not read before
    assert told(with_length) == {}
    list(with_length.batches(0))
    assert told(with_length) == known(broken)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_broken_shards_continue_in_mid_epoch(broken: Path, workers: int) -> None:
    whole = list(stream(broken, workers=workers).batches(1))
    for start in (1, 4):
        data = stream(broken, workers=workers)
        rest = list(data.batches(1, start=start))
        assert len(rest) == 9 - start
        assert all(same(a, b) for a, b in zip(whole[start:], rest, strict=True))
        assert known(broken).items() - told(data).items() <= {(f"{broken}/1.tar:1-005", ("not an image", 1))}


def test_a_picture_that_cannot_be_decoded_is_replaced_with_its_caption(tmp_path: Path) -> None:
    content = [(name, b"<html>" if name == "003.png" else data) for name, data in members(12)]
    write(tmp_path / "0.tar", content)
    expected = {c: centre_crop(Image.open(io.BytesIO(p)), 16) for c, p in zip(CAPTIONS, PICTURES, strict=True)}
    made = list(stream(tmp_path, batch_size=6).batches(0))
    captions = [caption for batch in made for caption in batch["text"]["captions"]]
    assert len(captions) == 12
    assert {*CAPTIONS} - {*captions} == {CAPTIONS[3]}  # one other is there twice
    for caption, image in zip(captions, torch.cat([batch["images"] for batch in made]), strict=True):
        assert torch.equal(image, expected[caption])
    twice = (
        next(batch for batch in made if batch["ids"] is not None) if any(b["ids"] is not None for b in made) else None
    )
    assert twice is None or len(set(twice["ids"].tolist())) == 5  # positives of each other


def several(folder: Path, count: int = 12) -> dict[str, list[str]]:
    """A shard whose samples have three captions each, by the first of them."""
    captions = {caption: [caption, f"{caption} again", f"a {caption}"] for caption in CAPTIONS[:count]}
    content = members(count)
    for i, own in enumerate(captions.values()):
        content[2 * i + 1] = (f"{i:03}.json", dumps({"caption": [*own, own[0], " ", None]}))  # each once, none empty
    write(folder / "0.tar", content)
    return captions


def test_of_several_captions_each_epoch_draws_one(tmp_path: Path) -> None:
    expected = several(tmp_path)
    found: list[Fault] = []
    assert [sample.captions for sample in tars.samples(str(tmp_path / "0.tar"), found)] == [*expected.values()]
    shown = {png.tobytes(): own for png, own in zip(
        (centre_crop(Image.open(io.BytesIO(p)), 16).numpy() for p in PICTURES), expected.values(), strict=True
    )}  # fmt: skip
    data, drawn = stream(tmp_path, batch_size=6), Counter[str]()
    assert data.several == 12
    for epoch in range(20):
        for batch in data.batches(epoch):
            for image, caption in zip(batch["images"], batch["text"]["captions"], strict=True):
                assert caption in shown[image.numpy().tobytes()]
                drawn[caption] += 1
    assert len(drawn) == 36
    assert all(60 < sum(drawn[own[place]] for own in expected.values()) < 100 for place in range(3))  # of 240, a third
    whole = [batch["text"]["captions"] for batch in data.batches(3)]
    assert [batch["text"]["captions"] for batch in stream(tmp_path, batch_size=6).batches(3, start=1)] == whole[1:]


def test_held_out_pairs_have_the_first_caption_and_all_of_them_are_kept_from_training(tmp_path: Path) -> None:
    expected = several(tmp_path)
    pairs, marks = read_all(str(tmp_path), 16)
    assert pairs.captions == [*expected]
    for i, own in enumerate(expected.values()):
        assert all(marks.match(["other", caption], b"") for caption in own)
        assert not marks.match([f"other {i}"], b"")
    (tmp_path / "train").mkdir()
    content = [("0.png", b"x"), ("0.json", dumps({"caption": ["new", f"a {CAPTIONS[2]}"]}))]
    train = write(
        tmp_path / "train" / "0.tar",
        [*content, ("1.png", PICTURES[0]), ("1.txt", b"new"), ("2.png", b"y"), ("2.txt", b"z")],
    )
    data = stream(train, batch_size=1, held_out=marks)
    assert (data.epoch_pairs, data.leaking, data.several) == (1, 2, 1)


def test_too_much_that_is_lost_stops_the_run_at_its_start(broken: Path) -> None:
    assert stream(broken, faults=Faults(max_bad=0.02)).epoch_pairs == 45
    (broken / "2.tar").write_bytes(b"")
    with pytest.raises(UserError) as error:
        stream(broken, faults=Faults(max_bad=0.02))
    message = "--max-bad 2%: 15 of 48 training examples cannot be used, and at most 10 may be left out: 12 lost from a"
    assert message in str(error.value)
    assert f"shard that is empty: {broken}/2.tar;" in str(error.value)
    with pytest.raises(UserError, match=r"--data: cannot read .*/0.tar:0-005: without caption \(--on-error skip"):
        stream(broken, faults=Faults(stop=True))


def test_shards_in_which_nothing_can_be_used_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "0.tar", [(name, b" " if name.endswith("txt") else data) for name, data in members()])
    with pytest.raises(UserError, match=r"--batch-size: 5 is more than the 0 pairs of an epoch .*6 without caption: "):
        stream(tmp_path)
    write(tmp_path / "0.tar", [(name, b"x" if name.endswith("png") else data) for name, data in members()])
    with pytest.raises(UserError, match=r"--data: cannot read the image .*0.tar:00\d, nor any of 5 that came before"):
        list(stream(tmp_path).batches(0))


def test_held_out_shards_are_evaluated_without_what_is_bad(broken: Path) -> None:
    faults = Faults()
    pairs, marks = read_all(str(broken), 16, faults=faults)
    assert sorted(pairs.captions) == sorted(CAPTIONS)  # one of each caption and image
    assert {fault.where: (fault.reason, fault.of) for fault in faults} == {
        where: (reason, EVALUATION) for where, (reason, _) in known(broken).items()
    }
    assert marks.match([CAPTIONS[5]], b"")
    with pytest.raises(UserError, match=r"cannot read .*0.tar:0-005: without caption"):
        read_all(str(broken), 16)
    for shard in range(4):
        (broken / f"{shard}.tar").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"--held-out-data: .* holds no pairs that can be used: 4 lost from a shard that is e"
    ):
        read_all(str(broken), 16, faults=faults)


@pytest.mark.skipif(shutil.which("curl") is None, reason="webdataset reads URLs by curl")
def test_urls_are_shards(folder: Path, url: str) -> None:
    assert shard_names.expand(f"{url}/0000{{0,3}}.tar") == [f"{url}/00000.tar", f"{url}/00003.tar"]
    found, faults = read(f"{url}/00000.tar")
    assert ([caption for _, caption in found], faults) == (CAPTIONS[:6], [])
    ((_, reason, lost, *_),) = read(f"{url}/00004.tar", expected=6)[1]
    assert (reason, lost) == ("lost from a shard that cannot be read (its command failed with status 22)", 6)
