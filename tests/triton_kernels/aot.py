"""Compile a Triton kernel for a chip that is not there, and read what it will cost from the binary.

`build` runs Triton's own pipeline down to the machine code (ptxas for NVIDIA, LLVM for AMD) and reads registers,
spills, shared memory and the instruction mix from that code. Compilation alone proves little: a kernel that asks for
more shared memory than the chip has, or that spills, compiles without a word.
"""

from __future__ import annotations

import collections
import functools
import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_NVIDIA_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Chip:
    """What the assertions need to know of a chip: the most shared memory of one block, and its matrix instructions."""

    target: GPUTarget
    shared_bytes: int
    matrix: str  # regular expression for the opcode of a matrix product


CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), 163 * 1024, r"[HIQ]MMA"),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), 227 * 1024, r"[HIQ]?G?MMA"),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), 227 * 1024, r"UT\w*MMA|[HIQ]MMA"),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), 64 * 1024, r"v_mfma_\w+"),
}


@dataclass(frozen=True)
class Resources:
    """Of one thread, but for ``shared_bytes`` (of the block)."""

    registers: int
    spills: int  # to memory: bytes of stack and local memory on NVIDIA; on AMD also vector registers spilled
    shared_bytes: int
    opcodes: collections.Counter[str]  # static counts, with modifiers
    text: str

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    def count(self, pattern: str) -> int:
        """Instructions whose opcode, modifiers included, matches ``pattern`` from its start."""
        return sum(number for opcode, number in self.opcodes.items() if re.match(pattern, opcode))


def build(
    kernel: Any,
    chip: Chip,
    types: dict[str, str],
    constants: dict[str, Any],
    divisible: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Resources:
    """Compile ``kernel``.

    Args:
        kernel: a function decorated by ``triton.jit`` (TRITON_INTERPRET must be unset).
        chip: one of CHIPS.
        types: argument name to Triton type ("*bf16", "i32"), for arguments known at run time only.
        constants: argument name to value: ``tl.constexpr`` parameters, and arguments that the launcher makes constant
            (None, or a stride of 1).
        divisible: names among ``types`` whose value or address is a multiple of 16, as the launcher would find.
        num_warps: of a block.
        num_stages: of the software pipeline.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    missing = [name for name in names if name not in types and name not in constants]
    if missing:
        raise ValueError(f"neither a type nor a value for {missing}")
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=chip.target, options={"num_warps": num_warps, "num_stages": num_stages})
    read = _read_amd if chip.target.backend == "hip" else _read_nvidia
    return read(compiled)


def _read_nvidia(compiled: Any) -> Resources:
    cubin = compiled.asm["cubin"]
    usage, text = _cuobjdump(cubin, "-res-usage"), _cuobjdump(cubin, "-sass")

    def figure(name: str) -> int:
        match = re.search(rf"\b{name}:(\d+)", usage)
        assert match is not None, usage
        return int(match[1])

    # "        /*0120*/              @!P0 LDGSTS.E.BYPASS.128 [R3], ... ;"
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    return Resources(
        registers=figure("REG"),
        spills=figure("STACK") + figure("LOCAL"),
        shared_bytes=compiled.metadata.shared,
        opcodes=_strip_padding(opcodes),
        text=text,
    )


def _strip_padding(opcodes: list[str]) -> collections.Counter[str]:
    """What follows the final branch-to-self only fills the last instruction cache line."""
    while opcodes and opcodes[-1] in ("NOP", "BRA"):
        opcodes = opcodes[:-1]
    return collections.Counter(opcodes)


def _cuobjdump(cubin: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_NVIDIA_TOOLS / "cuobjdump"), option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        assert match is not None, f"no {name} in the assembly"
        return int(match[1])

    opcodes = re.findall(r"^\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)", text, re.MULTILINE)
    return Resources(
        registers=figure("vgpr_count"),
        # Scalar registers spill into lanes of vector registers, not into memory, so those are not counted.
        spills=figure("vgpr_spill_count") + figure("private_segment_fixed_size"),
        shared_bytes=compiled.metadata.shared,
        opcodes=collections.Counter(opcodes),
        text=text,
    )


@functools.cache
def compiler_version() -> str:
    """Triton and the assembler that it brings: another pair may emit other code."""
    ptxas = subprocess.run([str(_NVIDIA_TOOLS / "ptxas"), "--version"], check=True, capture_output=True, text=True)
    match = re.search(r"\bV([\d.]+)", ptxas.stdout)
    return f"triton {triton.__version__}, ptxas {match[1] if match else 'unknown'}"
