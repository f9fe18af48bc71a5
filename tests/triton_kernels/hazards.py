"""Registers of Hopper's asynchronous products that are written too early, found in the machine code.

An HGMMA may take its first factor from registers. It returns before the tensor cores have read them, so nothing may
write these registers until a wait covers the product. ptxas up to CUDA 12.9 breaks that rule at times; 13.3's does not.
What comes out then depends on timing: no test of values would find it reliably.

In the listing a product with "gsb0" among its operands closes a group, and WARPGROUP.DEPBAR.LE gsb0, N waits until at
most the last N groups are still at work. `find` carries the products that may still be reading along every way that the
code can go, back edges of loops, calls and returns included, and reports each instruction that may write a register of
theirs. Predicates are not looked at: an instruction that may write does, and a wait that may not be there is not.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import sass
from sass import Instruction

_PRODUCT = re.compile(r"[HIQB]GMMA\b")
_FROM_REGISTERS = re.compile(r"[HIQB]GMMA\S* R\d+, R\d+,")
_FACTOR_REGISTERS = 4  # of a thread, whatever the type: 64 x 32 bytes over 128 threads
_MOST_GROUPS = 8  # more than a wait can leave
_WRITES_PREDICATES = re.compile(r"\w*SETP\w*\b|U?PLOP3\b|FCHK\b|R2P\b")
_ONE_WORD = re.compile(r"U?SHF\b")  # whatever the width that it shifts
_KNOWN_FLOW = ("BRA", "EXIT", "RET", "CALL", "BPT")
_UNKNOWN_FLOW = re.compile(r"(BRX|BRXU|JMP|JMX|JMXU|BRK|CONT|PBK|SSY|LEPC|RPCMOV)\b")

_Pending = frozenset[tuple[int, int]]  # products by their place, and how many groups have been closed since


@dataclass(frozen=True)
class Hazard:
    product: int  # byte addresses in the listing
    writer: int
    registers: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"{', '.join(self.registers)} of the product at {self.product:#x}, at {self.writer:#x}: {self.text}"


def factor_registers(instruction: Instruction) -> tuple[str, ...]:
    """Those of the first factor of an asynchronous product, if it comes from registers."""
    if not _PRODUCT.match(instruction.opcode) or not re.fullmatch(r"R\d+", instruction.operands[1]):
        return ()
    first = int(instruction.operands[1][1:])
    return tuple(f"R{first + i}" for i in range(_FACTOR_REGISTERS))


def products_from_registers(text: str) -> int:
    return len(_FROM_REGISTERS.findall(text))


def find(text: str) -> list[Hazard]:
    """Every write of a factor's register that no wait comes before, in what cuobjdump prints of one kernel."""
    if not _FROM_REGISTERS.search(text):
        return []
    code = sass.parse(text)
    factors = {at: frozenset(registers) for at, i in enumerate(code) if (registers := factor_registers(i))}
    written = [frozenset(_registers_written(instruction)) for instruction in code]
    returns = tuple(at + 1 for at, instruction in enumerate(code) if instruction.name == "CALL")
    entry: dict[int, _Pending] = {0: frozenset()}
    waiting, found = collections.deque([0]), set()
    while waiting:
        at = waiting.popleft()
        for product, _ in entry[at]:
            if registers := factors[product] & written[at]:
                names = tuple(sorted(registers, key=lambda name: int(name[1:])))
                found.add(Hazard(16 * product, 16 * at, names, repr(code[at])))
        after = _after(code[at], at, entry[at], at in factors)
        for there in _successors(code, at, returns):
            known = entry.get(there)
            if known is None or not after <= known:
                entry[there] = after if known is None else known | after
                waiting.append(there)
    return sorted(found, key=lambda hazard: (hazard.product, hazard.writer))


def _after(instruction: Instruction, at: int, pending: _Pending, reads_registers: bool) -> _Pending:
    if _PRODUCT.match(instruction.opcode):
        if reads_registers:
            pending |= {(at, 0)}
        if "gsb0" in instruction.operands:
            return frozenset((product, min(groups + 1, _MOST_GROUPS)) for product, groups in pending)
        return pending
    if instruction.opcode.startswith("WARPGROUP.DEPBAR") and not instruction.guard:
        name, left = instruction.operands
        if name != "gsb0" or instruction.opcode != "WARPGROUP.DEPBAR.LE":
            raise ValueError(f"cannot follow {instruction!r}")
        return frozenset((product, groups) for product, groups in pending if groups <= int(left, 0))
    return pending


def _registers_written(instruction: Instruction) -> Iterator[str]:
    if not _WRITES_PREDICATES.match(instruction.opcode):
        registers = [name for name in instruction.written if re.fullmatch(r"R\d+", name)]
        yield from registers[:1] if _ONE_WORD.match(instruction.opcode) else registers


def _successors(code: Sequence[Instruction], at: int, returns: tuple[int, ...]) -> tuple[int, ...]:
    """Wherever the code may go on; from a return, behind every call."""
    instruction = code[at]
    if _UNKNOWN_FLOW.match(instruction.opcode):
        raise ValueError(f"cannot follow {instruction!r}")
    onward = (at + 1,) if at + 1 < len(code) else ()
    name = instruction.name
    if name not in _KNOWN_FLOW:
        return onward
    conditional = bool(instruction.guard) or (name == "BRA" and len(instruction.operands) > 1)
    targets = returns if name == "RET" else () if name in ("EXIT", "BPT") else (sass._target(instruction),)
    return (*onward, *targets) if conditional else targets
