"""Which instructions of an AMD binary run, and how often; see flow.py for what is followed and what is not.

Masks of lanes hold one bit, that of the lane that is followed, in all their places: the lanes of a wave are taken to
stay together.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import operator
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence

from flow import MASK_32, MASK_64, MOST_STEPS, Executed, UnknownError, shorter_way, signed

_ARGUMENTS_AT = 1 << 44  # any address: that of the arguments
_PAIRS = {"vcc": "vcc_lo", "exec": "exec_lo"}
Instruction = tuple[str, tuple[str, ...]]  # opcode and operands


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of an assembly listing, and where its labels are."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if match := re.match(r"(\.\w+):", line):
            labels[match[1]] = len(code)
        elif match := re.match(r"\t([a-z]\w+)(?:\s+([^;]*))?", line.split(";")[0].rstrip()):
            operands = re.split(r",\s*", match[2].strip()) if match[2] else ()
            code.append((match[1], tuple(operands)))
    return code, labels


@functools.cache
def _base(opcode: str) -> str:
    return re.sub(r"_e(32|64)$", "", opcode)


@functools.lru_cache(1 << 16)
def _names(text: str) -> tuple[str, ...]:
    """Registers of an operand, the lowest first."""
    if match := re.fullmatch(r"([sva])\[(\d+):(\d+)\]", text):
        return tuple(f"{match[1]}{number}" for number in range(int(match[2]), int(match[3]) + 1))
    low = _PAIRS.get(text)
    return (low, low[:-2] + "hi") if low else (text,)


@functools.lru_cache(1 << 16)
def _literal(text: str) -> int | None:
    """The bits of an operand that is a number, of any width."""
    if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
        return int(text, 0)
    if re.fullmatch(r"-?\d+\.\d+", text):
        return int(struct.unpack("<I", struct.pack("<f", float(text)))[0])
    return None


class _Lane:
    def __init__(self, words: Mapping[int, int]) -> None:
        self.known: dict[str, int] = {"scc": 0, "exec_lo": MASK_32, "exec_hi": MASK_32}
        self.words = words

    def get(self, text: str, words: int = 1) -> int:
        """A source operand, zero-extended."""
        if (number := _literal(text)) is not None:
            return number & (MASK_32 if words == 1 else MASK_64)
        value = 0
        for i, name in enumerate(_names(text)[:words]):
            if name not in self.known:
                raise UnknownError
            value |= self.known[name] << 32 * i
        return value

    def put(self, text: str, value: int | None) -> None:
        for i, name in enumerate(_names(text)):
            if value is None:
                self.known.pop(name, None)
            else:
                self.known[name] = value >> 32 * i & MASK_32

    def is_set(self, text: str) -> bool:
        """Of a mask, whether it has the lane."""
        return bool(self.get(text) & 1)


Rule = Callable[[_Lane, str, Sequence[str]], None]  # lane, opcode without its encoding, operands
_RULES: list[tuple[re.Pattern[str], Rule]] = []


def _rule(pattern: str) -> Callable[[Rule], Rule]:
    def add(rule: Rule) -> Rule:
        _RULES.append((re.compile(pattern), rule))
        return rule

    return add


@functools.cache
def _rule_of(name: str) -> Rule | None:
    return next((rule for pattern, rule in _RULES if pattern.fullmatch(name)), None)


@functools.cache
def _bits(opcode: str) -> int:
    return 64 if re.search(r"[biu]64", opcode) else 32


_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": operator.eq,
    "lg": operator.ne,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


@_rule(r"[sv]_cmpk?_\w+_[iu](32|64)")
def _compare(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    is_vector = opcode[0] == "v"
    *_, how, kind = opcode.split("_")
    bits = _bits(kind)
    a, b = (lane.get(text, bits // 32) for text in operands[-2:])
    if kind[0] == "i":
        a, b = signed(a, bits), signed(b, bits)
    result = _COMPARE[how](a, b)
    if is_vector:
        lane.put(operands[0], MASK_64 if result else 0)
    else:
        lane.known["scc"] = int(result)


_LOGIC: dict[str, Callable[[int, int], int]] = {
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "andn2": lambda a, b: a & ~b,
    "orn2": lambda a, b: a | ~b,
}


@_rule(r"[sv]_(and|or|xor|andn2|orn2)_b(32|64)")
def _logic(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    words = _bits(opcode) // 32
    name, full = opcode.split("_")[1], MASK_64 if words == 2 else MASK_32
    values = []
    for text in operands[1:]:
        with contextlib.suppress(UnknownError):
            values.append(lane.get(text, words))
    decides = {"and": 0, "or": full}.get(name)
    if len(values) == 2:
        result = _LOGIC[name](*values) & full
    elif decides in values:
        result = decides
    else:
        raise UnknownError
    lane.put(operands[0], result)
    if opcode[0] == "s":
        lane.known["scc"] = int(result != 0)


@_rule(r"s_(and|or|andn2|xor)_saveexec_b64")
def _save_mask(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    before = lane.get("exec", 2)
    try:
        now = _LOGIC[opcode.split("_")[1]](lane.get(operands[1], 2), before) & MASK_64
    except UnknownError:
        lane.put("exec", None)
        lane.known.pop("scc", None)
        lane.put(operands[0], before)
        return
    lane.put(operands[0], before)
    lane.put("exec", now)
    lane.known["scc"] = int(now != 0)


@_rule(r"[sv]_mov(k_i32|_b32|_b64)|v_readfirstlane_b32")
def _move(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    lane.put(operands[0], lane.get(operands[1], _bits(opcode) // 32))


@_rule(r"s_(add|addc|sub|subb)_u32")
def _add_with_carry(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    a, b = lane.get(operands[1]), lane.get(operands[2])
    carry = lane.get("scc") if opcode.startswith(("s_addc", "s_subb")) else 0
    total = a + b + carry if "add" in opcode else a - b - carry
    lane.put(operands[0], total & MASK_32)
    lane.known["scc"] = int(not 0 <= total <= MASK_32)


@_rule(r"v_(add|addc|sub|subb|subrev)_co_u32")
def _add_with_mask(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    a, b = lane.get(operands[2]), lane.get(operands[3])
    if "rev" in opcode:
        a, b = b, a
    carry = int(lane.is_set(operands[4])) if len(operands) > 4 else 0
    total = a + b + carry if "add" in opcode else a - b - carry
    lane.put(operands[0], total & MASK_32)
    lane.put(operands[1], MASK_64 if not 0 <= total <= MASK_32 else 0)


_ARITHMETIC: dict[str, Callable[..., int]] = {
    "add_i32": operator.add,
    "add_u32": operator.add,
    "sub_i32": operator.sub,
    "sub_u32": operator.sub,
    "subrev_u32": lambda a, b: b - a,
    "mul_i32": operator.mul,
    "mul_lo_u32": operator.mul,
    "mul_u32_u24": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "mul_hi_u32": lambda a, b: a * b >> 32,
    "mul_hi_i32": lambda a, b: signed(a) * signed(b) >> 32,
    "lshl_b32": lambda a, b: a << (b & 31),
    "lshr_b32": lambda a, b: a >> (b & 31),
    "ashr_i32": lambda a, b: signed(a) >> (b & 31),
    "lshlrev_b32": lambda a, b: b << (a & 31),
    "lshrrev_b32": lambda a, b: b >> (a & 31),
    "ashrrev_i32": lambda a, b: signed(b) >> (a & 31),
    "min_i32": lambda a, b: min(a, b, key=signed),
    "max_i32": lambda a, b: max(a, b, key=signed),
    "min_u32": min,
    "max_u32": max,
    "abs_i32": lambda a: abs(signed(a)),
    "not_b32": lambda a: ~a,
    "bfrev_b32": lambda a: int(f"{a:032b}"[::-1], 2),
    "add3_u32": lambda a, b, c: a + b + c,
    "lshl_add_u32": lambda a, b, c: (a << (b & 31)) + c,
    "lshl_or_b32": lambda a, b, c: (a << (b & 31)) | c,
    "and_or_b32": lambda a, b, c: a & b | c,
    "or3_b32": lambda a, b, c: a | b | c,
    "xad_u32": lambda a, b, c: (a ^ b) + c,
    "lshl1_add_u32": lambda a, b: (a << 1) + b,
    "lshl2_add_u32": lambda a, b: (a << 2) + b,
    "lshl3_add_u32": lambda a, b: (a << 3) + b,
    "lshl4_add_u32": lambda a, b: (a << 4) + b,
}


@_rule("[sv]_(" + "|".join(_ARITHMETIC) + ")")
def _arithmetic(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    name = opcode[2:]
    result = _ARITHMETIC[name](*map(lane.get, operands[1:])) & MASK_32
    lane.put(operands[0], result)
    if opcode[0] == "s" and not name.startswith("mul"):
        if name.startswith(("lsh", "ash", "abs", "not")):
            lane.known["scc"] = int(result != 0)
        elif name.startswith(("min", "max")):
            lane.known["scc"] = int(result == lane.get(operands[1]))
        else:  # overflow of signed numbers
            lane.known.pop("scc", None)


@_rule(r"s_(addk|mulk)_i32")
def _arithmetic_in_place(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    by = lane.get(operands[1])
    by = signed(by & 0xFFFF, 16)
    lane.put(operands[0], (lane.get(operands[0]) + by if "add" in opcode else lane.get(operands[0]) * by) & MASK_32)
    lane.known.pop("scc", None)


@_rule(r"[sv]_(lshl|lshr|ashr|lshlrev|lshrrev|ashrrev)_[bi]64")
def _shift(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    value, by = operands[1:] if "rev" not in opcode else operands[:0:-1]
    wide, shift = lane.get(value, 2), lane.get(by) & 63
    wide = signed(wide, 64) if "ashr" in opcode else wide
    result = wide << shift if "lshl" in opcode else wide >> shift
    lane.put(operands[0], result & MASK_64)
    if opcode[0] == "s":
        lane.known["scc"] = int(result & MASK_64 != 0)


@_rule(r"v_lshl_add_u64")
def _shift_and_add(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    a, by, c = operands[1:]
    lane.put(operands[0], (lane.get(a, 2) << lane.get(by)) + lane.get(c, 2) & MASK_64)


@_rule(r"v_mad_(u64_u32|i64_i32)")
def _multiply_add(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    to, _, *sources = operands
    a, b, c = lane.get(sources[0]), lane.get(sources[1]), lane.get(sources[2], 2)
    product = signed(a) * signed(b) if "i64" in opcode else a * b
    lane.put(to, product + c & MASK_64)


@_rule(r"[sv]_bfe_[iu]32")
def _extract(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    value = lane.get(operands[1])
    if opcode[0] == "s":
        place = lane.get(operands[2])
        first, width = place & 31, place >> 16 & 127
    else:
        first, width = lane.get(operands[2]), lane.get(operands[3])
    result = value >> first & (1 << width) - 1
    result = signed(result, width) & MASK_32 if "_i32" in opcode else result
    lane.put(operands[0], result)
    if opcode[0] == "s":
        lane.known["scc"] = int(result != 0)


@_rule(r"s_bitcmp[01]_b32")
def _test_bit(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    bit = lane.get(operands[0]) >> (lane.get(operands[1]) & 31) & 1
    lane.known["scc"] = int(bit == int(opcode[8]))


@_rule(r"s_bitset1_b32")
def _set_bit(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    lane.put(operands[0], lane.get(operands[0]) | 1 << (lane.get(operands[1]) & 31))


@_rule(r"s_cselect_b(32|64)")
def _select(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    lane.put(operands[0], lane.get(operands[1 if lane.get("scc") else 2], _bits(opcode) // 32))


@_rule(r"v_cndmask_b32")
def _select_by_mask(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    lane.put(operands[0], lane.get(operands[2 if lane.is_set(operands[3]) else 1]))


@_rule(r"s_load_dword(x\d+)?")
def _load_arguments(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    to, base, offset = operands
    try:
        at = lane.get(base, 2) - _ARGUMENTS_AT + int(offset, 0)
    except ValueError:
        raise UnknownError from None
    for i, name in enumerate(_names(to)):
        lane.put(name, lane.words.get(at + 4 * i))


@_rule(r"v_(write|read)lane_b32")
def _spill(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    """Scalar registers that are kept in lanes of a vector register."""
    if "write" in opcode:
        lane.put(f"{operands[0]}.{operands[2]}", lane.get(operands[1]))
    else:
        lane.put(operands[0], lane.get(f"{operands[1]}.{operands[2]}"))


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


@_rule(r"v_(cvt_f32_u32|rcp_f32|rcp_iflag_f32|mul_f32|cvt_u32_f32)")
def _divide(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    """The steps of a division of integers by way of a reciprocal."""
    values = [lane.get(text) for text in operands[1:]]
    if opcode == "v_cvt_u32_f32":
        lane.put(operands[0], int(min(max(_float(values[0]), 0.0), 2.0**32 - 1)))
        return
    if opcode == "v_cvt_f32_u32":
        result = float(values[0])
    elif opcode == "v_mul_f32":
        result = _float(values[0]) * _float(values[1])
    elif _float(values[0]) != 0.0:
        result = 1.0 / _float(values[0])
    else:
        raise UnknownError
    lane.put(operands[0], int(struct.unpack("<I", struct.pack("<f", result))[0]))


_WRITES_NOTHING = re.compile(
    r"(global|flat|buffer|scratch)_store|ds_write|s_(waitcnt|nop|barrier|setprio|sleep|setreg)|s_c?branch|buffer_(wbl2|inv)"
)


def _forget(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    """Whatever the instruction may write is unknown."""
    first, second, scc = _may_write(opcode)
    if not first or not operands:
        return
    lane.put(operands[0], None)
    if second:
        lane.put(operands[1], None)
    if scc:
        lane.known.pop("scc", None)


@functools.cache
def _may_write(opcode: str) -> tuple[bool, bool, bool]:
    """Whether the first operand, the second and scc."""
    return (
        _WRITES_NOTHING.match(opcode) is None,
        re.match(r"v_\w+_co_|v_mad_[iu]64|v_div_scale", opcode) is not None,
        opcode.startswith("s_") and not opcode.startswith(("s_mov", "s_load", "s_mul", "s_cselect")),
    )


def _step(lane: _Lane, opcode: str, operands: Sequence[str]) -> None:
    name = _base(opcode)
    if name.startswith("v_") and not name.startswith(("v_readfirstlane", "v_readlane", "v_writelane")):
        try:
            is_active = lane.is_set("exec")
        except UnknownError:
            _forget(lane, name, operands)
            return
        if not is_active:
            if name.startswith("v_cmp"):
                lane.put(operands[0], 0)
            return
    if rule := _rule_of(name):
        with contextlib.suppress(UnknownError):
            rule(lane, name, operands)
            return
    _forget(lane, name, operands)


def _takes_branch(lane: _Lane, opcode: str) -> bool:
    if opcode == "s_branch":
        return True
    condition = opcode.removeprefix("s_cbranch_")
    if condition.startswith("scc"):
        return lane.get("scc") == int(condition[-1])
    return (lane.get(condition.rstrip("nz")) & 1 == 0) == (condition[-2] != "n")


def run(
    text: str,
    words: Mapping[int, int],
    program: tuple[int, int, int] = (0, 0, 0),
    num_warps: int = 4,
    exponentials: float = 0,
) -> Executed:
    """Follow one block.

    Args:
        text: the assembly, as Triton keeps it.
        words: 32-bit words of the arguments by their offset.
        program: number of the block, x, y and z.
        num_warps: of the block; lane 0 of each is followed.
        exponentials: that the waves take at least, whatever the data. If they take fewer, two branches on the same data
            went different ways: then as few of the branches on data as possible are turned, for the shortest way.
    """
    done = _follow(text, words, program, num_warps, frozenset())
    branches = sorted(done.undecided) if done.count("v_exp_") < exponentials else []
    for number in range(1, len(branches) + 1):
        ways = [
            _follow(text, words, program, num_warps, frozenset(turned))
            for turned in itertools.combinations(branches, number)
        ]
        if ways := [way for way in ways if way.count("v_exp_") >= exponentials]:
            return min(ways, key=lambda way: way.instructions)
    return done


def _follow(
    text: str, words: Mapping[int, int], program: tuple[int, int, int], num_warps: int, turned: frozenset[int]
) -> Executed:
    (code, labels), done = parse(text), Executed()
    shortcuts: dict[int, int] = {}
    opcodes = [opcode for opcode, _ in code]
    match = re.search(r"\.amdhsa_user_sgpr_count (\d+)", text)
    axes = [axis for axis in range(3) if re.search(rf"\.amdhsa_system_sgpr_workgroup_id_{'xyz'[axis]} 1", text)]
    assert match is not None, "no registers of the launch in the assembly"

    def successors(at: int) -> tuple[int, ...]:
        opcode, operands = code[at]
        if opcode == "s_endpgm":
            return ()
        if "branch" in opcode:
            target = labels[operands[0]]
            return (target,) if opcode == "s_branch" else (at + 1, target)
        return (at + 1,)

    for wave in range(num_warps):
        lane = _Lane(words)
        lane.put("s[0:1]", _ARGUMENTS_AT)
        for place, axis in enumerate(axes):
            lane.put(f"s{int(match[1]) + place}", program[axis])
        lane.put("v0", 64 * wave)
        trace: list[int] = []
        at = 0
        while code[at][0] != "s_endpgm":
            opcode, operands = code[at]
            trace.append(at)
            if len(trace) > MOST_STEPS:
                raise RuntimeError(f"no end after {MOST_STEPS} instructions, at {code[at]}")
            if "branch" in opcode:
                try:
                    at = labels[operands[0]] if _takes_branch(lane, opcode) else at + 1
                except UnknownError:
                    done.undecided.add(at)
                    if at not in shortcuts:
                        way = shorter_way(successors, at)
                        shortcuts[at] = sum(successors(at)) - way if at in turned else way
                    at = shortcuts[at]
                continue
            if opcode.startswith("global_store"):
                done.stores.extend(_store(lane, operands))
            _step(lane, opcode, operands)
            at += 1
        done.add(opcodes, [*trace, at], r"v_mfma_")
    return done


def _store(lane: _Lane, operands: Sequence[str]) -> Iterator[tuple[int | None, int | None]]:
    """Address and value of each word that is written."""
    where, values, base, *_ = operands
    address: int | None = None
    with contextlib.suppress(UnknownError):
        # "v[2:3], v4, off offset:16" or "v2, v4, s[0:1] offset:16"
        base, _, offset = base.partition(" offset:")
        address = (lane.get(where, 2) if base == "off" else lane.get(where) + lane.get(base, 2)) + int(offset or "0")
    for i, name in enumerate(_names(values)):
        yield address if address is None else address + 4 * i, lane.known.get(name)
