"""The gate over the registers of asynchronous products: it fires on the published fault, and is silent elsewhere.

The fault is made here as it was met in the wild: a loop of products whose first factor is converted in registers, which
the next step overwrites. One PTX goes through both assemblers that Triton brings. That of CUDA 12.9 overwrites the
registers before the wait; that of 13.3 does not.
"""

from __future__ import annotations

import pathlib
import re
import subprocess

import aot
import hazards
import pytest
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def _converted_kernel(A, B, C, K, BLOCK: tl.constexpr):
    row, col = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    a_at, b_at = A + row[:, None] * K + col[None, :], B + row[:, None] * BLOCK + col[None, :]
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(0, K, BLOCK):
        a = tl.load(a_at).to(tl.bfloat16)
        total = tl.dot(a, tl.load(b_at), total)
        a_at += BLOCK
        b_at += BLOCK * BLOCK
    tl.store(C + row[:, None] * BLOCK + col[None, :], total)


@pytest.fixture(scope="module")
def ptx() -> str:
    names = _converted_kernel.arg_names
    signature = {"A": "*i8", "B": "*bf16", "C": "*fp32", "K": "i32", "BLOCK": "constexpr"}
    hints = {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if name != "BLOCK"}
    source = ASTSource(fn=_converted_kernel, signature=signature, constexprs={"BLOCK": 64}, attrs=hints)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "num_stages": 2})
    return made.asm["ptx"]


def assembler_version(name: str) -> tuple[int, ...]:
    tool = aot._NVIDIA_TOOLS / name
    told = subprocess.run([tool, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"release (\d+)\.(\d+)", told)
    assert match is not None
    return int(match[1]), int(match[2])


@pytest.mark.parametrize("assembler", ["ptxas", "ptxas-blackwell"])
def test_the_published_fault_is_found_where_the_assembler_has_it(
    ptx: str, assembler: str, tmp_path: pathlib.Path
) -> None:
    version = assembler_version(assembler)
    if (12, 9) < version < (13, 3):
        pytest.skip(f"nothing is known of CUDA {version}")
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(ptx)
    subprocess.run([aot._NVIDIA_TOOLS / assembler, "-arch=sm_90a", "-o", cubin, source], check=True)
    listing = aot._disassemble(cubin.read_bytes())
    assert hazards.products_from_registers(listing) == 4
    assert bool(hazards.find(listing)) == (version <= (12, 9))


def listing(*lines: str) -> str:
    """As cuobjdump prints instructions, 16 bytes each."""
    return "\n".join(f"        /*{16 * k:04x}*/    {line} ;    /* 0x0 */" for k, line in enumerate(lines))


PRODUCT = "HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8], R24"
CLOSED = f"{PRODUCT}, gsb0"
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
WRITE = "IADD3 R6, R0, 0x1, RZ"


@pytest.mark.parametrize(
    ("code", "written"),
    [
        ([CLOSED, WAIT, WRITE], []),
        ([CLOSED, WRITE, WAIT], [1]),
        ([CLOSED, "@P0 IADD3 R6, R0, 0x1, RZ", WAIT], [1]),
        ([CLOSED, "LDS.128 R4, [R0]", WAIT], [1]),
        ([CLOSED, "LDS.64 R2, [R0]", WAIT], []),  # the registers below
        ([CLOSED, "IADD3 R8, R0, 0x1, RZ", WAIT], []),  # and above
        ([CLOSED, "ISETP.NE.AND P0, PT, R6, R7, PT", "STS.64 [R6], R4", WAIT], []),  # reads
        ([CLOSED, "SHF.R.U64 R3, R0, 0x1, R1", WAIT], []),
        ([PRODUCT, WAIT, WRITE], [2]),  # a wait for a group that is still open
        ([CLOSED, CLOSED, "WARPGROUP.DEPBAR.LE gsb0, 0x1", WRITE], [3]),  # the second may be at work
        ([CLOSED, "HGMMA.64x64x16.F32.BF16 R56, gdesc[UR8], R56, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1", WRITE], []),
        ([CLOSED, "@P0 WARPGROUP.DEPBAR.LE gsb0, 0x0", WRITE], [2]),
        ([WRITE, CLOSED, "@P0 BRA 0x0", WAIT], [0]),  # round the loop
        ([WAIT, WRITE, CLOSED, "@P0 BRA 0x0", WAIT], []),
        ([CLOSED, "@P0 BRA 0x30", WAIT, WRITE], [3]),  # past the wait
        ([CLOSED, "@P0 BRA 0x30", WAIT, "EXIT", WRITE], []),
        ([CLOSED, "CALL.REL.NOINC 0x40", WAIT, "EXIT", WRITE, "RET.REL.NODEC R2 0x0"], [4]),
        ([CLOSED, "CALL.REL.NOINC 0x50", WRITE, WAIT, "EXIT", "NOP", "RET.REL.NODEC R2 0x0"], [2]),
        (["HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0", WRITE, WAIT], []),
    ],
)  # fmt: skip
def test_each_way_through_the_code_is_followed(code: list[str], written: list[int]) -> None:
    found = hazards.find(listing(*code))
    assert sorted({hazard.writer // 16 for hazard in found}) == written
    assert all(set(hazard.registers) <= {"R4", "R5", "R6", "R7"} for hazard in found)


@pytest.mark.parametrize("jump", ["BRX R2 -0x10", "JMP 0x0", "WARPGROUP.DEPBAR.LE gsb1, 0x0"])
def test_what_cannot_be_followed_is_an_error(jump: str) -> None:
    with pytest.raises(ValueError, match="cannot follow"):
        hazards.find(listing(CLOSED, jump, WAIT))
