"""Builds the extension modules; everything else is in pyproject.toml.

ssl_kernels._C       torch ops against LibTorch's stable ABI and Python's limited API: one binary serves every
                     torch >= 2.10 and every Python >= 3.10.
ssl_kernels._native  the same kernels on NumPy arrays (pybind11), for the Python that builds it.
"""

from glob import glob
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

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
    f"-ffile-prefix-map={Path(__file__).resolve().parent}/=",
    f"-ffile-prefix-map={Path(torch.__file__).parent}/=torch/",
]
CPU_SOURCES = sorted(glob("csrc/cpu/*.cpp"))
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))

setup(
    ext_modules=[
        CppExtension(
            "ssl_kernels._C",
            [*CPU_SOURCES, *sorted(glob("csrc/torch/*.cpp"))],
            depends=HEADERS,
            extra_compile_args=[*CXX_FLAGS, "-DPy_LIMITED_API=0x030a0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"],
            py_limited_api=True,
        ),
        Extension(
            "ssl_kernels._native",
            [*CPU_SOURCES, *sorted(glob("csrc/numpy/*.cpp"))],
            include_dirs=[pybind11.get_include()],
            depends=HEADERS,
            extra_compile_args=CXX_FLAGS,
            language="c++",
        ),
    ],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
