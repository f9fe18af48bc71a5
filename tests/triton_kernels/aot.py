"""Compile a Triton kernel for a chip that is not there, read what it will cost from the binary, and judge that.

`build` runs Triton's own pipeline down to the machine code (ptxas for NVIDIA, LLVM for AMD) and reads registers,
spills, shared memory and the instruction mix from that code. Compilation alone proves little: a kernel that asks for
more shared memory than the chip has, or that spills, compiles without a word. `Case.check_resources` looks for that
in a kernel of tiles, and `Budget` keeps its code from growing unseen.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_NVIDIA_TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Chip:
    """What the assertions need to know of a chip."""

    family: str  # whose configurations it runs
    target: GPUTarget
    shared_bytes: int  # at most, of one block
    matrix: str  # regular expression for the opcode of a matrix product


CHIPS = {
    # An A100 has 163 KiB, but the consumer chips that run the same configurations have less.
    "sm_80": Chip("sm_80", GPUTarget("cuda", 80, 32), 99 * 1024, r"[HIQ]MMA"),
    "sm_90": Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, r"[HIQ]?G?MMA"),
    "sm_100": Chip("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, r"UT\w*MMA|[HIQ]MMA"),
    "gfx942": Chip("gfx9", GPUTarget("hip", "gfx942", 64), 64 * 1024, r"v_mfma_\w+"),
}
KINDS = ("half", "tf32", "ieee")  # of matrix product


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
    divisible: Iterable[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> Resources:
    """Compile ``kernel``.

    Args:
        kernel: a function decorated by ``triton.jit`` (TRITON_INTERPRET must be unset).
        chip: one of CHIPS.
        types: argument name to Triton type ("*bf16", "i32"), for arguments that are known at run time.
        constants: argument name to value: ``tl.constexpr`` parameters, and arguments that the launcher makes constant
            (None, or a stride of 1), whatever ``types`` has for them.
        divisible: names of arguments whose value or address is a multiple of 16, as the launcher would find.
        num_warps: of a block.
        num_stages: of the software pipeline.
    """
    names = kernel.arg_names
    types = {name: kind for name, kind in types.items() if name not in constants}
    signature = {name: types.get(name, "constexpr") for name in names}
    missing = [name for name in names if name not in types and name not in constants]
    if missing:
        raise ValueError(f"neither a type nor a value for {missing}")
    hints = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name in types and name in divisible}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    compiled = triton.compile(source, target=chip.target, options={"num_warps": num_warps, "num_stages": num_stages})
    read = _read_amd if chip.target.backend == "hip" else _read_nvidia
    return read(compiled)


def _read_nvidia(compiled: Any) -> Resources:
    text = _disassemble(compiled.asm["cubin"])

    def figure(name: str) -> int:
        match = re.search(rf"\b{name}:(\d+)", text)
        assert match is not None, f"no {name} in what cuobjdump prints"
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


def _disassemble(cubin: bytes) -> str:
    """The use of resources, and the code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_NVIDIA_TOOLS / "cuobjdump"), "-res-usage", "-sass", file.name]
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


def assert_sound(made: Resources) -> None:
    """Nothing spills, and no result depends on the order in which programs run."""
    assert made.spills == 0
    assert made.count(r"REDG|RED\.|ATOMG|ATOM\.|global_atomic") == 0


def assert_sizes_do_not_recompile(kernel: Any, names: Iterable[str]) -> None:
    parameters = {p.name: p for p in kernel.params}
    for name in names:
        assert parameters[name].do_not_specialize
        assert parameters[name].annotation_type == "i64"  # whatever the value, which otherwise picks the type


@dataclass(frozen=True)
class Case:
    """A kernel of tiles as the launcher would specialise it. Its fields are its name, and its key in the budget."""

    chip: str
    kind: str  # one of KINDS

    def __str__(self) -> str:
        return "-".join(astuple(self))

    @property
    def config(self) -> Any:
        """The shipped configuration that the launcher would choose."""
        raise NotImplementedError

    def build(self) -> Resources:
        raise NotImplementedError

    @property
    def elements_per_thread(self) -> float:
        threads = self.config.num_warps * CHIPS[self.chip].target.warp_size
        return self.config.block_m * self.config.block_n / threads

    @property
    def instructions_per_element(self) -> float:
        """Static: loops count once, and rare tiles count as much as the usual ones."""
        return compiled(self).instructions / self.elements_per_thread

    def check_resources(self) -> Resources:
        """What every such kernel must fulfil. Returns the resources, for what is asked of some of them only."""
        chip, made = CHIPS[self.chip], compiled(self)
        assert_sound(made)
        assert made.shared_bytes <= chip.shared_bytes
        products = made.count(chip.matrix)
        if self.chip == "gfx942":  # its matrix unit also multiplies fp32 exactly
            assert products > 0
            assert (made.count(r"v_mfma_f32_\w*_xf32") > 0) == (self.kind == "tf32")
        else:
            assert (products > 0) == (self.kind != "ieee")
        assert made.count(r"MUFU\.LG2|v_log_f32") == 0
        return made


@functools.cache
def compiled(case: Case) -> Resources:
    return case.build()


class Budget:
    """The size of the code of each case, as recorded with one compiler in <op>_budget.json."""

    def __init__(self, op: str) -> None:
        self.path = pathlib.Path(__file__).with_name(f"{op}_budget.json")

    def check(self, case: Case) -> None:
        recorded = json.loads(self.path.read_text())
        if recorded["compiler"] != compiler_version():
            pytest.skip(f"recorded with {recorded['compiler']}, this is {compiler_version()}")
        figure = recorded["instructions_per_element"][str(case)]
        assert case.instructions_per_element == pytest.approx(figure, rel=0.05)

    def write(self, cases: Iterable[Case]) -> None:
        figures = {str(case): round(case.instructions_per_element, 1) for case in cases}
        record = {"compiler": compiler_version(), "instructions_per_element": figures}
        self.path.write_text(json.dumps(record, indent=2) + "\n")
