"""Which instructions of an NVIDIA binary run, and how often; see flow.py for what is followed and what is not."""

from __future__ import annotations

import contextlib
import functools
import operator
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flow import MASK_32, MASK_64, MOST_STEPS, Executed, UnknownError, shorter_way, signed


class Instruction:
    """One line of the listing."""

    def __init__(self, guard: str, opcode: str, operands: Sequence[str]) -> None:
        self.guard = guard  # "", or a predicate as written: "!P0"
        self.opcode = opcode  # with modifiers
        self.operands = tuple(operands)
        self.modifiers = tuple(opcode.split("."))
        self.name = self.modifiers[0]
        self.written = tuple(_written(opcode, self.operands))  # registers and predicates

    def __repr__(self) -> str:
        return f"@{self.guard or 'PT'} {self.opcode} {', '.join(self.operands)}"


def parse(text: str) -> list[Instruction]:
    """The instructions of the first function in what cuobjdump prints; each takes 16 bytes."""
    # "        /*0120*/              @!P0 LDGSTS.E.BYPASS.128 [R3], desc[UR4][R2.64], P1 ;"
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?\w+)\s+)?([A-Z]\w*(?:\.\w*)*)\s*([^;]*);", text, re.MULTILINE)
    return [Instruction(guard, opcode, tuple(_operands(rest))) for guard, opcode, rest in found]


def _operands(text: str) -> Iterable[str]:
    return (part.strip().removesuffix(".reuse") for part in text.split(",")) if text.strip() else ()


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _bits(value: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", value))[0])


@functools.lru_cache(1 << 16)
def _next(register: str, by: int = 1) -> str:
    """The register behind this one, for values of several words."""
    if register in ("RZ", "URZ"):
        return register
    kind, number = re.fullmatch(r"(U?R)(\d+)", register).groups()  # type: ignore[union-attr]
    return f"{kind}{int(number) + by}"


@functools.lru_cache(1 << 16)
def _is_register(text: str) -> bool:
    return re.fullmatch(r"U?R(\d+|Z)", text) is not None


@functools.lru_cache(1 << 16)
def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", text) is not None


_WRITES_NOTHING = re.compile(
    r"(ST|STG|STS|STL|STSM|STTM|LDGSTS|LDGDEPBAR|DEPBAR|BAR|NOP|BSSY|BSYNC|BREAK|WARPSYNC|WARPGROUP|FENCE|MEMBAR|ERRBAR"
    r"|CCTL|NANOSLEEP|BPT|YIELD|UTC\w*|UTMA\w*|UCGABAR\w*|ACQBULK|ENDCOLLECTIVE|UVIRTCOUNT)\b"
)


def _written(opcode: str, operands: Sequence[str]) -> Iterator[str]:
    """Whatever an instruction may write, for want of a rule."""
    if _WRITES_NOTHING.match(opcode) and not opcode.startswith("UTCATOMSWS"):
        return
    words = 1
    if match := re.search(r"MMA\.64x(\d+)x", opcode):
        words = int(match[1]) // 2
    elif match := re.search(r"\.x(\d+)$", opcode):
        words = int(match[1])
    elif re.search(r"128|MMA|LDSM", opcode):
        words = 4
    elif re.search(r"64|WIDE|CS2R|^(F(ADD|MUL|FMA)2|D(ADD|MUL|FMA))\b", opcode):
        words = 2
    for operand in operands:
        if _is_predicate(operand):
            if operand not in ("PT", "UPT"):
                yield operand.removeprefix("!")
            continue
        if _is_register(operand) and operand not in ("RZ", "URZ"):
            yield from (_next(operand, i) for i in range(words))
        break


@functools.lru_cache(1 << 16)
def _source(text: str, high: bool) -> tuple[str, str, bool, Any]:
    """What a source operand is, its sign, whether it is absolute; and the place of a constant, the value of a number or
    the name of a register."""
    sign, text = (text[0], text[1:]) if text[0] in "-~" and not re.match(r"-(0x|\d|INF)", text) else ("", text)
    absolute = text.startswith("|")
    text = text.strip("|").removesuffix(".64").removesuffix(".H0_H0")
    if text.startswith("c["):
        match = re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", text)
        return "constant", sign, absolute, int(match[1], 16) + 4 * high if match else -1
    if re.match(r"-?(0x)?\d", text) and "." not in text:
        return "number", sign, absolute, int(text, 0) & MASK_32 if not high else (MASK_32 if text[0] == "-" else 0)
    if _is_register(text):
        return "register", sign, absolute, _next(text) if high else text
    return "unknown", sign, absolute, None


class _Lane:
    """One lane: its registers, and what reads and writes them."""

    def __init__(self, constants: Mapping[int, int], special: Mapping[str, int]) -> None:
        self.known: dict[str, int] = {"RZ": 0, "URZ": 0, "PT": 1, "UPT": 1}
        self.constants, self.special = constants, special

    def word(self, text: str, high: bool = False) -> int:
        """A source operand of 32 bits; with ``high`` the word above it. A negated one may be 2^32, so that it carries
        as the hardware does."""
        kind, sign, absolute, what = _source(text, high)
        if kind == "constant":
            if what not in self.constants:
                raise UnknownError
            value = self.constants[what]
        elif kind == "number":
            value = what
        elif kind == "register":
            value = self._get(what)
        else:
            raise UnknownError
        if absolute:
            value = abs(signed(value))
        return (1 << 32) - value if sign == "-" else value ^ MASK_32 if sign == "~" else value

    def wide(self, text: str) -> int:
        """A source operand of 64 bits."""
        return self.word(text) | self.word(text, high=True) << 32

    def predicate(self, text: str) -> int:
        return self._get(text.removeprefix("!")) ^ text.startswith("!")

    def holds(self, guard: str) -> bool:
        """Whether the predicate is known to be true, or there is none."""
        return not guard or self.known.get(guard.removeprefix("!")) == (guard[0] != "!")

    def _get(self, name: str) -> int:
        if name not in self.known:
            raise UnknownError
        return self.known[name]

    def put(self, name: str, value: int | None) -> None:
        if name in ("RZ", "URZ", "PT", "UPT"):
            return
        if value is None:
            self.known.pop(name, None)
        else:
            self.known[name] = value & (1 if "P" in name else MASK_32)

    def put_wide(self, name: str, value: int) -> None:
        self.put(name, value)
        self.put(_next(name), value >> 32)


Rule = Callable[[_Lane, tuple[str, ...], tuple[str, ...]], None]  # lane, operands, modifiers
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, rule))
        return rule

    return add


@functools.lru_cache(1 << 16)
def _split(operands: tuple[str, ...]) -> tuple[str, tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(destination, predicates written behind it, sources, predicates read at the end)."""
    destination, *rest = operands
    written = []
    while _is_predicate(rest[0]):
        written.append(rest.pop(0))
    read: list[str] = []
    while rest and _is_predicate(rest[-1]):
        read.insert(0, rest.pop())
    return destination, tuple(written), tuple(rest), tuple(read)


@_rule("MOV", "UMOV", "R2UR", "S2R", "S2UR", "LDC", "ULDC", "LDCU", "CS2R", "REDUX")
def _move(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, _, (source, *_), _ = _split(operands)
    if source.startswith("SR"):
        value = lane.special.get(source)
        if value is None:
            raise UnknownError
        lane.put(destination, value)
        if "CS2R" in modifiers and "32" not in modifiers:
            lane.put(_next(destination), 0)
        return
    words = 4 if "128" in modifiers else 2 if "64" in modifiers else 1
    if words == 1:
        lane.put(destination, lane.word(source))
        return
    at = int(source[source.rindex("[") + 3 : -1], 16)
    for i in range(words):
        lane.put(_next(destination, i) if i else destination, lane.constants.get(at + 4 * i))


@_rule("IMAD", "UIMAD")
def _multiply_add(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, written, (a, b, c), read = _split(operands)
    carry = lane.predicate(read[0]) if "X" in modifiers and read else 0
    if "WIDE" in modifiers or "HI" in modifiers:
        x, y = lane.word(a) & MASK_32, lane.word(b) & MASK_32
        if "U32" not in modifiers:
            x, y = signed(x), signed(y)
        total = ((x * y) & MASK_64) + lane.wide(c) + carry
        if "HI" in modifiers:
            lane.put(destination, total >> 32)
        else:
            lane.put_wide(destination, total)
            if written:
                lane.put(written[0], total >> 64)
        return
    product = 0 if "RZ" in a + b else lane.word(a) * lane.word(b)
    lane.put(destination, product + lane.word(c) + carry)


@_rule("IADD3", "UIADD3", "VIADD")
def _add(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, written, sources, read = _split(operands)
    if "64" in modifiers:
        total = sum(lane.wide(s) if s[0] != "-" else (1 << 64) - lane.wide(s[1:]) for s in sources)
        lane.put_wide(destination, total)
        shift = 64
    else:
        total = sum(lane.word(s) for s in sources)
        total += sum(lane.predicate(p) for p in read) if "X" in modifiers else 0
        lane.put(destination, total)
        shift = 32
    for i, name in enumerate(written):
        lane.put(name, int(total >> shift > i))


@_rule("LEA", "ULEA")
def _shift_and_add(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, written, sources, read = _split(operands)
    shift = int(sources[-1], 0)
    if "HI" in modifiers:
        low = lane.word(sources[0]) & MASK_32
        high = signed(low) >> 31 if "SX32" in modifiers else lane.word(sources[2])
        part = ((high << 32 | low) << shift >> 32) & MASK_32
    else:
        part = lane.word(sources[0]) << shift & MASK_32
    total = part + lane.word(sources[1]) + (lane.predicate(read[0]) if "X" in modifiers else 0)
    lane.put(destination, total)
    if written:
        lane.put(written[0], total >> 32)


@_rule("SHF", "USHF")
def _shift(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, low, by, high = operands
    shift = lane.word(by) & (63 if "U64" in modifiers or "S64" in modifiers else 31 if "W" in modifiers else MASK_32)
    if "L" in modifiers:
        if "HI" in modifiers:
            pair = lane.word(high) << 32 | lane.word(low)
            lane.put(destination, pair << min(shift, 64) >> 32)
        else:
            lane.put(destination, lane.word(low) << min(shift, 32))
        return
    top = lane.word(high)
    top = signed(top) if "S32" in modifiers or "S64" in modifiers else top
    if "HI" in modifiers:
        lane.put(destination, top >> min(shift, 63))
    else:
        lane.put(destination, (top << 32 | lane.word(low)) >> min(shift, 63))


def _lookup(table: int, a: int, b: int, c: int, bits: int) -> int:
    full = (1 << bits) - 1
    result = 0
    for i in range(8):
        if table >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) & full
    return result


def _depends(table: int) -> tuple[bool, bool, bool]:
    """On which of its three inputs a table depends."""
    return (
        table >> 4 != table & 15,
        any((table >> i & 1) != (table >> (i ^ 2) & 1) for i in range(8)),
        any((table >> i & 1) != (table >> (i ^ 1) & 1) for i in range(8)),
    )


@_rule("LOP3", "ULOP3")
def _logic(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    first, *rest = operands
    written = [first] if _is_predicate(first) else []
    destination = rest.pop(0) if written else first
    *sources, table = rest[:4]
    needed = _depends(int(table, 0))
    a, b, c = (lane.word(s) & MASK_32 if need else 0 for s, need in zip(sources, needed, strict=True))
    value = _lookup(int(table, 0), a, b, c, 32)
    lane.put(destination, value)
    if written:
        lane.put(written[0], int(value != 0))


@_rule("PLOP3", "UPLOP3")
def _predicate_logic(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    first, second, *sources, one, other = operands
    for destination, table in ((first, int(one, 0)), (second, int(other, 0))):
        values: list[int] = []
        for source in sources:
            try:
                values.append(lane.predicate(source))
            except UnknownError:
                values.append(-1)
        results = {
            table >> (a << 2 | b << 1 | c) & 1
            for a in ([values[0]] if values[0] >= 0 else [0, 1])
            for b in ([values[1]] if values[1] >= 0 else [0, 1])
            for c in ([values[2]] if values[2] >= 0 else [0, 1])
        }
        lane.put(destination, results.pop() if len(results) == 1 else None)


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "EQ": lambda a, b: a == b,
    "NE": lambda a, b: a != b,
    "LT": lambda a, b: a < b,
    "LE": lambda a, b: a <= b,
    "GT": lambda a, b: a > b,
    "GE": lambda a, b: a >= b,
}


@_rule("ISETP", "UISETP")
def _compare(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    first, second, a, b, *read = operands
    comparison, join = modifiers[1], next(m for m in modifiers if m in ("AND", "OR", "XOR"))
    unsigned = "U32" in modifiers or "U64" in modifiers
    with_predicate = lane.predicate(read[0])
    if read[0] not in ("PT", "UPT") and with_predicate == (join == "OR"):  # whatever is compared
        lane.put(first, with_predicate)
        lane.put(second, with_predicate)
        return
    if "U64" in modifiers or "S64" in modifiers:
        x, y = lane.wide(a), lane.wide(b)
        x, y = (x, y) if unsigned else (signed(x, 64), signed(y, 64))
    else:
        x, y = lane.word(a) & MASK_32, lane.word(b) & MASK_32
        x, y = (x, y) if unsigned else (signed(x), signed(y))
    result = _COMPARISONS[comparison](x, y)
    if "EX" in modifiers:  # of the high words, after that of the low ones
        low = bool(lane.predicate(read[1]))
        if comparison == "NE":
            result = result or low
        elif comparison == "EQ":
            result = result and low
        else:
            result = low if x == y else result
    combine = {"AND": operator.and_, "OR": operator.or_, "XOR": operator.xor}[join]
    lane.put(first, combine(int(result), with_predicate))
    lane.put(second, combine(int(not result), with_predicate))


@_rule("SEL", "USEL", "FSEL")
def _select(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, a, b, which = operands
    lane.put(destination, lane.word(a if lane.predicate(which) else b))


@_rule("IMNMX", "VIMNMX")
def _extreme(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, _, (a, b), (smaller,) = _split(operands)
    if "64" in "".join(modifiers):
        raise UnknownError
    x, y = lane.word(a) & MASK_32, lane.word(b) & MASK_32
    key = (lambda v: v) if "U32" in modifiers else signed
    lane.put(destination, min(x, y, key=key) if lane.predicate(smaller) else max(x, y, key=key))


@_rule("IABS")
def _absolute(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    lane.put(operands[0], abs(signed(lane.word(operands[1]) & MASK_32)))


@_rule("SGXT", "USGXT")
def _extend(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, source, bits = operands
    width = lane.word(bits)
    value = lane.word(source) & ((1 << width) - 1)
    lane.put(destination, value if "U32" in modifiers else signed(value, width))


@_rule("PRMT")
def _permute(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, low, how, high = operands
    selector = lane.word(how)
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    pair = lane.word(low) if any(n & 4 == 0 for n in nibbles) else 0
    pair |= lane.word(high) << 32 if any(n & 4 for n in nibbles) else 0
    value = 0
    for i, nibble in enumerate(nibbles):
        byte = pair >> 8 * (nibble & 7) & 255
        value |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    lane.put(destination, value)


@_rule("P2R")
def _pack_predicates(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, _, source, mask = operands
    bits, value = lane.word(mask), lane.word(source)
    for i in range(7):
        if bits >> i & 1:
            value = value & ~(1 << i) | lane.predicate(f"P{i}") << i
    lane.put(destination, value)


@_rule("ELECT")
def _elect(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    lane.put(operands[0], 1)


@_rule("SYNCS", "UTCATOMSWS")
def _succeed(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    """What a barrier is asked for has happened, and tensor memory is there."""
    if not {"PHASECHK", "FIND_AND_SET"} & set(modifiers):
        raise UnknownError
    lane.put(operands[0], 1)
    if _is_register(operands[1]):
        lane.put(operands[1], None)


@_rule("VOTEU")
def _vote(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    if not _is_predicate(operands[0]):
        raise UnknownError
    lane.put(operands[0], lane.predicate(operands[1]))


@_rule("HFMA2")
def _constant(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    """0 x 0 + constant, a way to load two halves on another pipe."""
    destination, a, b, high, low = operands
    if not a.endswith("RZ") or not b.endswith("RZ"):
        raise UnknownError
    halves = struct.pack("<ee", float(low), float(high))
    lane.put(destination, int(struct.unpack("<I", halves)[0]))


@_rule("SHFL")
def _shuffle(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    _, destination, source, index, _ = operands
    if "IDX" not in modifiers or lane.word(index) != 0:
        raise UnknownError
    lane.put(destination, lane.word(source))


@_rule("I2F", "I2FP")
def _to_float(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, source = operands
    value = lane.word(source) & MASK_32
    if "F64" in modifiers or "S64" in modifiers or "U64" in modifiers:
        raise UnknownError
    lane.put(destination, _bits(float(value if "U32" in modifiers else signed(value))))


@_rule("F2I")
def _to_integer(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, source = operands
    if "U32" not in modifiers:
        raise UnknownError
    lane.put(destination, int(min(_float(lane.word(source)), 2.0**32 - 1)))


@_rule("MUFU")
def _special_function(lane: _Lane, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
    destination, source = operands
    if "RCP" not in modifiers:
        raise UnknownError
    value = _float(lane.word(source))
    if value == 0.0:
        raise UnknownError
    lane.put(destination, _bits(1.0 / value))


def _step(lane: _Lane, instruction: Instruction) -> None:
    rule = _RULES.get(instruction.name)
    try:
        if instruction.guard and not lane.predicate(instruction.guard):
            return
        if rule is not None:
            rule(lane, instruction.operands, instruction.modifiers)
            return
    except UnknownError:
        pass
    for name in instruction.written:
        lane.known.pop(name, None)


def _target(instruction: Instruction) -> int:
    """Where a branch leads, as an index."""
    return int(instruction.operands[-1].split()[-1], 0) // 16


def _successors(code: Sequence[Instruction], at: int) -> tuple[int, ...]:
    """For finding where ways meet again: calls are taken to return."""
    instruction = code[at]
    name = instruction.name
    conditional = bool(instruction.guard) or (name == "BRA" and len(instruction.operands) > 1)
    if name == "BRA" or (name == "CALL" and conditional):
        target = _target(instruction)
        return (at + 1, target) if conditional else (target,)
    if name in ("EXIT", "RET", "BPT") and not conditional:
        return ()
    return (at + 1,) if at + 1 < len(code) else ()


def _run_lane(code: Sequence[Instruction], lane: _Lane, done: Executed, shortcuts: dict[int, int]) -> list[int]:
    """The places of the instructions in the order in which they are issued."""
    trace: list[int] = []
    at = 0
    while len(trace) < MOST_STEPS:
        instruction = code[at]
        trace.append(at)
        name = instruction.name
        if name in ("BRA", "EXIT", "RET", "CALL", "BPT"):
            conditions = [instruction.guard] if instruction.guard else []
            if name == "BRA" and "DIV" not in instruction.opcode:
                conditions += instruction.operands[:-1]
            try:
                taken = all(lane.predicate(condition) for condition in conditions)
            except UnknownError:
                done.undecided.add(at)
                if at not in shortcuts:
                    onward = name in ("EXIT", "BPT")  # of the lanes that leave, others are the ones to follow
                    shortcuts[at] = at + 1 if onward else shorter_way(lambda place: _successors(code, place), at)
                at = shortcuts[at]
                continue
            if not taken or "BRA.DIV" in instruction.opcode:  # which is for lanes that are not together
                at += 1
            elif name in ("EXIT", "BPT"):
                return trace
            elif name == "RET":
                at = lane.word(instruction.operands[0].split()[0]) // 16
            else:
                at = _target(instruction)
            continue
        if name in ("STG", "ST") and lane.holds(instruction.guard):
            done.stores.append(_store(lane, instruction))
        _step(lane, instruction)
        at += 1
    raise RuntimeError(f"no end after {MOST_STEPS} instructions, at {at * 16:#x}")


def _store(lane: _Lane, instruction: Instruction) -> tuple[int | None, int | None]:
    where, value, *_ = instruction.operands
    match = re.search(r"\[(R\w+)\.64(?:\+(-?0x[0-9a-f]+))?\]$", where)
    address: int | None = None
    word: int | None = None
    with contextlib.suppress(UnknownError):
        word = lane.word(value)
    with contextlib.suppress(UnknownError):
        address = lane.wide(match[1]) + int(match[2] or "0", 0) if match else None
    return address, word


def run(
    text: str,
    parameters: Mapping[int, int],
    program: tuple[int, int, int] = (0, 0, 0),
    num_warps: int = 4,
    products: str = r"[HIQ]?G?MMA|UT\w*MMA",
) -> Executed:
    """Follow one block.

    Args:
        text: what cuobjdump prints.
        parameters: 32-bit words of constant bank 0 by their offset.
        program: number of the block, x, y and z.
        num_warps: of the block; lane 0 of each is followed.
        products: regular expression for the opcode of a matrix product.
    """
    code, done = parse(text), Executed()
    shortcuts: dict[int, int] = {}
    opcodes = [instruction.opcode for instruction in code]
    constants = {0x0: 32 * num_warps, 0x4: 1, 0x8: 1, **parameters}
    for warp in range(num_warps):
        special = {"SR_TID.X": 32 * warp, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_LANEID": 0, "SR_CgaCtaId": 0, "SRZ": 0}
        special |= {f"SR_CTAID.{axis}": number for axis, number in zip("XYZ", program, strict=True)}
        trace = _run_lane(code, _Lane(constants, special), done, shortcuts)
        done.add(opcodes, trace, products)
    return done
