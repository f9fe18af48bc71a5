"""The C++ by itself: sanitizers, other architectures; and what a broken installation says."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import alone

import ssl_kernels
from ssl_kernels.info import native_build_info

ROOT = Path(__file__).resolve().parent.parent
KERNELS = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
each_driver = pytest.mark.parametrize("driver", sorted((ROOT / "tests/cpp").glob("*.cpp")), ids=lambda path: path.stem)
FLAGS = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi"]
CALLS = "--param=asan-instrumentation-with-call-threshold=0"  # compiles in two thirds of the time


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """The kernels as object files, compiled once for each compiler and choice of flags by whichever worker comes first,
    two at a time."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all workers

    @functools.cache
    def build(compiler: str, *flags: str) -> list[str]:
        folder = shared / f"kernels-{compiler}-{hashlib.sha256(repr(flags).encode()).hexdigest()[:8]}"
        folder.mkdir(exist_ok=True)

        def build_one(source: Path) -> str:
            output = folder / f"{source.stem}.o"
            with alone(output.with_suffix(".lock")):
                if not output.exists():
                    compile_to(compiler, output.with_suffix(".part"), *flags, "-c", str(source))
                    output.with_suffix(".part").rename(output)
            return str(output)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(build_one, KERNELS))

    return build


def compile_to(compiler: str, output: Path, *arguments: str) -> None:
    command = [compiler, *FLAGS, *WARNINGS, *arguments, "-o", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def compile_driver(kernels: Callable[..., list[str]], tmp_path: Path) -> Callable[..., str]:
    """Compiles a driver with the kernels and returns its path."""

    def build(compiler: str, driver: Path, *flags: str) -> str:
        if shutil.which(compiler) is None:
            pytest.skip(f"{compiler} is not installed")
        compile_to(compiler, tmp_path / "driver", *flags, str(driver), *kernels(compiler, *flags))
        return str(tmp_path / "driver")

    return build


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


SANITIZED = ("-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", CALLS)


@each_driver
def test_the_portable_build_is_right_and_clean_under_sanitizers(
    compile_driver: Callable[..., str], driver: Path
) -> None:
    """What a processor without x86's instruction sets gets; here with the x86 parts switched off."""
    assert run(compile_driver("g++", driver, *SANITIZED, "-DSSLK_PORTABLE")).splitlines()[0] == "baseline ok"


@pytest.mark.slow
@each_driver
def test_every_instruction_set_is_clean_under_sanitizers(compile_driver: Callable[..., str], driver: Path) -> None:
    output = run(compile_driver("g++", driver, *SANITIZED))
    assert "baseline ok" in output
    if platform.machine() == "x86_64":
        assert output.count(" ok") == len(native_build_info()["available_isas"])  # type: ignore[index]


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no cross compiler for Arm is installed")
@each_driver
def test_compiles_for_arm(compile_driver: Callable[..., str], driver: Path) -> None:
    binary = compile_driver("aarch64-linux-gnu-g++", driver, "-O1", "-static")
    if shutil.which("qemu-aarch64-static"):
        assert "baseline ok" in run("qemu-aarch64-static", binary)


@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang is not installed")
@each_driver
def test_compiles_with_clang(compile_driver: Callable[..., str], driver: Path) -> None:
    assert "baseline ok" in run(compile_driver("clang++", driver, "-O1"))


def test_without_the_compiled_part_import_says_what_to_run(tmp_path: Path) -> None:
    package = Path(ssl_kernels.__file__).parent
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(package, tmp_path / "ssl_kernels", ignore=ignore)
    # An editable installation would still find the missing module in the checkout.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]; import ssl_kernels"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "the compiled module ssl_kernels._C cannot be loaded" in result.stderr
    assert "pip install --no-build-isolation -e ." in result.stderr


def test_binaries_keep_to_the_stable_interfaces() -> None:
    """_C links neither libpython nor torch_python, and names the limited API."""
    from ssl_kernels import _C

    path = Path(_C.__file__)
    assert path.name.startswith("_C.abi3")
    if shutil.which("readelf"):
        needed = run("readelf", "-d", str(path))
        assert "torch_python" not in needed
        assert "libpython" not in needed
