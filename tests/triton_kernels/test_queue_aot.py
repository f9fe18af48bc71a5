"""The kernel of the key queue, compiled for chips that need not be there."""

from __future__ import annotations

import itertools

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
    types = {name: kind for name, kind in types.items() if name not in constants}
    made = build(_enqueue_kernel, CHIPS[chip], types, constants, divisible, num_warps=4)
    assert made.spills == 0
    assert made.registers <= 96
    assert made.count(r"REDG|RED\.|ATOMG|ATOM\.|global_atomic") == 0
    if aligned and chip != "gfx942":
        assert made.count(r"STG\S*\.(64|128)") > 0, "rows are not written several elements at a time"


def test_nothing_recompiles_when_sizes_change():
    parameters = {p.name: p for p in _enqueue_kernel.params}
    for name in ("B", "K", "skipped"):
        assert parameters[name].do_not_specialize
        assert parameters[name].annotation_type == "i64"  # whatever the value, which otherwise picks the type
