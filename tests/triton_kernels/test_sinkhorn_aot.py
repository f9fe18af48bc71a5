"""The kernels of teacher assignments, compiled for chips that need not be there.

Asserted of each: no spills, no atomics, one exponential per element, wide loads and stores and no exchange of elements
between threads where rows are aligned. What a usual program executes is compared with sinkhorn_budget.json, which
`python tests/triton_kernels/report.py` writes anew, for a new compiler or a change that is meant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import aot
import pytest
from aot import CHIPS, Budget, Launch, Resources, build
from covering import covering_cases

from ssl_kernels.kernels.sinkhorn import (
    _BLOCK_ROWS,
    _WARPS,
    _centered_softmax_kernel,
    _column_lse_kernel,
    _column_sums_kernel,
    _merge_columns_kernel,
    _merge_rows_kernel,
    _row_stats_kernel,
    block_of_row,
    columns_of_tile,
)

BUDGET = Budget("sinkhorn")
KERNELS = {
    "row_stats": _row_stats_kernel,
    "centered_softmax": _centered_softmax_kernel,
    "column_lse": _column_lse_kernel,
    "column_sums": _column_sums_kernel,
}
WIDTHS = {"even": 65536, "ragged": 65552, "unaligned": 65537}


@dataclass(frozen=True)
class Case(aot.Case):
    """Its kind is one of KERNELS, as there is no matrix product."""

    dtype: str  # Triton's name
    rows: str  # one of WIDTHS

    @property
    def is_tiled(self) -> bool:
        return self.kind.startswith("column")

    @property
    def block_k(self) -> int:
        width = WIDTHS[self.rows]
        if self.is_tiled:
            return columns_of_tile(width, CHIPS[self.chip].family, self.rows != "unaligned")
        return block_of_row(width, self.rows != "unaligned")

    @property
    def elements_per_thread(self) -> float:
        elements = self.block_k * (_BLOCK_ROWS if self.is_tiled else 1)
        return elements / (_WARPS * CHIPS[self.chip].target.warp_size)

    @property
    def intended_blocks(self) -> int:
        return 2 if self.is_tiled else 4

    @property
    def launch(self) -> Launch:
        """Of 4096 rows, 64 where a program takes a tile of columns, and 8 of each of two crops or in all elsewhere."""
        width = WIDTHS[self.rows]
        span, crops = (64, 1) if self.is_tiled else (8, 2 if self.kind == "row_stats" else 1)
        sizes = {"N": 4096, "B": 4096, "crops": crops, "span": span, "K": width}
        strides = {"stride_xn": 4096 * width if self.kind == "row_stats" else width, "stride_xb": width, "stride_xk": 1}
        return Launch(sizes | strides, crops * span * self.block_k)

    def build(self) -> Resources:
        kernel = KERNELS[self.kind]
        types = dict.fromkeys(kernel.arg_names, "*fp32") | {"X": f"*{self.dtype}", "crops": "i32", "K": "i32"}
        types |= dict.fromkeys(("B", "N", "span"), "i64")
        strides = {name for name in kernel.arg_names if name.startswith("stride")}
        types |= dict.fromkeys(strides, "i32")
        types = {name: types[name] for name in kernel.arg_names}
        fixed: dict[str, Any] = {
            "HAS_CENTER": True,
            "EVEN_K": self.rows == "even",
            "BLOCK_N": _BLOCK_ROWS,
            "BLOCK_K": self.block_k,
        }
        fixed = {name: value for name, value in fixed.items() if name in types}
        divisible = {name for name in types if types[name] == "*fp32"}
        if self.kind == "row_stats":
            divisible -= {"MAXIMA", "SUMS"}
        if self.rows != "unaligned":
            fixed |= {"stride_xk": 1}
            divisible |= {"X", "K"} | strides
        return build(kernel, CHIPS[self.chip], types, fixed, divisible, _WARPS)


def cases() -> list[Case]:
    return [
        Case(chip, kernel, dtype, rows)
        for chip, kernel, dtype, rows in itertools.product(CHIPS, KERNELS, ("bf16", "fp16", "fp32"), WIDTHS)
        if dtype != "fp16" or rows == "even"
    ]


@covering_cases(1, cases(), also=lambda case: (case.chip, case.kind))
def test_resources_and_executed_instructions(case):
    made = aot.compiled(case)
    aot.assert_sound(made)
    assert made.shared_bytes <= CHIPS[case.chip].shared_bytes
    assert aot.blocks_per_multiprocessor(made, case.chip) >= case.intended_blocks
    exponentials = made.count(r"MUFU\.EX2|v_exp_f32") / case.elements_per_thread
    # The sum of a column fades once for each tile.
    assert exponentials == (1 + 1 / _BLOCK_ROWS if case.kind == "column_lse" else 1)
    assert made.count(r"MUFU\.LG2|v_log_f32") == 0
    if case.rows != "unaligned":
        if case.kind == "row_stats" or case.dtype == "fp32":  # else a thread loads more of a row than it can store
            assert made.shared_bytes <= 64, "elements move between threads"
        assert made.count(r"LDG\S*\.128|global_load_dwordx4") > 0, "rows are not read 16 bytes at a time"
        if case.kind == "centered_softmax":
            assert made.count(r"STG\S*\.128|global_store_dwordx4") > 0, "rows are not written 16 bytes at a time"
    BUDGET.check(case)


@pytest.mark.parametrize("chip", CHIPS)
def test_merging_takes_few_registers(chip):
    types = dict.fromkeys(("MAXIMA", "SUMS", "TEMPERATURE", "SHIFTS", "RECIPROCALS"), "*fp32") | {
        "rows": "i64",
        "splits": "i32",
    }
    made = build(_merge_rows_kernel, CHIPS[chip], types, {"ROWS": 32, "SPLITS": 16}, num_warps=4)
    aot.assert_sound(made)
    assert made.registers <= 64
    types = dict.fromkeys(("MAXIMA", "SUMS", "TEMPERATURE", "MAXIMUM", "SUM"), "*fp32") | {"K": "i32", "splits": "i32"}
    made = build(_merge_columns_kernel, CHIPS[chip], types, {"BLOCK_K": 256}, num_warps=4)
    aot.assert_sound(made)
    assert made.registers <= 64


def test_nothing_recompiles_when_batches_change():
    aot.assert_sizes_do_not_recompile(_row_stats_kernel, ("B", "span"))
    aot.assert_sizes_do_not_recompile(_merge_rows_kernel, ("rows",))
    for kernel in (_column_lse_kernel, _column_sums_kernel, _centered_softmax_kernel):
        aot.assert_sizes_do_not_recompile(kernel, ("N", "span"))
