"""Builds the extension modules; everything else is in pyproject.toml.

ssl_kernels._C       torch ops against LibTorch's stable ABI and Python's limited API: one binary serves every
                     torch >= 2.10 and every Python >= 3.10.
ssl_kernels._C_cuda  ops on CUDA tensors, against the same interfaces; in an object of its own, since it loads into CUDA
                     builds of torch only. Built where nvcc and such a torch are, whatever GPUs are. SSL_KERNELS_CUDA=0
                     leaves it out, SSL_KERNELS_CUDA=1 makes its absence an error; TORCH_CUDA_ARCH_LIST says for which
                     architectures.
ssl_kernels._native  the same kernels on NumPy arrays (pybind11), for the Python that builds it. Of torch it has a few
                     headers for dtypes and errors, and no library. Without it (SSL_KERNELS_NATIVE=0) one wheel
                     serves every Python >= 3.10; with it, a wheel is for the Python that builds it.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup


def find_cuda() -> str | None:
    """The toolkit's folder as nvcc knows it, which may itself be a script in another."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        return None
    top = re.search(r"^#\$ TOP=(.+)$", ask(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull), re.MULTILINE)
    return str(Path(top[1]).resolve()) if top else home


def ask(*command: str) -> str:
    """What it says; nothing where it cannot be run, as a script whose compiler was removed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout + done.stderr


def wish(variable: str) -> str:
    """What the environment says of a part: 0, 1 or nothing."""
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        sys.exit(f"{variable}: expected 0 or 1, got {value!r}")
    return value


CUDA_HOME = find_cuda()
if CUDA_HOME:
    os.environ["CUDA_HOME"] = CUDA_HOME  # read by the import that follows

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

PATHS = [
    f"-ffile-prefix-map={Path(__file__).resolve().parent}/=",
    f"-ffile-prefix-map={Path(torch.__file__).parent}/=torch/",
]
CXX_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-g0",  # no debug information, and no path of the machine that builds
    *PATHS,
]
STABLE_FLAGS = ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
CPU_SOURCES = sorted(glob("csrc/cpu/*.cpp"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))


def cuda_extensions() -> list[Extension]:
    """ssl_kernels._C_cuda, or nothing and a line about the reason."""
    wanted = wish("SSL_KERNELS_CUDA")
    if wanted == "0":
        return []
    release = nvcc_release()
    if torch.version.cuda is None:
        missing = f"torch {torch.__version__} is not a CUDA build"
    elif release is None:
        missing = "nvcc was not found: CUDA_HOME names the folder of the CUDA toolkit"
    elif release.split(".")[0] != torch.version.cuda.split(".")[0]:
        missing = f"nvcc {release} is of another major version than the CUDA {torch.version.cuda} of torch"
    else:
        return [cuda_extension(release)]
    if wanted == "1":
        sys.exit(f"SSL_KERNELS_CUDA=1: {missing}")
    print(f"ssl_kernels._C_cuda is left out: {missing}", file=sys.stderr)
    return []


def nvcc_release() -> str | None:
    if CUDA_HOME is None:
        return None
    match = re.search(r"release (\d+\.\d+)", ask(f"{CUDA_HOME}/bin/nvcc", "--version"))
    return match[1] if match else None


def cuda_extension(release: str) -> Extension:
    blackwell = tuple(map(int, release.split("."))) >= (12, 8)
    newest = "9.0;10.0+PTX;12.0" if blackwell else "9.0+PTX"  # other new GPUs compile the PTX when they first load it
    # The oldest that every toolkit and CUDA build of torch knows: what is chosen for a GPU must not lack its code.
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or f"7.5;8.0;8.6;8.9;{newest}"
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures  # read by what compiles; empty, it would look for GPUs here
    host = ["-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter", "-g0", *PATHS]  # nvcc's stubs use none
    return CUDAExtension(
        "ssl_kernels._C_cuda",
        [*sorted(glob("csrc/cuda/*.cu")), "csrc/cuda/library.cpp"],
        depends=HEADERS,
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *STABLE_FLAGS, f'-DSSLK_CUDA_BUILD="nvcc {release} for {architectures}"'],
            "nvcc": ["-std=c++17", "-O3", "-DUSE_CUDA", *STABLE_FLAGS, *(f"-Xcompiler={flag}" for flag in host)],
        },
        py_limited_api=True,
    )


class KeepObjects(BuildExtension):
    """Keeps objects, so that a build compiles what changed since the last one, each extension's in a folder of its own.

    The kernels of the CPU, which know neither torch nor Python, are compiled once for both extensions that have them.
    """

    def build_extension(self, extension: Extension) -> None:
        if extension.name in ("ssl_kernels._C", "ssl_kernels._native"):
            kernels = self.compiler.compile(CPU_SOURCES, "build/objects/cpu", extra_postargs=CXX_FLAGS, depends=HEADERS)
            extension.extra_objects = kernels
        folder, self.build_temp = self.build_temp, f"build/objects/{extension.name}"
        super().build_extension(extension)
        self.build_temp = folder


NATIVE = [
    Extension(
        "ssl_kernels._native",
        sorted(glob("csrc/numpy/*.cpp")),
        include_dirs=[pybind11.get_include()],
        depends=[*CPU_SOURCES, *HEADERS],
        extra_compile_args=[*CXX_FLAGS, f"-isystem{Path(torch.__file__).parent}/include"],
        language="c++",
    )
]
if wish("SSL_KERNELS_NATIVE") == "0":
    NATIVE = []

setup(
    ext_modules=[
        CppExtension(
            "ssl_kernels._C",
            sorted(glob("csrc/torch/*.cpp")),
            depends=[*CPU_SOURCES, *HEADERS],
            extra_compile_args=[*CXX_FLAGS, *STABLE_FLAGS],
            py_limited_api=True,
        ),
        *NATIVE,
        *cuda_extensions(),
    ],
    cmdclass={"build_ext": KeepObjects},
    options={} if NATIVE else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
