"""When setup.py builds the CUDA C++ kernels, and what it says where it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA = torch.version.cuda or ""
cuda_torch = pytest.mark.skipif(not CUDA, reason="torch is not a CUDA build")


def setup(
    home: Path, wanted: str | None = None, release: str | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Reads setup.py beside a toolkit of that release, which prints the extensions' names after its own lines."""
    if release:
        nvcc = home / "bin/nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {release}, V{release}.1\n")
        nvcc.chmod(0o755)
    environment = {**os.environ, "CUDA_HOME": str(home)}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    environment.pop("SSL_KERNELS_CUDA", None)
    if wanted is not None:
        environment["SSL_KERNELS_CUDA"] = wanted
    environment.update(variables)
    code = """
import setuptools
setuptools.setup = lambda ext_modules, **rest: [print(e.name, e.extra_compile_args) for e in ext_modules]
exec(compile(open("setup.py").read(), "setup.py", "exec"), {"__file__": "setup.py", "__name__": "__main__"})
"""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_without_a_toolkit_they_are_left_out_with_a_line(tmp_path: Path) -> None:
    done = setup(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "_C_cuda" not in done.stdout
    assert "ssl_kernels._C_cuda is left out: " in done.stderr


@cuda_torch
def test_asked_for_without_a_toolkit(tmp_path: Path) -> None:
    done = setup(tmp_path, wanted="1")
    assert done.returncode != 0
    assert "SSL_KERNELS_CUDA=1: nvcc was not found: CUDA_HOME names the folder" in done.stderr


@cuda_torch
def test_a_toolkit_of_another_major_version(tmp_path: Path) -> None:
    done = setup(tmp_path, release="9.2")
    assert "_C_cuda" not in done.stdout
    assert f"nvcc 9.2 is of another major version than the CUDA {CUDA} of torch" in done.stderr


@cuda_torch
def test_a_toolkit_is_enough(tmp_path: Path) -> None:
    done = setup(tmp_path, release=CUDA)
    assert done.returncode == 0, done.stderr
    assert f"nvcc {CUDA} for 7.5;8.0;8.6;8.9;9.0" in done.stdout
    assert "+PTX" in done.stdout
    assert "left out" not in done.stderr


@cuda_torch
def test_architectures_are_those_asked_for(tmp_path: Path) -> None:
    done = setup(tmp_path, release=CUDA, TORCH_CUDA_ARCH_LIST="8.6")
    assert f'nvcc {CUDA} for 8.6"' in done.stdout


@cuda_torch
def test_none_asked_for_are_not_those_of_this_machine(tmp_path: Path) -> None:
    done = setup(tmp_path, release=CUDA, TORCH_CUDA_ARCH_LIST="")
    assert f"nvcc {CUDA} for 7.5;8.0;" in done.stdout


@pytest.mark.parametrize("wanted", ["", "0"])
def test_a_compiler_that_cannot_be_run_is_none(tmp_path: Path, wanted: str) -> None:
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/nowhere/sh\n")
    nvcc.chmod(0o755)
    done = setup(tmp_path, wanted=wanted)
    assert done.returncode == 0, done.stderr
    assert "_C_cuda" not in done.stdout


@cuda_torch
def test_it_can_be_switched_off(tmp_path: Path) -> None:
    done = setup(tmp_path, wanted="0", release=CUDA)
    assert done.returncode == 0, done.stderr
    assert "_C_cuda" not in done.stdout


def test_the_switch_has_two_positions(tmp_path: Path) -> None:
    done = setup(tmp_path, wanted="yes")
    assert done.returncode != 0
    assert "SSL_KERNELS_CUDA: expected 0 or 1, got 'yes'" in done.stderr
