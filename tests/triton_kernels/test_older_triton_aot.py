"""The ahead-of-time gate with the Tritons of older versions of torch, each in a process of its own (see gate.py).

`make setup` installs Triton 3.6 beside the environment, and `make test-all` 3.7 as well. Triton is imported once in a
process, and first where PYTHONPATH says.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import gate
import pytest
from aot import CHIPS
from report import OPS

ROOT = pathlib.Path(__file__).resolve().parents[2]
VERSIONS = ("3.6.0", "3.7.1")
TIGHT = ("softmax", "sinkhorn", "row_softmax", "key_softmax")  # ops whose registers older versions run out of
TIMEOUT_S = 3600


def run(version: str, *arguments: str) -> None:
    folder = pathlib.Path(sys.prefix) / f"triton-{version}"
    if not (folder / "triton").is_dir():
        pytest.skip(f"make setup and make test-all install older Tritons; {folder} is not there")
    done = subprocess.run(
        [sys.executable, gate.__file__, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True, text=True, timeout=TIMEOUT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert f"triton {version}," in done.stdout
    print(done.stdout)


def test_the_usual_chip_with_the_oldest() -> None:
    """Each kernel, dtype, size and variant once; `make test-all` compiles every case."""
    run(VERSIONS[0], "--chip", "sm_90", "--few", "--tensor-cores", "--kernel", *TIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("ops", [OPS[::2], OPS[1::2]], ids=" and ".join)
@pytest.mark.parametrize("chip", CHIPS)
def test_every_case_with_the_oldest(chip: str, ops: tuple[str, ...]) -> None:
    run(VERSIONS[0], "--chip", chip, "--kernel", *ops)


@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_kernel_with_those_between(chip: str) -> None:
    """Of a version whose neighbours compile every case."""
    run(VERSIONS[1], "--chip", chip, "--few", "--each-config")
