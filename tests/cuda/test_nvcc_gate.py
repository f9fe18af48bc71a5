"""The CUDA C++ kernels, compiled by nvcc for chips that need not be there, and judged by their machine code.

``python tests/cuda/test_nvcc_gate.py`` records the instructions per element in budget.json.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
BUDGET = Path(__file__).with_name("budget.json")
CHIPS = ("sm_80", "sm_90", "sm_100")
REGISTERS = {"ema": 48, "queue": 40}  # five and six blocks of 256 threads in 65,536 registers
BYTES = {"float": 4, "__half": 2, "__nv_bfloat16": 2}
PAIRS = [(a, b) for a in BYTES for b in BYTES]

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@dataclass(frozen=True)
class Kernel:
    """One function of the machine code."""

    name: str
    registers: int
    stack_bytes: int  # spills among them
    parameter_bytes: int
    code: tuple[tuple[int, str], ...]  # address and instruction, without its predicate

    def count(self, pattern: str) -> int:
        return sum(bool(re.match(pattern, instruction)) for _, instruction in self.code)

    @property
    def vector_loops(self) -> list[int]:
        """Instructions of each innermost loop that loads several elements at once."""
        ends = ((at, re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", text)) for at, text in self.code)
        loops = [(int(found[1], 16), at) for at, found in ends if found and int(found[1], 16) < at]
        innermost = [(a, b) for a, b in loops if not any(a <= c and d <= b for c, d in loops if (c, d) != (a, b))]
        bodies = ([text for at, text in self.code if a <= at <= b] for a, b in innermost)
        return [len(body) for body in bodies if any(re.match(r"LDG\.E\.(64|128)", text) for text in body)]


@functools.cache
def kernels(source: str, chip: str) -> tuple[Kernel, ...]:
    if chip.replace("sm", "compute") not in run("nvcc", "--list-gpu-arch").split():
        pytest.skip(f"{compiler()} does not know {chip}")
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/{source}.cubin"
        run(
            "nvcc", "-cubin", f"-arch={chip}", "-std=c++17", "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA",
            "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{Path(torch.__file__).parent}/include",
            "-Werror=all-warnings", f"{ROOT}/csrc/cuda/{source}.cu", "-o", binary,
        )  # fmt: skip
        return tuple(read(run(cuobjdump(), "-res-usage", "-sass", "-elf", binary)))


def run(*command: str, stdin: str | None = None) -> str:
    result = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def cuobjdump() -> str:
    """The toolkit's or, where it has none, Triton's."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump")


def read(text: str) -> Iterator[Kernel]:
    # "Function f:\n REG:32 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:600 ..."
    resources = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    # "Function : f\n", the instructions with their addresses, and dots
    listings = dict(re.findall(r"Function : (\w+)\n([\s\S]*?)\n\s*\.{6}", text))
    # ".nv.info.f\n" and the attributes of f
    attributes = dict(re.findall(r"^\.nv\.info\.(\w+)\n([\s\S]*?)\n(?=\.nv)", text, re.MULTILINE))
    names = run("c++filt", stdin="\n".join(name for name, *_ in resources)).splitlines()
    for (symbol, registers, stack, local), name in zip(resources, names, strict=True):
        parameters = re.search(r"EIATTR_CBANK_PARAM_SIZE\s+Format:.*\s+Value:\s+(0x[0-9a-f]+)", attributes[symbol])
        assert parameters is not None
        code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+ +)?([A-Z][^;]*);", listings[symbol], re.MULTILINE)
        yield Kernel(
            name=re.sub(r"^void |\(anonymous namespace\)::|\((?!anonymous).*", "", name),
            registers=int(registers),
            stack_bytes=int(stack) + int(local),
            parameter_bytes=int(parameters[1], 16),
            code=tuple((int(at, 16), instruction.strip()) for at, instruction in code),
        )


def per_element(source: str, kernel: Kernel) -> float:
    """Instructions of the vector loops; both ways of a branch count."""
    if source == "ema":  # all pairs of dtypes are in one kernel, and the ways to store a copy in each of the nine loops
        elements = sum(16 // max(BYTES[a], BYTES[b]) for a, b in PAIRS)
        assert len(kernel.vector_loops) == len(PAIRS)
    else:
        queue, keys = re.findall(r"\w+", kernel.name)[1:]
        elements = 16 // max(BYTES[queue], BYTES[keys])
        assert len(kernel.vector_loops) == 3  # of copying, of the norm, of dividing by it
    return round(sum(kernel.vector_loops) / elements, 1)


def compiler() -> str:
    match = re.search(r"V([\d.]+)", run("nvcc", "--version"))
    return f"nvcc {match[1] if match else 'unknown'}"


each = pytest.mark.parametrize(("source", "chip"), [(source, chip) for source in REGISTERS for chip in CHIPS])


@each
def test_resources(source: str, chip: str) -> None:
    made = kernels(source, chip)
    assert len(made) == {"ema": 1, "queue": len(PAIRS)}[source]
    for kernel in made:
        assert kernel.stack_bytes == 0, kernel.name
        assert kernel.registers <= REGISTERS[source], kernel.name
        assert 0 < kernel.parameter_bytes <= 4096, kernel.name


@each
def test_vectors_are_loaded_and_stored_whole(source: str, chip: str) -> None:
    for kernel in kernels(source, chip):
        loops = 9 if source == "ema" else 3
        assert len(kernel.vector_loops) == loops, kernel.name
        wide = (r"LDG\.E\.128", r"STG\.E\.128")
        if source == "queue":
            queue, keys = (BYTES[name] for name in re.findall(r"\w+", kernel.name)[1:])
            wide = (
                r"LDG\.E\.128" if keys >= queue else r"LDG\.E\.64",
                r"STG\.E\.128" if queue >= keys else r"STG\.E\.64",
            )
        for pattern, least in zip(wide, (loops, loops - 1), strict=True):
            assert kernel.count(pattern) >= least, (kernel.name, pattern)


@each
def test_no_sum_depends_on_an_order(source: str, chip: str) -> None:
    for kernel in kernels(source, chip):
        atomics = kernel.count(r"ATOM|RED")
        integers = kernel.count(r"(ATOMG|REDG?)\.E\.ADD\.64\.STRONG\.GPU")
        assert atomics == integers == {"ema": 0, "queue": 2}[source], kernel.name


@each
def test_instructions_per_element(source: str, chip: str) -> None:
    recorded = json.loads(BUDGET.read_text())
    if recorded["compiler"] != compiler():
        pytest.skip(f"recorded with {recorded['compiler']}, this is {compiler()}")
    found = {kernel.name: per_element(source, kernel) for kernel in kernels(source, chip)}
    assert found == pytest.approx(recorded["instructions_per_element"][chip][source], rel=0.05)


if __name__ == "__main__":
    figures = {
        chip: {source: {k.name: per_element(source, k) for k in kernels(source, chip)} for source in REGISTERS}
        for chip in CHIPS
    }
    BUDGET.write_text(json.dumps({"compiler": compiler(), "instructions_per_element": figures}, indent=2) + "\n")
