"""One bad file does not cost a run: it is replaced, counted and named, and the run resumes bit for bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import drawing, logged, patchworks, png, rows, same_state
from rich.console import Console

from ssl_kernels.trainers import siglip, simclr, training
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.data import batches, image_sets, images, views
from ssl_kernels.trainers.data.fault_log import FaultLog, read_faults
from ssl_kernels.trainers.data.faults import EVALUATION, Fault, Faults, ReadingConfig, parse_share, roots_of
from ssl_kernels.trainers.data.files import read_table
from ssl_kernels.trainers.data.identity import ids_of_keys
from ssl_kernels.trainers.data.pairs import Batches
from ssl_kernels.trainers.data.views import PhotoView, ViewBatches
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.processes import Share

BAD = {
    3: b"",
    20: b"<html>403 Forbidden</html>",
    41: png(drawing("red", "dot", 0))[:60],
    77: b"\xff\xd8\xff" + b"\0" * 50,
}
REASONS = {"empty file": 1, "not an image": 1, "cut short": 1, "cannot be decoded": 1}
HELD_OUT = 90  # rows from here on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs to train on, of which four images are bad, and held-out ones, of which one is."""
    folder = tmp_path_factory.mktemp("drawings")
    lines = []
    for i, (colour, shape, shade) in enumerate(rows(96)):
        drawing(colour, shape, shade).save(folder / f"{i}.png")
        lines.append(f"{i}.png,{colour} {shape} number {shade}")
    for i, content in {**BAD, 92: b"text"}.items():
        (folder / f"{i}.png").write_bytes(content)
    for name, own in (("train.csv", lines[:HELD_OUT]), ("held_out.csv", lines[HELD_OUT:])):
        (folder / name).write_text("\n".join(["image,caption", *own]) + "\n")
    return folder


@pytest.fixture(autouse=True)
def met_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sets this small all files would be tried before training."""
    monkeypatch.setattr(images, "_SAMPLE", 0)


def arguments(folder: Path, run: Path, *more: str) -> list[str]:
    return [
        *("--data", str(folder / "train.csv"), "--held-out-data", str(folder / "held_out.csv"), "--batch-size", "15"),
        *("--epochs", "3", "--image-size", "16", "--dim", "16", "--accelerator", "cpu", "--checkpoint-every", "4"),
        *("--output-dir", str(run), *more),
    ]


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "_SAMPLE", 0)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        assert siglip.main(arguments(folder, run)) == 0
        torch.set_num_threads(threads)
    return run


def named(run: Path) -> dict[str, tuple[str, str]]:
    return {Path(fault.where).name: (fault.reason, fault.of) for fault in read_faults(run)}


EVERYTHING = {
    "3.png": ("empty file", "training"), "20.png": ("not an image", "training"), "41.png": ("cut short", "training"),
    "77.png": ("cannot be decoded", "training"), "92.png": ("not an image", "evaluation"),
}  # fmt: skip


def test_a_run_with_bad_images_finishes_and_names_them(finished: Path) -> None:
    assert len(logged(finished)) == 18
    assert named(finished) == EVERYTHING
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["left_out"] == {"training": REASONS, "evaluation": {"not an image": 1}}
    assert summary["figures"][0]["note"] == "all 5 held-out pairs"


def test_bad_images_are_told_once(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    """And the same seed gives the same weights."""
    assert siglip.main(arguments(folder, tmp_path / "run", "--workers", "1")) == 0
    out = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("left out: ", "  1 ", "  2 "))]
    assert sorted(out[:5]) == sorted(f"left out: {folder / name}: {reason}" for name, (reason, _) in EVERYTHING.items())
    assert (
        out[5] == f"left out: 4 training and 1 evaluation examples, which {tmp_path / 'run' / 'left_out.jsonl'} names"
    )
    assert {line.split(":")[0] for line in out[6:]} == {f"  {1 + (r == 'not an image')} {r}" for r in REASONS}
    a, b = (load_checkpoint(run / "last.pt") for run in (tmp_path / "run", finished))
    assert same_state(a["model"], b["model"])
    assert logged(tmp_path / "run") == logged(finished)


@pytest.mark.parametrize("has_moved", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_killed_run_resumes_bit_exactly_and_counts_on(
    folder: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch, has_moved: bool
) -> None:
    """Also on a copy of the data that lies elsewhere."""
    run, take = tmp_path / "run", training.Training.optimizer_step

    class Killed(BaseException):
        pass

    def step(self: training.Training, batches: object) -> dict[str, float]:
        if self.done == 10:
            raise Killed
        return take(self, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(training.Training, "optimizer_step", step)
    with pytest.raises(Killed):
        siglip.main(arguments(folder, run))
    with (run / "left_out.jsonl").open("a") as file:
        file.write('{"where": "cut in tw')
    monkeypatch.setattr(training.Training, "optimizer_step", take)
    moved: list[str] = []
    if has_moved:
        there = shutil.copytree(folder, tmp_path / "moved")
        moved = ["--data", str(there / "train.csv"), "--held-out-data", str(there / "held_out.csv")]
    assert siglip.main(["--resume", str(run), "--max-bad", "5%", *moved]) == 0
    assert logged(run) == logged(finished)
    a, b = (load_checkpoint(path / "last.pt") for path in (run, finished))
    assert all(same_state(a[part], b[part]) for part in ("model", "optimizer", "rng"))
    assert named(run) == EVERYTHING
    assert len(read_faults(run)) == 5


def test_a_new_run_forgets_what_the_one_before_left_out(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    assert siglip.main(arguments(tmp_path / "data", tmp_path / "run", "--epochs", "1")) == 0
    assert len(named(tmp_path / "run")) == 5
    for i in (*BAD, 92):
        shutil.copy(folder / "0.png", tmp_path / "data" / f"{i}.png")
    again = ["--epochs", "1", "--overwrite"]
    assert siglip.main(arguments(tmp_path / "data", tmp_path / "run", *again)) == 0
    assert not (tmp_path / "run" / "left_out.jsonl").exists()


def test_another_run_in_the_folder_keeps_its_list(folder: Path, tmp_path: Path, finished: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    assert siglip.main(arguments(folder, tmp_path / "run")) == 2
    assert named(tmp_path / "run") == EVERYTHING


@pytest.mark.parametrize("workers", ["0", "1"])
def test_stop_ends_the_run_with_the_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    assert siglip.main(arguments(folder, tmp_path, "--on-error", "stop", "--workers", workers)) in (1, 2)
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1
    assert "siglip: error: --data: cannot read " in err[0]
    assert "(--on-error skip goes on without)" in err[0]
    assert any(f"{folder}/{i}.png: " in err[0] for i in BAD)


def test_stop_counts_for_the_evaluation_too(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder, tmp_path / "data")
    for i in BAD:
        drawing("red", "dot", i).save(tmp_path / "data" / f"{i}.png")
    run = arguments(tmp_path / "data", tmp_path / "run", "--epochs", "1", "--on-error", "stop")
    assert siglip.main(run) in (1, 2)
    assert f"cannot read {tmp_path}/data/92.png: not an image" in capsys.readouterr().err
    assert siglip.main(["--resume", str(tmp_path / "run"), "--on-error", "skip"]) == 0
    assert named(tmp_path / "run") == {"92.png": EVERYTHING["92.png"]}


def test_too_many_bad_files_stop_the_run_with_the_list(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert siglip.main(arguments(folder, tmp_path, "--max-bad", "0")) in (1, 2)
    err = capsys.readouterr().err.strip()
    assert err.splitlines()[-1].startswith("python -m ssl_kernels.trainers.siglip: error: --max-bad 0%: ")
    assert " training examples cannot be used, and at most 0 may be left out: 1 " in err
    assert 1 <= len(named(tmp_path)) <= 4


def test_some_files_are_tried_before_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_SAMPLE", 100)
    assert siglip.main(arguments(folder, tmp_path / "run", "--max-bad", "0.0")) == 2
    assert "--max-bad 0%: 4 of 90 training examples cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_sample_is_spread_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(1000)]  # none is there
    for most, size, tried in ((10, 1, 10), (2000, 1, 1000)):
        monkeypatch.setattr(images, "_SAMPLE", most)
        monkeypatch.setattr(images, "_SAMPLE_BYTES", size)
        faults = Faults(max_bad=1)
        images.try_some(paths, faults)
        assert len(faults) == tried
        assert {paths[0].name, paths[-1].name} <= {Path(fault.where).name for fault in faults}
    assert {fault.reason for fault in faults} == {"no such file"}
    for path in paths[:10]:
        path.write_bytes(b"x" * 100)
    faults = Faults()
    monkeypatch.setattr(images, "_SAMPLE_BYTES", 350)
    images.try_some(paths[:10], faults, EVALUATION)
    assert [Path(fault.where).name for fault in faults] == ["0.png", "1.png", "2.png"]
    with pytest.raises(UserError, match="--max-bad 1%: 11 of 11 training examples"):
        images.try_some(paths[100:111], Faults())


# -- Batches ---------------------------------------------------------------------------------------------------------


def pairs_of(folder: Path, **options: object) -> Batches:
    pairs = read_table(folder / "train.csv", "image", "caption")
    values = {"size": 16, "batch_size": 18, "seed": 0, **options}
    return Batches(pairs, lambda c: {"captions": list(c)}, **values)  # type: ignore[arg-type, dict-item]


@pytest.mark.parametrize("augment", [True, False])
def test_a_bad_image_is_replaced_with_its_caption(folder: Path, augment: bool) -> None:
    data = pairs_of(folder, augment=augment)
    pairs, bad = data.pairs, {data.pairs.captions[i] for i in BAD}
    for epoch in range(2):
        taken = []
        for number in range(len(data)):
            batch = data[epoch, number]
            captions, indices = batch["text"]["captions"], data.indices(epoch, number)
            asked = [pairs.captions[i] for i in indices]
            assert {a for a, b in zip(asked, captions, strict=True) if a != b} == bad & {*asked}
            assert {fault.reason for fault in batch.get("faults", [])} >= {REASON[i] for i in {*BAD} & {*indices}}
            others = [b for a, b in zip(asked, captions, strict=True) if a != b]
            assert not {*others} & {*asked}, "the batch's own are taken last"
            taken += others
            if not augment:
                shown = [pairs.captions.index(caption) for caption in captions]
                assert torch.equal(batch["images"], pairs.load(shown, 16))
        assert len(taken) == 4
    same = [pairs_of(folder, augment=augment, workers=w)[1, 2]["images"] for w in (0, 2)]
    assert torch.equal(*same)


REASON = dict(zip(BAD, ("empty file", "not an image", "cut short", "cannot be decoded"), strict=True))


def test_the_other_images_of_a_batch_are_what_they_would_be(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "good")
    for i in BAD:
        drawing("red", "dot", i).save(tmp_path / "good" / f"{i}.png")
    for number in range(5):
        with_bad, good = (pairs_of(place)[0, number] for place in (folder, tmp_path / "good"))
        kept = [i not in BAD for i in pairs_of(folder).indices(0, number)]
        assert torch.equal(with_bad["images"][kept], good["images"][kept])


@pytest.mark.parametrize("world", [2, 3])
def test_processes_replace_as_one_does(folder: Path, world: int) -> None:
    """Captions that two of them drew are told by keys: none knows what the others have replaced."""
    for number in range(5):
        whole, parts = pairs_of(folder)[0, number], []
        for rank in range(world):
            parts.append(pairs_of(folder, share=Share(rank, world))[0, number])
        assert [c for part in parts for c in part["text"]["captions"]] == whole["text"]["captions"]
        assert torch.equal(torch.cat([part["images"] for part in parts]), whole["images"])
        ids = ids_of_keys(torch.cat([part["ids"] for part in parts]))
        assert (ids is None) == (whole["ids"] is None)
        assert ids is None or torch.equal(ids[:, None] == ids, whole["ids"][:, None] == whole["ids"])
        assert [fault for part in parts for fault in part.get("faults", [])] == whole.get("faults", [])


def test_where_a_whole_batch_is_bad_others_of_it_are_taken(folder: Path) -> None:
    data = pairs_of(folder, batch_size=90)
    assert len(data[0, 0]["faults"]) >= 4
    assert data[0, 0]["ids"] is not None


def test_data_that_are_all_bad_are_refused(tmp_path: Path) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(b"")
    (tmp_path / "train.csv").write_text("image,caption\n" + "".join(f"{i}.png,number {i}\n" for i in range(4)))
    with pytest.raises(UserError, match=r"--data: .*\.png cannot be read, nor can 32 others that were drawn instead"):
        pairs_of(tmp_path, batch_size=2)[0, 0]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty patchworks of three tints, of which four are bad."""
    folder = patchworks(tmp_path_factory.mktemp("patchworks"))
    for path, content in zip(sorted(folder.rglob("*.png"))[::14], BAD.values(), strict=False):
        path.write_bytes(content)
    return folder


def views_of(photos: Path, **options: object) -> ViewBatches:
    values = {"size": 16, "batch_size": 12, "seed": 0, "crops": (1, 8), **options}
    return ViewBatches(image_sets.read_folder(photos), PhotoView(), **values)  # type: ignore[arg-type]


def test_all_views_of_a_bad_image_are_of_one_other(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = views_of(photos)
    parts = [views_of(photos, share=Share(rank, 3)) for rank in range(3)]
    found = []
    for number in range(len(whole)):
        batch = whole[0, number]
        found += batch.get("faults", [])
        for view, split in zip(batch["views"], zip(*(p[0, number]["views"] for p in parts), strict=True), strict=True):
            assert torch.equal(torch.cat(split), view)
    assert sorted(fault.reason for fault in found) == sorted(REASONS)
    opened: list[Path] = []
    monkeypatch.setattr(views, "open_image", lambda path, *_: opened.append(path) or images.open_image(path))
    for number in range(len(whole)):
        whole[0, number]
    assert len(opened) == 60 + 4  # each file once for all its views


def test_images_alone_are_trained_on_and_evaluated_without_bad_ones(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--image-size", "16", "--batch-size", "10", "--hidden", "16", "--dim", "8", "--epochs", "1"]
    run = ["--data", str(photos), "--held-out", "0.3", *settings, "--accelerator", "cpu", "--output-dir", str(tmp_path)]
    assert simclr.main(run) == 0
    assert sorted(fault.reason for fault in read_faults(tmp_path)) == sorted(REASONS)
    assert "clean query, 5-NN" in capsys.readouterr().out


def test_batches_in_memory_cost_no_exchange(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError

    pairs = read_table(folder / "held_out.csv", "image", "caption").select([0, 1, 3, 4])
    pairs.images = pairs.load(range(4), 16)
    monkeypatch.setattr(batches, "everyones", fail)
    data = Batches(pairs, lambda c: {"captions": list(c)}, size=16, batch_size=2, seed=0)  # type: ignore[arg-type, dict-item]
    assert len(list(data.batches(0))) == 2
    with pytest.raises(AssertionError):
        list(pairs_of(folder).batches(0))


# -- Faults ----------------------------------------------------------------------------------------------------------


def test_shares() -> None:
    assert [parse_share(text) for text in ("1%", "0.01", "0", "100%", "1", "0.5%")] == [0.01, 0.01, 0, 1, 1, 0.005]
    for text in ("", "%", "101%", "1.1", "-1%", "nan", "one"):
        with pytest.raises(UserError, match=r"--max-bad: expected a share of the data such as 1% or 0\.01, got"):
            ReadingConfig(max_bad=text).check_reading()


def test_a_place_is_counted_once_and_the_most_frequent_reason_comes_first() -> None:
    faults = Faults()
    faults.add("cut short", "a.jpg")
    faults.add("cut short", "a.jpg")
    faults.add("empty file", "a.jpg")
    for name in "bcdef":
        faults.add("empty file", f"{name}.jpg")
    faults.add("lost", "0.tar", lost=3, of=EVALUATION)
    assert (len(faults), faults.lost(), faults.lost("training"), faults.lost(EVALUATION)) == (7, 9, 6, 3)
    assert faults.counts("training") == {"empty file": 5, "cut short": 1}
    assert faults.lines() == [
        "5 empty file: b.jpg, c.jpg, d.jpg and 2 more", "3 lost: 0.tar", "1 cut short: a.jpg",
    ]  # fmt: skip
    assert faults.lines(EVALUATION) == ["3 lost: 0.tar"]


def test_what_is_left_out_has_a_name_within_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/sub", "b", "c"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for data in ("a/pairs.csv", str(tmp_path / "a"), f"{tmp_path}/a/*.tar", "a/"):
        faults = Faults(roots=roots_of(data, f"{tmp_path}/b/pairs.csv", "::", "pipe:cat x"))
        for where, name in (
            (f"{tmp_path}/a/sub/1.png", "sub/1.png"),
            (f"{tmp_path}/b/1.png", "1:1.png"),
            ("/else/a/1.png", None),
            (f"{tmp_path}/a/pairs.csv:7 ({tmp_path}/a/gone.png)", "pairs.csv:7 (gone.png)"),
            (f"{tmp_path}/ab/1.png", None),
            ("s3://a/1.tar:2", None),
        ):
            assert faults.named(Fault(where, "bad")).name == (name or where)
    faults = Faults(roots=roots_of("a/pairs.csv"))
    assert faults.named(Fault(f"a/pairs.csv:7 ({tmp_path}/a/x.png)", "bad")).name == "pairs.csv:7 (x.png)"
    assert Faults().named(Fault("x/y", "bad", name="y")).name == Faults().named(Fault("y", "bad")).name == "y"
    assert Faults(roots=roots_of("")).named(Fault("/x", "bad")).name == "/x"


@pytest.mark.parametrize(
    ("max_bad", "seen", "allowed"), [(0.01, 40, 10), (0.01, 2000, 30), (0.5, 100, 60), (0.0, 1000, 0), (1.0, 5, 15)]
)
def test_ten_and_a_share_are_forgiven(max_bad: float, seen: int, allowed: int) -> None:
    faults = Faults(max_bad=max_bad)
    faults.update(Fault(str(i), "bad") for i in range(allowed))
    faults.update(Fault(f"held out {i}", "bad", of=EVALUATION) for i in range(100))
    faults.check(seen)
    faults.check(1)  # what has been seen stays so
    faults.add("bad", "one more")
    with pytest.raises(
        UserError, match=f"{allowed + 1} of {max(seen, allowed + 1):,} training .* at most {allowed:,} may"
    ):
        faults.check(seen)


def test_the_console_names_the_first_few(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    faults = Faults()
    faults.add("bad", "known before")
    log = FaultLog(faults, tmp_path, console)
    for i in range(25):
        faults.add("bad", f"[{i}].jpg")
        log.tell()
    lines = console.export_text().splitlines()
    assert lines == [*(f"left out: [{i}].jpg: bad" for i in range(10)), f"left out: more, which {log.path} names"]
    assert [fault.where for fault in read_faults(tmp_path)] == ["known before", *(f"[{i}].jpg" for i in range(25))]
    silent = FaultLog(faults, tmp_path / "other", console, writes=False)
    silent.tell()
    silent.sum_up()
    assert console.export_text() == ""
    assert not (tmp_path / "other").exists()


def test_a_list_that_cannot_be_written_does_not_end_the_run(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    faults = Faults()
    log = FaultLog(faults, tmp_path / "gone", console)
    faults.add("bad", "a.jpg")
    log.tell()
    log.tell()
    assert console.export_text().splitlines() == [
        "left out: a.jpg: bad", f"cannot write {log.path}: No such file or directory",
    ]  # fmt: skip
