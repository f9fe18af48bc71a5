"""The kernel of the key queue, compiled for chips that need not be there."""

from __future__ import annotations

import itertools

import aot
import pytest
from aot import CHIPS, build

from ssl_kernels.kernels.queue import _enqueue_kernel


@pytest.mark.parametrize(("chip", "aligned"), itertools.product(CHIPS, [False, True]))
def test_resources(chip, aligned):
    types = {"QUEUE": "*bf16", "POINTER": "*i64", "KEYS": "*fp32"} | dict.fromkeys(("B", "K", "skipped"), "i64")
    types |= dict.fromkeys(("D", "stride_qk", "stride_qd", "stride_kb", "stride_kd"), "i32")
    constants = {"NORMALIZE": True, "BLOCK_B": 8, "BLOCK_D": 128}
    divisible = ()
    if aligned:
        constants |= {"stride_qd": 1, "stride_kd": 1}
        divisible = ("QUEUE", "KEYS", "D", "stride_qk", "stride_kb")
    made = build(_enqueue_kernel, CHIPS[chip], types, constants, divisible, num_warps=4)
    aot.assert_sound(made)
    assert made.registers <= 96
    if aligned and chip != "gfx942":
        assert made.count(r"STG\S*\.(64|128)") > 0, "rows are not written several elements at a time"


def test_nothing_recompiles_when_sizes_change():
    aot.assert_sizes_do_not_recompile(_enqueue_kernel, ("B", "K", "skipped"))
