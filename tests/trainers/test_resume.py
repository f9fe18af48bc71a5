"""A run that is killed and resumed ends with the bits of a run that was left alone."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from conftest import logged, same_state, signal_held, start

from ssl_kernels.trainers import siglip
from ssl_kernels.trainers.checkpoints import load_checkpoint

STEPS = 15


def arguments(small: list[str], folder: Path) -> list[str]:
    return [*small, "--epochs", str(STEPS // 5), "--checkpoint-every", "4", "--output-dir", str(folder)]


@pytest.fixture(scope="module")
def uninterrupted(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    small = ["--data", str(table), "--batch-size", "16", "--image-size", "16", "--dim", "16", "--accelerator", "cpu"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the killed processes have; sums depend on how they are cut into threads
    assert siglip.main(arguments(small, folder)) == 0
    torch.set_num_threads(threads)
    assert len(logged(folder)) == STEPS
    return folder


@pytest.mark.parametrize(
    "number",
    [*(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGTERM)), signal.SIGKILL],
    ids=lambda number: number.name,
)
def test_a_killed_run_resumes_bit_exactly(
    small: list[str], tmp_path: Path, uninterrupted: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    process = start(arguments(small, folder), hold=(11, tmp_path / "gate"))
    err = signal_held(process, tmp_path / "gate", number)
    stopped = load_checkpoint(folder / "last.pt")["step"]
    if number == signal.SIGKILL:
        assert process.returncode == -number
        assert stopped == 8
    else:
        assert process.returncode == 128 + number
        assert err.strip().splitlines()[-1] == (
            f"{number.name}: stopped after saving {folder / 'last.pt'}; continue with:"
            f" python -m ssl_kernels.trainers.siglip --resume {folder}"
        )
        assert "Traceback" not in err
        assert stopped == logged(folder)[-1]["step"] == 11, "the checkpoint is that of the last step"

    assert siglip.main(["--resume", str(folder)]) == 0
    assert "written:" in capsys.readouterr().out
    assert logged(folder) == logged(uninterrupted)
    a, b = load_checkpoint(folder / "last.pt"), load_checkpoint(uninterrupted / "last.pt")
    assert a["step"] == b["step"] == STEPS
    for part in ("model", "optimizer", "rng", "config"):
        assert same_state(a[part], b[part]), part
    assert not [path for path in folder.iterdir() if path.name.endswith(".tmp") and number != signal.SIGKILL]


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda number: number.name
)
def test_a_signal_to_the_whole_process_group_leaves_a_checkpoint(
    small: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    """As a terminal, a job scheduler or `timeout` sends it: the loader's workers get it too."""
    folder = tmp_path / "run"
    gate = tmp_path / "gate"
    process = start([*arguments(small, folder), "--workers", "1"], hold=(10, gate), start_new_session=True)
    err = signal_held(process, gate, number, group=True)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert load_checkpoint(folder / "last.pt")["step"] == logged(folder)[-1]["step"]


def test_other_data_is_not_resumed_on(
    small: list[str], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = tmp_path / "pairs.csv"
    images = table.read_text().splitlines()
    pairs.write_text("\n".join([images[0], *(f"{table.parent}/{line}" for line in images[1:])]) + "\n")
    run = [*small, "--data", str(pairs), "--output-dir", str(tmp_path / "run")]
    assert siglip.main(run) == 0
    pairs.write_text(pairs.read_text().replace("red square", "scarlet square"))
    assert siglip.main(["--resume", str(tmp_path / "run")]) == 2
    assert "--resume: the data is not what the run was trained on" in capsys.readouterr().err


def test_resuming_into_another_run_is_refused(
    small: list[str], uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    assert siglip.main([*small, "--epochs", "1", "--output-dir", str(other)]) == 0
    before = (other / "last.pt").read_bytes()
    assert siglip.main(["--resume", str(uninterrupted), "--output-dir", str(other)]) == 2
    assert "already holds another run" in capsys.readouterr().err
    assert (other / "last.pt").read_bytes() == before


def test_resuming_a_finished_run_evaluates_it_again(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (uninterrupted / "last.pt").read_bytes()
    assert siglip.main(["--resume", str(uninterrupted)]) == 0
    assert "text->image R@1" in capsys.readouterr().out
    assert (uninterrupted / "last.pt").read_bytes() == before
    assert len(logged(uninterrupted)) == STEPS


def test_a_resumed_run_keeps_its_settings(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changed, message in (
        (["--lr", "0.5"], f"--lr: the run in {uninterrupted} has 0.003, not 0.5"),
        (["--loss-backend", "reference"], "--loss-backend"),
        (["--seed", "3"], "--seed"),
    ):
        assert siglip.main(["--resume", str(uninterrupted), *changed]) == 2
        err = capsys.readouterr().err
        assert message in err
        assert len(err.strip().splitlines()) == 1
