"""The command line: dispatch, a missing extra, and one clear line for every mistake."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import start, start_command
from processes import run_python

import ssl_kernels
from ssl_kernels import cli
from ssl_kernels.trainers import siglip


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (([], 2), (["--help"], 0), (["train", "--help"], 0)):
        assert cli.main(arguments) == code
        out = capsys.readouterr().out
        assert "ssl-kernels train TRAINER" in out
        assert all(f"TRAINER = {name} " in out for name in ("clip", "siglip"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tarin"], f"expected one of the commands {', '.join(cli.COMMANDS)}, got 'tarin'"),
        (["train"], f"one of the trainers {', '.join(cli.TRAINERS)}, got none"),
        (["train", "clap"], f"one of the trainers {', '.join(cli.TRAINERS)}, got 'clap'"),
    ],
)
def test_unknown_commands(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_info_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out


_LOADED = """
import contextlib, io, sys
from ssl_kernels import cli

LATE = {
    "lightning_fabric", "timm", "torchvision", "open_clip", "sklearn", "scipy", "pandas", "matplotlib", "tensorboard",
    "transformers", "torch._dynamo",
}

def run(arguments, code, absent):
    silence = io.StringIO()
    try:
        with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
            got = cli.main(arguments)
    except SystemExit as stop:
        got = stop.code
    assert got == code, (arguments, got, silence.getvalue())
    assert not absent & {*sys.modules}, (arguments, absent & {*sys.modules})

assert "ssl_kernels.trainers" not in sys.modules
for arguments in (["--help"], ["train", "--help"], ["info"]):
    run(arguments, 0, LATE | {"tyro", "rich", "PIL", "webdataset"})
for name in cli.TRAINERS:
    run(["train", name, "--help"], 0, LATE)
    run(["train", name, "--data", "nowhere.csv"], 2, LATE)
for name in cli.USES:
    run([name, "--help"], 0, LATE)
run(["search", "nowhere", "photos", "--query", "x"], 2, LATE)
"""


def test_commands_import_only_what_they_need() -> None:
    """Nets, data and plots come when training starts: help and a wrong argument answer at once."""
    done = run_python(_LOADED)
    assert done.returncode == 0, done.stderr


_WITHOUT_EXTRA = """
import importlib.abc, importlib.util, sys

HIDDEN = {"lightning_fabric", "timm", "tyro"}

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name in HIDDEN else find_spec(name, package)
sys.meta_path.insert(0, Hide())
from ssl_kernels import cli
sys.exit(cli.main(sys.argv[1:]))
"""


def without_extra(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _WITHOUT_EXTRA, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_info_needs_no_extra() -> None:
    done = without_extra("info")
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout


def test_train_names_the_missing_extra() -> None:
    done = without_extra("train", "siglip")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "ssl-kernels: error: ssl_kernels.trainers: missing lightning_fabric, timm, tyro;"
        ' install the extra "train": pip install ".[train]" in the checkout'
    )


@pytest.mark.parametrize(("name", "title"), [("clip", "CLIP on "), ("siglip", "SigLIP on ")])
def test_train_dispatches_to_the_trainer(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, title: str
) -> None:
    assert cli.main(["train", name, *small, "--epochs", "1", "--output-dir", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "training loss" in out
    assert title in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent.csv"], "--data: no such file: absent.csv"),
        (["--data", "pairs.zip"], "--data: expected openmoji"),
        (["--data", "absent-{00..01}.tar"], "--data: cannot read the shard absent-00.tar"),
        (["--image-model", "resnet_of_dreams"], "--image-model: timm has no model 'resnet_of_dreams'"),
        (["--image-size", "20"], "--image-size: tiny-resnet needs a multiple of 8, got 20"),
        (["--image-size", "4"], "--image-size: expected at least 8, got 4"),
        (["--batch-size", "4000"], "--batch-size: 4000 is more than the 86 training pairs"),
        (["--accumulate", "50"], "--accumulate 50: more than one epoch holds"),
        (["--caption-column", "text"], "has no column 'text'; it has 'image', 'caption', 'category'"),
        (["--held-out", "1.5"], "--held-out: expected a number in [0, 1], got 1.5"),
        (["--lr", "nan"], "--lr: expected a finite number >= 0, got nan"),
        (["--precision", "16-mixed"], "--precision: 16-mixed needs a GPU"),
        (["--loss-backend", "triton"], "--loss-backend: backend 'triton': expected CUDA tensors"),
        (
            ["--image-head", "dinotxt"],
            "--image-head: dinotxt reads the patch tokens of a vision transformer, which tiny-",
        ),
        (["--resume", "nowhere"], "--resume: no checkpoint at nowhere"),
        (["--output-dir", "/dev/null/run"], "--output-dir: cannot create /dev/null/run"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_argument(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    folder = [] if "--output-dir" in arguments else ["--output-dir", str(tmp_path / "run")]
    assert siglip.main([*small, *folder, *arguments], prog="ssl-kernels train siglip") == 2
    err = capsys.readouterr().err.strip()
    assert err.startswith("ssl-kernels train siglip: error: ")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run" / "last.pt").exists()


def test_a_value_of_the_wrong_kind_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--precision", "fp8"], ["--epochs", "many"], ["--no-such-flag"]):
        with pytest.raises(SystemExit) as stop:
            siglip.main(arguments)
        assert stop.value.code == 2
        captured = capsys.readouterr()
        assert arguments[-1] in captured.out + captured.err


def test_several_processes_of_an_unknown_launcher_are_refused(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless torchrun has started them, or the trainer itself: they would be as many runs, all in one folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert siglip.main([*small, "--output-dir", str(tmp_path / "run")]) == 2
    assert "WORLD_SIZE: expected 1, got 2; start several processes with torchrun" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_with_exit_code_one(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert siglip.main([*small, "--lr", "1e30", "--warmup", "0", "--clip", "0", "--output-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err.strip()
    assert "is not finite; no checkpoint had been written yet" in err
    assert len(err.splitlines()) == 1


def test_interrupted_before_training_exits_at_once(small: list[str], tmp_path: Path) -> None:
    """No half-made run is left behind by a Ctrl-C during the imports or while the data is read."""
    process = start([*small, "--output-dir", str(tmp_path / "run")])
    while process.poll() is None:  # one may come where an import swallows it
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    process.communicate()
    assert process.returncode != 0
    assert not (tmp_path / "run").exists()


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"ssl_kernels {ssl_kernels.__version__}\n"


_ENDLESS = """
import time
print("loading", flush=True)
while True:
    try:
        time.sleep(1)
    except BaseException:  # as imports of the wide world do
        pass
"""


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("torch", ["ssl_kernels.cli", "--help"]), ("tyro", ["ssl_kernels.cli", "train", "siglip"]),
        ("tyro", ["ssl_kernels.trainers.siglip"]),
    ],
    ids=["torch", "a trainer", "a trainer alone"],
)  # fmt: skip
def test_an_interrupt_while_modules_are_loaded_is_one_line(tmp_path: Path, module: str, arguments: list[str]) -> None:
    (tmp_path / f"{module}.py").write_text(_ENDLESS)
    package = str(Path(ssl_kernels.__file__).parents[1])
    process = start_command(["-m", *arguments], path=f"{tmp_path}:{package}")
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "ssl-kernels: interrupted\n")
    assert process.returncode == 130


def test_other_programs_keep_their_interrupts() -> None:
    code = "import signal, ssl_kernels; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    process = start_command(["-c", code])
    assert process.communicate()[0] == "True\n"


def test_an_interrupted_command_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "info", interrupt)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "ssl-kernels info: interrupted\n"
