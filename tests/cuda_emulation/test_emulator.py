"""The emulator finds the bug of each kernel in planted.cu, and none in its correct twin."""

from __future__ import annotations

import ctypes
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from emulation import Emulator, address_environment, build

PLANTED = Path(__file__).with_name("planted.cu")
ORDERS = range(20)
LAUNCH_FAILURE, INVALID_CONFIGURATION, INVALID_VALUE = 719, 9, 1

# By kernel: what the twin without the bug leaves, and what is said about the bug.
RACE = r".*, which thread \(\d+, 0, 0\) of block \({}, 0, 0\) {}, and nothing orders the two"
NEVER = r"waits at {} \(.*planted\.cu:\d+\){}, which thread {} never reaches: it {}"
CASES: dict[str, tuple[list[float], str]] = {
    "sum_without_barrier": ([128.0] * 2, r"4 bytes at offset \d+ of the shared variable part"),
    "loop_without_second_barrier": ([1.0, 2.0] * 128, "shared variable value" + RACE.format(0, "(wrote|read)")),
    "exchange_in_warp": ([31.0 - i for i in range(32)], "shared variable lanes"),
    "shuffle_for_syncwarp": ([32.0] * 32, r"thread \(0, 0, 0\): writes .* variable value" + RACE.format(0, "read")),
    "divergent_barrier": (
        [1.0] * 128,
        NEVER.format("__syncthreads", "", r"\(\d+, 0, 0\)", r"waits at __syncthreads \(.*planted\.cu:\d+\)"),
    ),
    "exit_before_barrier": ([1.0] * 128, NEVER.format("__syncthreads", "", r"\(7, 0, 0\)", "has exited")),
    "lost_shuffle": ([1.0] * 32, NEVER.format(r"__syncthreads", "", r"\(\d+, 0, 0\)", "waits at __shfl_down_sync")),
    "shuffle_outside_mask": ([1.0] * 16, r"__shfl_xor_sync with mask 0xff00, in which its own lane \d is not"),
    "shuffle_from_outside": ([1.0] * 16, r"__shfl_sync \(.*\) with mask 0xffff reads lane 20, which takes no part"),
    "shuffles_with_two_masks": (
        [1.0] * 32,
        NEVER.format("__shfl_xor_sync", " with mask 0xffffffff", r"\(5, 0, 0\)", "waits at .* with mask 0xff"),
    ),
    "uninitialised_shared": ([0.0] * 128, r"thread \(9, 0, 0\): reads .* count, of which nobody has written byte 0"),
    "uninitialised_dynamic": ([1.0] * 256, r"block \(1, 0, 0\), .*dynamic, of which nobody has written byte 0"),
    "misaligned_vector": ([1.0], "expected an address that is a multiple of 16 for 'const struct float4', got 0x"),
    "race_of_blocks": ([1.0] * 256, "writes 4 bytes of global memory at 0x.*" + RACE.format("[01]", "wrote")),
    "race_of_read_and_write": ([1.0] * 256, "4 bytes of global memory at 0x.*" + RACE.format("[01]", "(wrote|read)")),
    "read_before_write": ([1.0] * 3, "4 bytes of global memory at 0x.*" + RACE.format("[01]", "(wrote|read)")),
    "read_among_atomics": ([2.0, 0.0], "4 bytes of global memory at 0x.*" + RACE.format("[01]", "(wrote|read)")),
    "write_among_atomics": ([5.0], "writes 4 bytes of global memory at 0x.*" + RACE.format("[01]", "wrote")),
    "syncwarp_for_barrier": ([1.0] * 128, "shared variable value" + RACE.format(0, "(wrote|read)")),
    "count_threads": ([120.0], "reads 4 bytes of global memory at 0x.*" + RACE.format(r"\d", "wrote")),
    "spin_for_other_block": ([1.0], "runs on and on without a wait"),
}
OUT_OF_BOUNDS = {
    "global_out_of_bounds": ([1.0] * 48, "heap-buffer-overflow"),
    "shared_out_of_bounds": ([1.0] * 64, "global-buffer-overflow"),
    "dynamic_out_of_bounds": ([1.0] * 40, "heap-buffer-overflow"),
}
# Runs a kernel in each order and prints what it returned: in a process of its own, which may end in it.
RUN = """
import ctypes, json, sys
from pathlib import Path
sys.path.insert(0, {folder!r})
from emulation import Emulator
emulator, out = Emulator(Path({library!r})), (ctypes.c_float * 256)()
runs = []
for name, bug in {wanted!r}:
    for seed in range(20):
        emulator.seed(seed)
        error = getattr(emulator.library, "run_" + name)(bug, out)
        runs.append((name, error, emulator.failure(), list(out)))
print(json.dumps(runs))
"""


@pytest.fixture(scope="module")
def planted() -> Emulator:
    return Emulator(build([PLANTED]))


def run(emulator: Emulator, name: str, bug: bool, seed: int) -> tuple[int, str, list[float]]:
    out = (ctypes.c_float * 256)()
    emulator.seed(seed)
    error = getattr(emulator.library, f"run_{name}")(bug, out)
    return error, emulator.failure(), list(out)


def run_with_addresses(*wanted: tuple[str, bool]) -> tuple[list[Any], str]:
    code = RUN.format(folder=str(PLANTED.parent), library=str(build([PLANTED], "address")), wanted=wanted)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=address_environment())
    return json.loads(done.stdout) if done.returncode == 0 else [], done.stderr


@pytest.mark.parametrize("name", CASES)
def test_a_bug_is_found_in_every_order(planted: Emulator, name: str) -> None:
    failures = []
    for seed in ORDERS:
        error, failure, _ = run(planted, name, True, seed)
        assert error == (LAUNCH_FAILURE if failure else 0)
        failures.append(failure)
    if name == "spin_for_other_block":  # none where the other block comes first
        failures = list(filter(None, failures))
        assert len(failures) < len(ORDERS)
    assert failures
    for failure in failures:
        assert f"::{name}<true>(" in failure
        assert re.search(r": block \(\d, 0, 0\), thread \(\d+, 0, 0\): ", failure), failure
        assert re.search(CASES[name][1], failure), failure


@pytest.mark.parametrize("name", CASES)
def test_its_twin_is_right_in_every_order(planted: Emulator, name: str) -> None:
    expected = CASES[name][0]
    for seed in ORDERS:
        run(planted, name, True, seed)  # a launch that fails leaves nothing behind
        error, failure, out = run(planted, name, False, seed)
        assert (error, failure, out[: len(expected)]) == (0, "", expected)


@pytest.mark.parametrize("name", OUT_OF_BOUNDS)
def test_address_sanitizer_ends_an_access_out_of_bounds(name: str) -> None:
    runs, stderr = run_with_addresses((name, True))
    assert not runs
    assert OUT_OF_BOUNDS[name][1] in stderr
    assert "planted.cu" in stderr


def test_the_twins_run_under_address_sanitizer_and_the_scheduler_finds_what_it_does_without() -> None:
    cases = {**CASES, **OUT_OF_BOUNDS}
    runs, stderr = run_with_addresses(*((name, False) for name in cases))
    assert len(runs) == len(cases) * len(ORDERS), stderr
    for name, error, failure, out in runs:
        expected = cases[name][0]
        assert (error, failure, out[: len(expected)]) == (0, "", expected), name
    waits = ["divergent_barrier", "exit_before_barrier", "lost_shuffle", "shuffle_from_outside", "misaligned_vector"]
    runs, stderr = run_with_addresses(*((name, True) for name in waits))
    assert len(runs) == len(waits) * len(ORDERS), stderr
    assert all(error == LAUNCH_FAILURE and f"::{name}<true>(" in failure for name, error, failure, _ in runs)


def test_without_a_watch_over_memory_orders_and_nan_still_show_a_missing_barrier() -> None:
    for name in ("sum_without_barrier", "exchange_in_warp", "uninitialised_dynamic"):
        runs, stderr = run_with_addresses((name, True))
        assert len(runs) == len(ORDERS), stderr
        assert any(math.isnan(value) for *_, out in runs for value in out[: len(CASES[name][0])]), name


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "message"),
    [
        ((0, 1, 1), (1, 1, 1), 0, r"nothing\(\): gridDim: expected 1 to .*, got \(0, 1, 1\)"),
        ((1, 65536, 1), (1, 1, 1), 0, r"gridDim: expected .* 65535 .*, got \(1, 65536, 1\)"),
        ((1, 1, 65536), (1, 1, 1), 0, r"gridDim: expected .* 65535 .*, got \(1, 1, 65536\)"),
        ((2**31, 1, 1), (1, 1, 1), 0, r"gridDim: expected 1 to 2147483647, .*, got \(2147483648, 1, 1\)"),
        ((1, 1, 1), (1, 0, 1), 0, r"blockDim: expected 1 to 1024 threads, .*, got \(1, 0, 1\)"),
        ((1, 1, 1), (1025, 1, 1), 0, r"blockDim: expected 1 to 1024 threads, .*, got \(1025, 1, 1\)"),
        ((1, 1, 1), (32, 33, 1), 0, r"blockDim: expected 1 to 1024 threads, .*, got \(32, 33, 1\)"),
        ((1, 1, 1), (1, 1, 65), 0, r"blockDim: .* at most 64 along z, got \(1, 1, 65\)"),
        ((1, 1, 1), (1, 1, 1), 49153, r"dynamicSmemBytes: expected at most 49152, got 49153"),
    ],
)
def test_a_launch_beyond_the_limits_is_refused(
    planted: Emulator, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, message: str
) -> None:
    launches = planted.launches
    error = planted.library.launch_nothing(*map(ctypes.c_uint, (*grid, *block)), ctypes.c_size_t(shared_bytes))
    assert error == INVALID_CONFIGURATION
    assert planted.library.last_error(False) == error
    assert planted.library.last_error(True) == error
    assert planted.library.last_error(True) == 0
    assert re.search(message, planted.failure())
    assert planted.failure() == ""
    assert planted.launches == launches


def test_a_launch_within_the_limits_runs(planted: Emulator) -> None:
    for sizes in ((1, 1, 1, 1024, 1, 1), (2, 3, 65535 // 4096, 4, 2, 64), (5000, 1, 1, 1, 1, 1)):
        launches = planted.launches
        assert planted.library.launch_nothing(*map(ctypes.c_uint, sizes), ctypes.c_size_t(49152)) == 0
        assert planted.launches == launches + 1


def test_parameters_fit_into_4_kb(planted: Emulator) -> None:
    assert planted.library.launch_with_4096_bytes() == 0
    assert planted.library.launch_with_4100_bytes() == INVALID_VALUE
    assert "expected at most 4096 bytes of parameters, got 4100" in planted.failure()


def test_a_failure_that_nobody_hears_is_an_error(planted: Emulator) -> None:
    out = (ctypes.c_float * 256)()
    with (
        pytest.raises(AssertionError, match=r"nobody heard .*divergent_barrier<true>"),
        planted.order(1),
    ):
        planted.library.run_divergent_barrier(True, out)
    with planted.order(1):
        planted.library.run_divergent_barrier(False, out)


def test_a_seed_is_an_order(planted: Emulator) -> None:
    def order(seed: int) -> list[int]:
        following, positions = ctypes.c_int(0), (ctypes.c_int * (12 * 32))()
        planted.seed(seed)
        assert planted.library.run_record_order(ctypes.byref(following), positions) == 0
        assert following.value == 12 * 24
        return positions[: 12 * 24]

    def block_order(positions: list[int]) -> tuple[int, ...]:
        return tuple(dict.fromkeys(position // 32 for position in positions))

    def thread_order(positions: list[int]) -> tuple[int, ...]:
        return tuple(position % 32 for position in positions if position // 32 == 0)

    natural = [block * 32 + thread for block in range(12) for thread in range(24)]
    orders = [order(seed) for seed in range(4)]
    assert orders[0] == natural
    assert all(sorted(o) == natural for o in orders)
    assert len(set(map(block_order, orders))) == len(set(map(thread_order, orders))) == 4
    assert [order(seed) for seed in range(4)] == orders


def test_warp_functions_are_those_of_cuda(planted: Emulator) -> None:
    out = (ctypes.c_int * 256)()
    assert planted.library.run_warp_functions(out) == 0, planted.failure()
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    for lane in range(32):
        down = lane + 4 if lane % 16 + 4 < 16 else lane
        up = lane - 4 if lane % 16 >= 4 else lane
        assert out[8 * lane : 8 * lane + 5] == [5, lane // 8 * 8 + 3, lane ^ 3, down, up]
        assert out[8 * lane + 5] & 0xFFFFFFFF == ballot
        assert out[8 * lane + 6 : 8 * lane + 8] == [1, 0]


def test_16_bit_types_convert_as_torch_does(planted: Emulator) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    from_half, from_bfloat16 = torch.empty(2, 2**16)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (bits, bits, from_half, from_bfloat16)]
    assert planted.library.run_widen(2**10, *pointers) == 0
    torch.testing.assert_close(from_half, bits.view(torch.float16).float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(from_bfloat16, bits.view(torch.bfloat16).float(), rtol=0, atol=0, equal_nan=True)

    # All halves and bfloat16, what lies just beside them and in the midst between two, and any bits.
    either = torch.cat([from_half, from_bfloat16])
    middle = (either.view(torch.int32) + torch.tensor([[0x1000], [0x8000], [1], [-1]], dtype=torch.int32)).view(-1)
    anything = torch.randint(-(2**31), 2**31, (2**18,)).int()
    x = torch.cat([either, middle.view(torch.float32), anything.view(torch.float32)])
    half, bfloat16 = torch.empty_like(x, dtype=torch.float16), torch.empty_like(x, dtype=torch.bfloat16)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, half, bfloat16)]
    assert planted.library.run_narrow(len(x) // 64, *pointers) == 0
    for narrowed in (half, bfloat16):
        expected = x.to(narrowed.dtype)
        assert torch.equal(narrowed.isnan(), expected.isnan())
        number = ~expected.isnan()
        assert torch.equal(narrowed[number].view(torch.int16), expected[number].view(torch.int16))
