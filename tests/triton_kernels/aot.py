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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import gcn
import hazards
import pytest
import sass
import triton
from flow import Executed
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


@dataclass(frozen=True)
class Multiprocessor:
    """What limits the blocks that are on it at a time."""

    warps: int
    blocks: int
    registers: int  # of 32 bits
    register_unit: int  # in which a thread's registers are handed out
    shared_bytes: int
    reserved_bytes: int  # of shared memory, for each block
    warp_size: int = 32
    parts: int = 4  # that have their own registers


# CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; AMD's CDNA 3 instruction set reference
# and the hardware description of the HIP documentation.
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(64, 32, 65536, 8, 164 * 1024, 1024),
    "sm_90": Multiprocessor(64, 32, 65536, 8, 228 * 1024, 1024),
    "sm_100": Multiprocessor(64, 32, 65536, 8, 228 * 1024, 1024),
    "gfx942": Multiprocessor(32, 32, 131072, 8, 64 * 1024, 0, warp_size=64),
}
CHIPS = {
    # An A100 has 163 KiB, but the consumer chips that run the same configurations have less.
    "sm_80": Chip("sm_80", GPUTarget("cuda", 80, 32), 99 * 1024, r"[HIQ]MMA"),
    "sm_90": Chip("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, r"[HIQ]?G?MMA"),
    "sm_100": Chip("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, r"UT\w*MMA|[HIQ]MMA"),
    "gfx942": Chip("gfx9", GPUTarget("hip", "gfx942", 64), 64 * 1024, r"v_mfma_\w+"),
}
_FIRST_ARGUMENT = {"sm_80": 0x160, "sm_90": 0x210, "sm_100": 0x380}  # in constant bank 0
WIDTH = 768  # of features, for which instructions are counted; 3 more where rows are not aligned
PANEL = 8192  # rows and columns
_NEW_MATRIX = {"sm_90": r"[HIQ]GMMA", "sm_100": r"UT\w*MMA"}
_ATOMICS = r"REDG|RED\.|ATOMG|ATOM\.|global_atomic"
FIGURES = {
    "instructions": "",
    "special_functions": r"MUFU|v_(exp|log|rcp|rsq|sqrt|sin|cos)_",
    "global_memory": r"LDG\b|STG|LDGSTS|UTMALDG|UTMASTG|(global|buffer)_(load|store)",
    "shared_memory": r"LDS|STS|LDTM|STTM|ds_(read|write)",
}
KINDS = ("half", "tf32", "ieee")  # of matrix product


@dataclass(frozen=True)
class Resources:
    """Of one thread, but for ``shared_bytes`` (of the block)."""

    registers: int
    spills: int  # to memory: bytes of stack and local memory on NVIDIA; on AMD also vector registers spilled
    shared_bytes: int
    has_atomics: bool
    listing: Callable[[], str]  # what prints the machine code
    opcode: str  # regular expression for a line of it, with the opcode in a group
    tensor_columns: int  # of the block, in the tensor memory of sm_100
    arguments: dict[str, tuple[int, int]]  # those that are known at run time: offset among them, and bytes
    num_warps: int

    @functools.cached_property
    def text(self) -> str:
        """The machine code; printed when it is first asked for, because a disassembler takes a third of a second."""
        return self.listing()

    @functools.cached_property
    def opcodes(self) -> collections.Counter[str]:
        """Static counts, with modifiers."""
        return _strip_padding(re.findall(self.opcode, self.text, re.MULTILINE))

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
    return read(compiled, _layout({name: types[name] for name in names if name in types}), num_warps)


def _layout(types: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Offset and bytes of each argument, aligned as in C."""
    places, at = {}, 0
    for name, kind in types.items():
        if kind.startswith("tensordesc"):  # the descriptor itself, and what it was made of
            at = -(-at // 64) * 64
            places[name] = at, 128
            at += 128 + 2 * 4 + 2 * 8
            continue
        size = 4 if kind in ("i32", "fp32") else 8
        at = -(-at // size) * size
        places[name] = at, size
        at += size
    return places


def _read_nvidia(compiled: Any, arguments: dict[str, tuple[int, int]], num_warps: int) -> Resources:
    used = _cuobjdump(compiled.asm["cubin"], "-res-usage")

    def figure(name: str) -> int:
        match = re.search(rf"\b{name}:(\d+)", used)
        assert match is not None, f"no {name} in what cuobjdump prints"
        return int(match[1])

    return Resources(
        registers=figure("REG"),
        spills=figure("STACK") + figure("LOCAL"),
        shared_bytes=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        has_atomics=re.search(r"\b(atom|red)\.", compiled.asm["ptx"]) is not None,
        listing=lambda: _disassemble(compiled.asm["cubin"]),
        # "        /*0120*/              @!P0 LDGSTS.E.BYPASS.128 [R3], ... ;"
        opcode=r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)",
        arguments=arguments,
        num_warps=num_warps,
    )


def _strip_padding(opcodes: list[str]) -> collections.Counter[str]:
    """What follows the final branch-to-self only fills the last instruction cache line."""
    while opcodes and opcodes[-1] in ("NOP", "BRA"):
        opcodes = opcodes[:-1]
    return collections.Counter(opcodes)


def _disassemble(cubin: bytes) -> str:
    return _cuobjdump(cubin, "-sass")


def _cuobjdump(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_NVIDIA_TOOLS / "cuobjdump"), what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _read_amd(compiled: Any, arguments: dict[str, tuple[int, int]], num_warps: int) -> Resources:
    text = compiled.asm["amdgcn"]

    def figure(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        assert match is not None, f"no {name} in the assembly"
        return int(match[1])

    return Resources(
        registers=figure("vgpr_count"),
        # Scalar registers spill into lanes of vector registers, not into memory, so those are not counted.
        spills=figure("vgpr_spill_count") + figure("private_segment_fixed_size"),
        shared_bytes=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", 0) or 0,
        has_atomics=re.search(r"^\s+(global|flat|buffer)_atomic", text, re.MULTILINE) is not None,
        listing=lambda: text,
        opcode=r"^\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)",
        arguments=arguments,
        num_warps=num_warps,
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
    assert not made.has_atomics


def assert_sizes_do_not_recompile(kernel: Any, names: Iterable[str]) -> None:
    parameters = {p.name: p for p in kernel.params}
    for name in names:
        assert parameters[name].do_not_specialize
        assert parameters[name].annotation_type == "i64"  # whatever the value, which otherwise picks the type


def blocks_per_multiprocessor(made: Resources, chip: str) -> int:
    """How many blocks a multiprocessor holds at a time."""
    has = MULTIPROCESSORS[chip]
    registers = -(-made.registers // has.register_unit) * has.register_unit
    warps = has.parts * min(has.warps // has.parts, has.registers // has.parts // (registers * has.warp_size))
    limits = [has.blocks, warps // made.num_warps]
    if made.shared_bytes + has.reserved_bytes:
        limits.append(has.shared_bytes // (made.shared_bytes + has.reserved_bytes))
    if made.tensor_columns:
        limits.append(512 // made.tensor_columns)
    return min(limits)


@dataclass(frozen=True)
class Launch:
    """Of a kernel: what decides the way that one of its programs takes."""

    arguments: Mapping[str, int]  # the integers; pointers need no value
    elements: int  # of the program's share of the work, by which counts are divided
    program: tuple[int, int, int] = (0, 0, 0)
    exponentials: float = 0  # of an element, at least


def panel_launch(config: Any, aligned: bool, exponentials: float = 0) -> Launch:
    """Of a kernel that visits a panel tile by tile: a tile that meets neither an edge nor a diagonal."""
    width = WIDTH if aligned else WIDTH + 3
    sizes = dict.fromkeys(("m", "n", "stride_gm"), PANEL) | dict.fromkeys(("D", "stride_xm", "stride_yn"), width)
    diagonals = {"diagonal": 0, "positive": 0, "excluded": PANEL}
    strides = {"stride_xd": 1, "stride_yd": 1}
    return Launch(sizes | diagonals | strides, config.block_m * config.block_n, (5, 0, 0), exponentials)


def operand_types(config: Any, dtype: str, aligned: bool) -> dict[str, str]:
    """How the launcher of such a kernel hands over features and gradient tile: the types that go with DESCRIPTORS."""
    if not (aligned and config.descriptors):
        return dict.fromkeys(("X", "Y", "GRAD"), f"*{dtype}")
    width = config.block_n // 2 if config.halves else config.block_n
    blocks = {"X": (config.block_m, config.block_d), "Y": (config.block_n, config.block_d)}
    blocks |= {"GRAD": (config.block_m, width)}
    return {name: f"tensordesc<{dtype}[{rows}, {columns}]>" for name, (rows, columns) in blocks.items()}


def execute(made: Resources, chip: str, launch: Launch) -> Executed:
    """Follow the usual way of one program through the code."""
    words: dict[int, int] = {}
    for number, (name, (at, size)) in enumerate(made.arguments.items()):
        value = launch.arguments.get(name, number + 1 << 40 if size == 8 else None)
        if value is not None:
            words |= {at + 4 * i: value >> 32 * i & 0xFFFFFFFF for i in range(size // 4)}
    if chip == "gfx942":
        exponentials = launch.exponentials * launch.elements / CHIPS[chip].target.warp_size
        return gcn.run(made.text, words, launch.program, made.num_warps, exponentials)
    first = _FIRST_ARGUMENT[chip]
    if any(size == 128 for _, size in made.arguments.values()):
        first = -(-first // 64) * 64
    return sass.run(made.text, {first + at: word for at, word in words.items()}, launch.program, made.num_warps)


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
    def launch(self) -> Launch:
        """Of the usual program of a usual launch."""
        raise NotImplementedError

    @property
    def elements_per_thread(self) -> float:
        threads = self.config.num_warps * CHIPS[self.chip].target.warp_size
        return float(self.config.block_m * self.config.block_n / threads)

    def per_element(self, pattern: str = "") -> float:
        """Instructions of a thread, executed for an element of the launch, whose opcode matches ``pattern``."""
        per = CHIPS[self.chip].target.warp_size / self.launch.elements
        return float(executed(self).count(pattern) * per)

    @property
    def figures(self) -> dict[str, float]:
        return {name: self.per_element(pattern) for name, pattern in FIGURES.items()}

    def record(self) -> dict[str, Any]:
        """All that the budget and the report say of it."""
        made, run = compiled(self), executed(self)
        per = CHIPS[self.chip].target.warp_size / self.launch.elements
        products = [opcode for opcode in run.opcodes if re.match(CHIPS[self.chip].matrix, opcode)]
        return {
            **{name: round(figure, 2) for name, figure in self.figures.items()},
            **{phase: round(run.phases[phase] * per, 2) for phase in ("before", "loop", "after")},
            "undecided": len(run.undecided),
            "registers": made.registers,
            "spills": made.spills,
            "shared_bytes": made.shared_bytes,
            "blocks": blocks_per_multiprocessor(made, self.chip),
            "matrix": max(products, key=run.opcodes.__getitem__) if products else "",
        }

    @property
    def intended_blocks(self) -> int:
        """Of a multiprocessor, at least."""
        return 1

    def check_resources(self) -> Resources:
        """What every such kernel must fulfil. Returns the resources, for what is asked of some of them only."""
        problems = self.problems()
        assert not problems, "; ".join(problems)
        return compiled(self)

    def problems(self) -> list[str]:
        """What is wrong with the compiled kernel, with any version of Triton."""
        chip, made = CHIPS[self.chip], compiled(self)
        blocks = blocks_per_multiprocessor(made, self.chip)
        wrong = {
            f"spills {made.spills} bytes, of {made.registers} registers": made.spills > 0,
            "uses atomics": made.has_atomics or made.count(_ATOMICS) > 0,
            f"{made.shared_bytes} bytes of shared memory": made.shared_bytes > chip.shared_bytes,
            f"{blocks} blocks on a multiprocessor, not {self.intended_blocks}": blocks < self.intended_blocks,
            "logarithms": made.count(r"MUFU\.LG2|v_log_f32") > 0,
        }
        if self.kind in KINDS:
            on_tensor_cores, products = self.kind != "ieee", made.count(chip.matrix)
            if self.chip == "gfx942":  # its matrix unit also multiplies fp32 exactly
                in_tf32 = made.count(r"v_mfma_f32_\w*_xf32") > 0
                wrong |= {"no matrix products": products == 0, "another precision": in_tf32 != (self.kind == "tf32")}
            else:
                wrong["matrix products that are not to be, or none"] = (products > 0) != on_tensor_cores
            if self.chip in _NEW_MATRIX and on_tensor_cores:  # their own path, not that of older chips
                is_new = made.count(_NEW_MATRIX[self.chip]) > 0 and made.count(r"[HIQ]MMA") == 0
                wrong["the matrix instructions of older chips"] = not is_new
        found = [problem for problem, holds in wrong.items() if holds]
        return found + (list(map(str, hazards.find(made.text))) if self.chip == "sm_90" else [])


@functools.cache
def compiled(case: Case) -> Resources:
    return case.build()


@functools.cache
def executed(case: Case) -> Executed:
    return execute(compiled(case), case.chip, case.launch)


class Budget:
    """What each case executes per element, as recorded with one compiler in <op>_budget.json."""

    def __init__(self, op: str) -> None:
        self.path = pathlib.Path(__file__).with_name(f"{op}_budget.json")

    def check(self, case: Case) -> None:
        recorded = json.loads(self.path.read_text())
        if recorded["compiler"] != compiler_version():
            pytest.skip(f"recorded with {recorded['compiler']}, this is {compiler_version()}")
        figures = recorded["cases"][str(case)]
        assert case.figures == pytest.approx({name: figures[name] for name in FIGURES}, rel=0.05, abs=0.01)
        assert blocks_per_multiprocessor(compiled(case), case.chip) >= figures["blocks"]

    def write(self, cases: Iterable[Case]) -> None:
        lines = ",\n".join(f"    {json.dumps(str(case))}: {json.dumps(case.record())}" for case in cases)
        compiler = json.dumps(compiler_version())
        self.path.write_text(f'{{\n  "compiler": {compiler},\n  "cases": {{\n{lines}\n  }}\n}}\n')


def config_of_the_usual_chip(case: Case) -> object:
    """Of Hopper each configuration is compiled in `make test`; of the other chips, what covers their parameters."""
    return case.config if case.chip == "sm_90" else None
