"""When setup.py builds the CUDA C++ kernels, and what it says where it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = torch.version.cuda or ""
cuda_torch = pytest.mark.skipif(not CUDA, reason="torch is not a CUDA build")


# Reads setup.py in a child for each line, which has what takes long: its imports, but for that of torch which looks for
# the toolkit. The line has the child's environment and where its output goes.
READER = """
import json, os, sys
import pybind11, setuptools, torch

setuptools.setup = lambda ext_modules, **rest: [print(e.name, e.extra_compile_args) for e in ext_modules]
code = compile(open("setup.py").read(), "setup.py", "exec")
for line in sys.stdin:
    environment, *outputs = json.loads(line)
    child = os.fork()
    if child == 0:
        os.environ.clear()
        os.environ.update(environment)
        sys.stdout, sys.stderr = (open(path, "w", buffering=1) for path in outputs)
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        try:
            exec(code, {"__file__": "setup.py", "__name__": "__main__"})
        except BaseException as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def reader() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", READER]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


Setup = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def setup(reader: subprocess.Popen[str], tmp_path: Path) -> Setup:
    """Reads setup.py beside a toolkit of a release, which prints the extensions' names after its own lines."""

    def read(wanted: str | None = None, release: str | None = None, **variables: str) -> Any:
        if release:
            nvcc = tmp_path / "bin/nvcc"
            nvcc.parent.mkdir()
            nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
            nvcc.chmod(0o755)
        environment = {**os.environ, "CUDA_HOME": str(tmp_path)}
        environment.pop("TORCH_CUDA_ARCH_LIST", None)
        environment.pop("SSL_KERNELS_CUDA", None)
        if wanted is not None:
            environment["SSL_KERNELS_CUDA"] = wanted
        environment.update(variables)
        outputs = [tmp_path / "stdout", tmp_path / "stderr"]
        assert reader.stdin is not None
        assert reader.stdout is not None
        print(json.dumps([environment, *map(str, outputs)]), file=reader.stdin, flush=True)
        status = int(reader.stdout.readline())
        return subprocess.CompletedProcess([], status, *(path.read_text() for path in outputs))

    return read


def test_without_a_toolkit_they_are_left_out_with_a_line(setup: Setup) -> None:
    done = setup()
    assert done.returncode == 0, done.stderr
    assert "_C_cuda" not in done.stdout
    assert "ssl_kernels._C_cuda is left out: " in done.stderr


@cuda_torch
def test_asked_for_without_a_toolkit(setup: Setup) -> None:
    done = setup(wanted="1")
    assert done.returncode != 0
    assert "SSL_KERNELS_CUDA=1: nvcc was not found: CUDA_HOME names the folder" in done.stderr


@cuda_torch
def test_a_toolkit_of_another_major_version(setup: Setup) -> None:
    done = setup(release="9.2")
    assert "_C_cuda" not in done.stdout
    assert f"nvcc 9.2 is of another major version than the CUDA {CUDA} of torch" in done.stderr


@cuda_torch
def test_a_toolkit_is_enough(setup: Setup) -> None:
    done = setup(release=CUDA)
    assert done.returncode == 0, done.stderr
    assert f"nvcc {CUDA} for 7.5;8.0;8.6;8.9;9.0" in done.stdout
    assert "+PTX" in done.stdout
    assert "left out" not in done.stderr


@cuda_torch
def test_architectures_are_those_asked_for(setup: Setup) -> None:
    done = setup(release=CUDA, TORCH_CUDA_ARCH_LIST="8.6")
    assert f'nvcc {CUDA} for 8.6"' in done.stdout


@cuda_torch
def test_none_asked_for_are_not_those_of_this_machine(setup: Setup) -> None:
    done = setup(release=CUDA, TORCH_CUDA_ARCH_LIST="")
    assert f"nvcc {CUDA} for 7.5;8.0;" in done.stdout


@pytest.mark.parametrize("wanted", ["", "0"])
def test_a_compiler_that_cannot_be_run_is_none(setup: Setup, tmp_path: Path, wanted: str) -> None:
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/nowhere/sh\n")
    nvcc.chmod(0o755)
    done = setup(wanted=wanted)
    assert done.returncode == 0, done.stderr
    assert "_C_cuda" not in done.stdout


@cuda_torch
def test_it_can_be_switched_off(setup: Setup) -> None:
    done = setup(wanted="0", release=CUDA)
    assert done.returncode == 0, done.stderr
    assert "_C_cuda" not in done.stdout


def test_the_switch_has_two_positions(setup: Setup) -> None:
    done = setup(wanted="yes")
    assert done.returncode != 0
    assert "SSL_KERNELS_CUDA: expected 0 or 1, got 'yes'" in done.stderr
