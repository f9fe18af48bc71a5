"""The kernel of the key queue, compiled for chips that need not be there.

Asserted: no spills, no atomics, few registers, wide stores where rows are aligned. What it executes is compared with
queue_budget.json, which `python tests/triton_kernels/report.py` writes anew.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import aot
import pytest
from aot import CHIPS, Budget, Launch, Resources, build

from ssl_kernels.kernels.queue import _enqueue_kernel

BUDGET = Budget("queue")
WIDTHS = {"aligned": 256, "unaligned": 253}
BLOCK_B = 8


@dataclass(frozen=True)
class Case(aot.Case):
    """Its kind is one of WIDTHS. Keys in fp32 are normalised and written to a queue in bf16."""

    @property
    def intended_blocks(self) -> int:
        return 4

    @property
    def launch(self) -> Launch:
        width = WIDTHS[self.kind]
        sizes = {"B": 256, "K": 65536, "skipped": 0, "D": width, "stride_qk": width, "stride_kb": width}
        return Launch(sizes | {"stride_qd": 1, "stride_kd": 1}, BLOCK_B * width, program=(3, 0, 0))

    def build(self) -> Resources:
        types = {"QUEUE": "*bf16", "POINTER": "*i64", "KEYS": "*fp32"} | dict.fromkeys(("B", "K", "skipped"), "i64")
        types |= dict.fromkeys(("D", "stride_qk", "stride_qd", "stride_kb", "stride_kd"), "i32")
        constants: dict[str, Any] = {"NORMALIZE": True, "BLOCK_B": BLOCK_B, "BLOCK_D": 128}
        divisible: tuple[str, ...] = ()
        if self.kind == "aligned":
            constants |= {"stride_qd": 1, "stride_kd": 1}
            divisible = ("QUEUE", "KEYS", "D", "stride_qk", "stride_kb")
        return build(_enqueue_kernel, CHIPS[self.chip], types, constants, divisible, num_warps=4)


def cases() -> list[Case]:
    return [Case(chip, kind) for chip, kind in itertools.product(CHIPS, WIDTHS)]


@pytest.mark.parametrize("case", cases(), ids=str)
def test_resources_and_executed_instructions(case):
    made = aot.compiled(case)
    aot.assert_sound(made)
    assert made.registers <= 96
    assert aot.blocks_per_multiprocessor(made, case.chip) >= case.intended_blocks
    if case.kind == "aligned" and case.chip != "gfx942":
        assert made.count(r"STG\S*\.(64|128)") > 0, "rows are not written several elements at a time"
    BUDGET.check(case)


def test_nothing_recompiles_when_sizes_change():
    aot.assert_sizes_do_not_recompile(_enqueue_kernel, ("B", "K", "skipped"))
