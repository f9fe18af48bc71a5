"""What a run leaves behind and says when something stops it that is not its own: a full disk, bad data, another run."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import logged, same_state
from test_loop import Linear, Regression, config, run
from torch import Tensor, nn

from ssl_kernels.trainers import checkpoints, loggers, moco, run_folder, siglip
from ssl_kernels.trainers.checkpoints import load_checkpoint
from ssl_kernels.trainers.errors import InterruptedRunError, StoppedRunError, UserError, describe
from ssl_kernels.trainers.signals import Signals

PROG = "python -m ssl_kernels.trainers.siglip"


class Norm(nn.Module):
    """A net whose forward pass leaves more behind than gradients: statistics, and draws of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))

    def forward(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return (self.net(batch[0])[:, 0] - batch[1]).square().mean(), {}


def fresh() -> Norm:
    torch.manual_seed(3)
    return Norm()


def failing_at(model: nn.Module, call: int, error: Exception, when: str) -> object:
    """The step of a model that raises the error in its forward pass of this number, before it or after it."""
    calls = 0

    def step(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        if calls == call and when == "before":
            raise error
        result = model(batch)
        if calls == call:
            raise error
        return result

    return step


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("call", [13, 14])  # the first and the second micro-batch of step 7
def test_an_error_within_a_step_saves_the_one_before_it_exactly(tmp_path: Path, call: int, when: str) -> None:
    """Also what the forward pass of the unfinished step has drawn and counted is undone."""
    options = {"epochs": 4, "batch_size": 4, "accumulate": 2, "checkpoint_every": 5}
    run(config(tmp_path / "whole", **options), fresh())
    model = fresh()
    step = failing_at(model, call, KeyError("blue"), when)
    with pytest.raises(StoppedRunError) as stop:
        run(config(tmp_path / "parts", **options), model, step=step)
    assert (stop.value.step, stop.value.checkpoint) == (7, str(tmp_path / "parts" / "last.pt"))
    assert str(stop.value) == f"step 7: KeyError: blue; the last good checkpoint is {stop.value.checkpoint}"
    assert isinstance(stop.value.__cause__, KeyError)
    assert load_checkpoint(tmp_path / "parts" / "last.pt")["step"] == 6
    run(config(tmp_path / "parts", resume=tmp_path / "parts", **options), Norm())
    assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
    states = [load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "parts")]
    assert same_state(states[0], states[1])


def test_an_error_in_the_data_saves_the_steps_before_it(tmp_path: Path) -> None:
    class Broken(Regression):
        def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            for number, batch in enumerate(super().batches(epoch, start), start):
                if (epoch, number) == (1, 2):
                    raise UserError("--data: cannot read the image x.png")
                yield batch

    with pytest.raises(StoppedRunError, match=r"^--data: cannot read the image x.png; the last good .*last\.pt$"):
        run(config(tmp_path), data=Broken())
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 8


def test_an_error_before_the_first_step_is_done_leaves_no_checkpoint(tmp_path: Path) -> None:
    model = Linear()
    with pytest.raises(StoppedRunError, match="step 1: ValueError: no; no checkpoint had been written yet"):
        run(config(tmp_path), model, step=failing_at(model, 1, ValueError("no"), "before"))
    assert not (tmp_path / "last.pt").exists()


def test_a_step_that_failed_while_it_changed_the_weights_is_not_saved(tmp_path: Path) -> None:
    def fail(number: int) -> None:
        if number == 5:
            raise RuntimeError("half of the average is moved")

    with pytest.raises(StoppedRunError, match="half of the average"):
        run(config(tmp_path, checkpoint_every=3), after_step=fail)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 3


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_it(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert siglip.main([*small, "--epochs", "1", "--output-dir", str(folder)]) == 0
    before = (folder / "last.pt").read_bytes()
    capsys.readouterr()
    with largest_file(100_000):
        assert siglip.main(["--resume", str(folder), "--epochs", "2"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err == [
        f"{PROG}: error: step 10: {folder / 'last.pt'}: {os.strerror(errno.EFBIG)};"
        f" the last good checkpoint is {folder / 'last.pt'}",
        f"continue with: {PROG} --resume {folder}",
    ]
    assert (folder / "last.pt").read_bytes() == before
    assert not list(folder.glob(".*"))
    assert siglip.main(["--resume", str(folder), "--epochs", "2"]) == 0


def test_a_disk_that_was_full_for_a_moment_leaves_no_torn_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.pt"
    checkpoints.save_checkpoint(path, {"step": 1})

    class Once(io.FileIO):
        writes = 0

        def write(self, content: Any) -> int:
            self.writes += 1
            if self.writes == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    monkeypatch.setattr(checkpoints, "open", Once, raising=False)
    with pytest.raises(OSError, match=r"No space left on device.*last\.pt"):
        checkpoints.save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert torch.load(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("logger", ["JsonLines", "TensorBoard"])
def test_a_log_that_finds_no_room_stops_the_run_after_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logger: str
) -> None:
    kind = getattr(loggers, logger)
    log = kind.log

    def full(self: loggers.Logger, record: dict[str, float]) -> None:
        with checkpoints.naming(tmp_path / logger):
            if record["step"] == 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        log(self, record)

    monkeypatch.setattr(kind, "log", full)
    with pytest.raises(StoppedRunError, match=f"^step 5: {tmp_path / logger}: No space left on device; the last good"):
        run(config(tmp_path))
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 5


def test_tensorboard_prints_no_traceback_of_its_thread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.excepthook
    board = loggers.TensorBoard(tmp_path / "board", 0)

    def fill() -> None:
        for step in range(1000):
            board.log({"step": step, "loss": 1.0})

    with largest_file(1), pytest.raises(OSError, match=rf"{os.strerror(errno.EFBIG)}.*board"):
        fill()
    board.close()
    assert capsys.readouterr().err == ""
    assert threading.excepthook is before


def test_a_folder_that_cannot_be_written_into_is_refused_at_once(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(path: object, flags: int, mode: int = 0) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(run_folder.os, "open", read_only)
    assert siglip.main([*small, "--output-dir", str(tmp_path)]) == 2
    line = f"{PROG}: error: --output-dir: cannot write into {tmp_path}: {os.strerror(errno.EROFS)}\n"
    assert capsys.readouterr() == ("", line)


def test_names_that_are_no_text_are_written_and_found_again(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the data and of the run's folder: bytes that are not UTF-8 reach Python as surrogates."""
    odd = os.fsdecode(b"gr\xfcn")
    folder, data = tmp_path / odd, tmp_path / f"{odd}.csv"
    lines = table.read_text().splitlines()
    named = [f"{table.parent}/{line}" for line in lines[1:33]]
    data.write_bytes(os.fsencode("\n".join([lines[0], *named]) + "\n"))
    size = ["--image-size", "16", "--dim", "16", "--accelerator", "cpu", "--batch-size", "8"]
    arguments = ["--data", str(data), *size, "--epochs", "1", "--output-dir", str(folder)]
    assert siglip.main(arguments) == 2
    assert "--output-dir: TensorBoard writes into no folder whose name is not UTF-8" in capsys.readouterr().err
    assert siglip.main([*arguments, "--no-tensorboard"]) == 0
    assert json.loads((folder / "config.json").read_text())["data"] == str(data)
    assert load_checkpoint(folder / "last.pt")["config"]["data"] == str(data)
    assert siglip.main(["--resume", str(folder), "--epochs", "2"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "gr\\udcfcn" in captured.out


def test_fingerprints_take_any_name() -> None:
    from ssl_kernels.trainers.data.image_sets import Images
    from ssl_kernels.trainers.data.pairs import Batches, ImageTextPairs
    from ssl_kernels.trainers.data.views import PhotoView, ViewBatches
    from ssl_kernels.trainers.text_towers import NGramTokenizer

    paths = [Path(os.fsdecode(name)) for name in (b"gr\xfcn.png", b"gr\xfbn.png")]
    prints = set()
    for path in paths:
        pairs = ImageTextPairs([path], ["a"])
        prints.add(Batches(pairs, NGramTokenizer(), size=8, batch_size=1, seed=0).fingerprint)
        prints.add(ViewBatches(Images([path]), PhotoView(), size=8, batch_size=1, seed=0).fingerprint)
    assert len(prints) == 4


HOLDER = """
import sys
from pathlib import Path
from ssl_kernels.trainers import run_folder

with run_folder.held(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the folder `run`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_one_run_at_a_time_has_a_folder(
    small: list[str], tmp_path: Path, holder: subprocess.Popen[str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    leftover, own = folder / ".last.pt.123.tmp", folder / ".notes.tmp"
    leftover.touch()
    own.touch()
    host = os.uname().nodename
    for arguments in ([*small, "--output-dir", str(folder)], [*small, "--output-dir", str(folder), "--overwrite"]):
        assert siglip.main(arguments) == 2
        assert f"{folder} is in use by a run, process {holder.pid} on {host}; name another" in capsys.readouterr().err
    assert {path.name for path in folder.iterdir()} == {".lock", leftover.name, own.name}
    holder.kill()  # the lock ends with its process, however that ends
    holder.wait()
    with run_folder.held(folder):
        assert not leftover.exists()
        assert own.exists()
    assert not (folder / run_folder.LOCK).exists()
    assert folder.exists()


def test_only_the_first_of_several_processes_holds_the_folder(
    tmp_path: Path, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for told in ({"RANK": "1"}, {"RANK": "3", "LOCAL_RANK": "0"}, {"NODE_RANK": "1"}, {"LOCAL_RANK": "1"}):
        with monkeypatch.context() as patch:
            for name, value in told.items():
                patch.setenv(name, value)
            with run_folder.held(tmp_path / "run"):
                pass
    for told in ({"RANK": "0"}, {"NODE_RANK": "0", "LOCAL_RANK": "0"}, {"RANK": "0", "LOCAL_RANK": "0"}):
        with monkeypatch.context() as patch:
            for name, value in told.items():
                patch.setenv(name, value)
            with pytest.raises(UserError, match="in use by a run"), run_folder.held(tmp_path / "run"):
                pass


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    for folder in (tmp_path / "a" / "b", tmp_path / "c"):
        with contextlib.suppress(KeyboardInterrupt), run_folder.held(folder):
            assert folder.is_dir()
            raise KeyboardInterrupt
        assert not folder.exists()
    (tmp_path / "mine").mkdir()
    with run_folder.held(tmp_path / "mine"):
        pass
    assert list((tmp_path / "mine").iterdir()) == []


def steps_of(folder: Path) -> dict[str, int]:
    return {path.name: load_checkpoint(path)["step"] for path in folder.glob("*.pt")}


@pytest.mark.parametrize(("keep", "kept"), [(1, 0), (2, 1), (3, 2), (9, 5)])
def test_checkpoints_before_the_last_are_kept(tmp_path: Path, keep: int, kept: int) -> None:
    run(config(tmp_path, checkpoint_every=3, keep=keep))
    names = {"last.pt": 18, **{f"last-{i}.pt": 18 - 3 * i for i in range(1, kept + 1)}}
    assert steps_of(tmp_path) == names
    run(config(tmp_path, checkpoint_every=9, keep=1, overwrite=True))
    assert steps_of(tmp_path) == {"last.pt": 18}


def test_fewer_checkpoints_may_be_kept_later(tmp_path: Path) -> None:
    run(config(tmp_path, checkpoint_every=3, keep=4))
    run(config(tmp_path, checkpoint_every=3, keep=2, resume=tmp_path, epochs=4))
    assert steps_of(tmp_path) == {"last.pt": 24, "last-1.pt": 21}


def test_without_links_checkpoints_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    run(config(tmp_path, checkpoint_every=9))
    assert steps_of(tmp_path) == {"last.pt": 18, "last-1.pt": 9}


def flip(path: Path, place: int) -> None:
    """One bit of a file, which keeps its size and its frame."""
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def place_of_weights(path: Path) -> int:
    """Where the first weight of a checkpoint of `Linear` lies."""
    weight = load_checkpoint(path)["model"]["layer.weight"]
    return path.read_bytes().index(weight.numpy().tobytes())


def test_a_changed_bit_of_a_checkpoint_is_told(tmp_path: Path) -> None:
    run(config(tmp_path, checkpoint_every=9))
    path = tmp_path / "last.pt"
    place = place_of_weights(path)
    flip(path, place)
    assert torch.load(path, weights_only=True)["step"] == 18, "torch does not notice"
    with pytest.raises(UserError) as error:
        load_checkpoint(path)
    message = str(error.value)
    assert message.startswith(f"--resume: {path} is not a readable checkpoint (archive/data/")
    assert message.endswith(f"differs from its checksum); --resume {tmp_path / 'last-1.pt'} is the one before it")
    (tmp_path / "last-1.pt").unlink()
    with pytest.raises(UserError, match=r"differs from its checksum\)$"):
        load_checkpoint(path)


def test_the_checkpoint_before_a_damaged_one_stands_in_for_it(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    settings = [*small, "--epochs", "2", "--checkpoint-every", "4"]
    assert siglip.main([*settings, "--output-dir", str(tmp_path / "whole")]) == 0
    assert siglip.main([*settings, "--output-dir", str(folder)]) == 0
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:-1000])
    capsys.readouterr()
    assert siglip.main(["--resume", str(folder / "last.pt")]) == 2  # which is what was named
    capsys.readouterr()
    assert siglip.main(["--resume", str(folder)]) == 0
    err = capsys.readouterr().err
    assert err.startswith(f"{PROG}: note: --resume: {folder / 'last.pt'} is not a readable checkpoint (")
    assert err.endswith(f"; the run goes on from step 8 of {folder / 'last-1.pt'}\n")
    assert err.count("\n") == 1
    assert logged(folder) == logged(tmp_path / "whole")
    assert same_state(*(load_checkpoint(path / "last.pt") for path in (folder, tmp_path / "whole")))
    assert load_checkpoint(folder / "last-1.pt")["step"] == 8, "a damaged one takes the place of none"


def test_where_none_is_whole_the_newest_is_told_of(tmp_path: Path) -> None:
    run(config(tmp_path, checkpoint_every=9))
    for name in ("last.pt", "last-1.pt"):
        flip(tmp_path / name, place_of_weights(tmp_path / name))
    with pytest.raises(UserError, match=r"--resume: .*last\.pt is not a readable"):
        checkpoints.newest(tmp_path, lambda line: pytest.fail(line))


def test_a_run_goes_on_where_a_kill_left_no_last_checkpoint(tmp_path: Path) -> None:
    """A file system without links has a moment in which the old one has moved and the new one has not."""
    run(config(tmp_path, checkpoint_every=9))
    (tmp_path / "last.pt").unlink()
    run(config(tmp_path, resume=tmp_path))
    assert steps_of(tmp_path)["last.pt"] == 18


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])  # test_resume.py has the other
def test_signals_save(tmp_path: Path, number: signal.Signals) -> None:
    def interrupt(step: int) -> None:
        if step == 4:
            os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_DFL)  # nohup lets it be ignored
    try:
        with pytest.raises(InterruptedRunError) as stop:
            run(config(tmp_path), after_step=interrupt)
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert (stop.value.signal_name, stop.value.exit_code) == (number.name, 128 + number)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 4


def test_a_hangup_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_outlives_its_console(tmp_path: Path) -> None:
    from rich.console import Console

    class Gone:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        flush = isatty = lambda self: False

    result = run(config(tmp_path), console=Console(file=Gone()))  # type: ignore[arg-type]
    assert result.steps == 18


def test_a_finished_run_without_its_log_is_evaluated_again(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert siglip.main([*small, "--epochs", "1", "--output-dir", str(folder)]) == 0
    for content in (None, '{"no": "step"}\n[1]\nnothing\n'):
        (folder / "metrics.jsonl").unlink()
        if content is not None:
            (folder / "metrics.jsonl").write_text(content)
        assert siglip.main(["--resume", str(folder)]) == 0
        captured = capsys.readouterr()
        assert "text->image R@1" in captured.out
        assert captured.err == ""


def test_errors_of_any_kind_are_one_line() -> None:
    class OddError(Exception):
        pass

    worker = (
        "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  x\nOSError: 5"
    )
    for error, line in (
        (UserError("--data: no"), "--data: no"),
        (OSError(errno.ENOSPC, "No space left on device", "a.pt"), "a.pt: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("torn"), "OSError: torn"),
        (OddError("first", "second"), "OddError: first"),
        (OddError("one\ntwo"), "OddError: one"),
        (OddError(), "OddError"),
        (OSError(worker), "OSError: 5"),
        (KeyError("blue"), "KeyError: blue"),
        (
            UnicodeEncodeError("utf-8", "\udcfc", 0, 1, "no"),
            "UnicodeEncodeError: 'utf-8' codec can't encode character '\\udcfc' in position 0: no",
        ),
    ):
        assert describe(error) == line


def test_an_error_that_is_ours_is_told_with_its_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also outside of the steps: in a file of the run, beside one line."""

    def fail(*_: object) -> None:
        raise IndexError("no such place")

    monkeypatch.setattr(moco, "train", fail)
    assert moco.main(["--output-dir", str(tmp_path)], prog="moco") == 1
    path = tmp_path / "traceback.txt"
    assert capsys.readouterr().err == f"moco: error: IndexError: no such place (traceback in {path})\n"
    assert 'raise IndexError("no such place")' in path.read_text()
