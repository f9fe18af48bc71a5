"""The interpreters that follow machine code: what they compute is what the kernel's source says, on every chip.

A kernel stores integers that it makes of its program number and arguments, of which divisions, products of 64 bits,
shifts and selections lead to the branches of the tile kernels. The interpreter must know each of them and agree with
Python. Then the number of instructions: loops by their trip count, branches by what decides them.
"""

from __future__ import annotations

import functools

import aot
import pytest
import triton
import triton.language as tl
from aot import CHIPS, Launch, Resources, build
from flow import Executed, shorter_way
from hypothesis import example, given, settings
from hypothesis import strategies as st


@triton.jit
def _integers_kernel(OUT, a, b: tl.int64, c: tl.int64):
    program = tl.program_id(0)
    tl.store(OUT, program // a)
    tl.store(OUT + 1, program % a)
    tl.store(OUT + 2, program * a - 7)
    tl.store(OUT + 3, tl.cdiv(b, 128).to(tl.int32))
    tl.store(OUT + 4, tl.minimum(tl.maximum(b - c, -128), 64).to(tl.int32))
    tl.store(OUT + 5, ((b * c) >> 3).to(tl.int32))
    tl.store(OUT + 6, ((b * c) >> 35).to(tl.int32))
    tl.store(OUT + 7, tl.where((b < c) & (program != a), a ^ 0x55, a & 0x3C))
    tl.store(OUT + 8, (b + c == 0).to(tl.int32))
    tl.store(OUT + 9, (program - 4 * a) // 64)
    tl.store(OUT + 10, ((b + (program - 4 * a).to(tl.int64) * 4) >> 32).to(tl.int32))


def _expected(program: int, a: int, b: int, c: int) -> list[int]:
    values = [
        program // a,
        program % a,
        program * a - 7,
        int((b + 127) / 128),  # towards zero, as C divides
        min(max(b - c, -128), 64),
        (b * c) >> 3,
        (b * c) >> 35,
        a ^ 0x55 if b < c and program != a else a & 0x3C,
        int(b + c == 0),
        int((program - 4 * a) / 64),
        (b + (program - 4 * a) * 4) >> 32,
    ]
    return [value & 0xFFFFFFFF for value in values]


@functools.cache
def _integers(chip: str) -> Resources:
    types = {"OUT": "*i32", "a": "i32", "b": "i64", "c": "i64"}
    return build(_integers_kernel, CHIPS[chip], types, {}, ("OUT",), num_warps=1)


@pytest.mark.parametrize("chip", CHIPS)
@given(st.integers(0, 2**20), st.integers(1, 2**10), st.integers(-(2**30), 2**30), st.integers(-(2**30), 2**30))
@example(5, 5, 0, 0)
@example(7, 8, -1, 1)
@example(1023, 1, 2**30, -(2**30))
@settings(max_examples=60, deadline=None)
def test_integers_are_those_of_the_source(chip, program, a, b, c):
    made = _integers(chip)
    base = 1 << 40
    run = aot.execute(made, chip, Launch({"OUT": base, "a": a, "b": b, "c": c}, 1, (program, 0, 0)))
    assert not run.undecided
    found = dict(run.stores)
    assert [found[base + 4 * i] for i in range(11)] == _expected(program, a, b, c)


@triton.jit
def _branches_kernel(X, OUT, n: tl.int64, limit: tl.int64, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(n):
        total += tl.exp2(tl.load(X + i * BLOCK + at))
    if n > limit:
        for _ in range(limit):  # which no compiler turns into a selection
            total = tl.rsqrt(total)
    if tl.sum(total, axis=0) < 1e-20:
        total = 1.0 / tl.exp2(tl.exp2(total))
    tl.store(OUT + at, total)


@functools.cache
def _branches(chip: str) -> Resources:
    types = {"X": "*fp32", "OUT": "*fp32", "n": "i64", "limit": "i64"}
    return build(_branches_kernel, CHIPS[chip], types, {"BLOCK": 256}, ("X", "OUT"), num_warps=4)


def _run(chip: str, n: int, limit: int) -> Executed:
    return aot.execute(_branches(chip), chip, Launch({"n": n, "limit": limit}, 1))


@pytest.mark.parametrize("chip", CHIPS)
def test_a_loop_counts_by_its_trips(chip):
    exponentials = [_run(chip, trips, 9).count(r"MUFU\.EX2|v_exp") for trips in range(1, 8)]
    per_trip = 256 // CHIPS[chip].target.warp_size
    assert exponentials == [exponentials[0] + trips * per_trip for trips in range(7)]
    steps = [_run(chip, trips, 999).instructions for trips in (64, 128, 192)]
    assert steps[2] - steps[1] == steps[1] - steps[0]


@pytest.mark.parametrize("chip", CHIPS)
def test_a_branch_counts_where_it_is_taken(chip):
    root = r"MUFU\.RSQ|v_rsq"
    assert _branches(chip).count(root) > 0
    assert _run(chip, 4, 3).count(root) >= 3 * 256 // CHIPS[chip].target.warp_size
    assert _run(chip, 4, 4).count(root) == 0


@pytest.mark.parametrize("chip", CHIPS)
def test_a_branch_on_data_goes_the_shorter_way(chip):
    run, reciprocal = _run(chip, 4, 4), r"MUFU\.RCP|v_rcp"
    assert run.undecided
    assert _branches(chip).count(reciprocal) > 0
    assert run.count(reciprocal) == 0


@triton.jit
def _adding_kernel(X, OUT, IS_ATOMIC: tl.constexpr):
    if IS_ATOMIC:
        tl.atomic_add(OUT, tl.load(X))
    else:
        tl.store(OUT, tl.sum(tl.load(X + tl.arange(0, 256)), axis=0))


@pytest.mark.parametrize("chip", CHIPS)
def test_atomics_are_seen_before_the_machine_code_is_printed(chip):
    for is_atomic in (False, True):
        made = build(_adding_kernel, CHIPS[chip], {"X": "*fp32", "OUT": "*fp32"}, {"IS_ATOMIC": is_atomic})
        assert made.has_atomics == is_atomic
        assert (made.count(aot._ATOMICS) > 0) == is_atomic


def test_the_shorter_way_is_that_with_fewer_instructions_to_the_meeting():
    # 0 branches to 1 or 4; 1, 2, 3 go on to 5 as 4 does.
    edges = {0: (1, 4), 1: (2,), 2: (3,), 3: (5,), 4: (5,), 5: ()}
    assert shorter_way(edges.__getitem__, 0) == 4
    # 2 goes back to 1, to wait: what counts is that the other way ends.
    edges = {0: (1,), 1: (2,), 2: (3, 1), 3: ()}
    assert shorter_way(edges.__getitem__, 2) == 3
