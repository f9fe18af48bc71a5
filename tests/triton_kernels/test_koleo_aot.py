"""Every configuration that the search for nearest neighbours uses, compiled for chips that need not be there.

Asserted of each: no spills, shared memory within the chip's limit, matrix instructions where the products are to run on
the tensor cores and none where fp32 is to stay fp32, wide loads where rows are aligned. What a usual program executes
is compared with koleo_budget.json, which `python tests/triton_kernels/report.py` writes anew, for a new compiler or a
change that is meant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import aot
import pytest
from aot import CHIPS, Budget, Launch, Resources, build
from covering import covering_cases

from ssl_kernels.kernels.koleo import CONFIGS, NUM_WARPS, Config, _koleo_panel_kernel, _merge_kernel, kernel_constants

BUDGET = Budget("koleo")


@dataclass(frozen=True)
class Case(aot.Case):
    size: str
    place: str  # of the panel: on the diagonal or above it
    layout: str = "aligned"

    @property
    def config(self) -> Config:
        shipped = CONFIGS[CHIPS[self.chip].family, self.kind][self.size == "small"]
        return replace(shipped, num_warps=NUM_WARPS)

    @property
    def launch(self) -> Launch:
        return aot.panel_launch(self.config, aligned=self.layout == "aligned")

    def build(self) -> Resources:
        aligned, on_diagonal = self.layout == "aligned", self.place == "diagonal"
        width = self.config.block_d * 8 + (0 if aligned else 3)
        fixed: dict[str, Any] = kernel_constants(self.config, self.kind, width, on_diagonal)
        types = {name: kind for name, kind in aot.operand_types(self.config, "fp32", aligned).items() if name != "GRAD"}
        types |= dict.fromkeys(("ROW_BEST", "COL_BEST"), "*fp32")
        types |= dict.fromkeys(("ROW_PLACE", "COL_PLACE"), "*i32") | dict.fromkeys(("m", "n"), "i64")
        types |= dict.fromkeys(("D", "stride_xm", "stride_xd", "stride_yn", "stride_yd"), "i32")
        divisible = {"ROW_BEST", "COL_BEST", "ROW_PLACE", "COL_PLACE"}
        if aligned:
            fixed |= {"stride_xd": 1, "stride_yd": 1}
            divisible |= {"D", "stride_xm", "stride_yn"} | {name for name in ("X", "Y") if types[name].startswith("*")}
        if on_diagonal:
            fixed |= {"COL_BEST": None, "COL_PLACE": None}
        warps, stages = self.config.num_warps, self.config.num_stages
        return build(_koleo_panel_kernel, CHIPS[self.chip], types, fixed, divisible, warps, stages)


def cases() -> list[Case]:
    """Large tiles are given to aligned rows only; small ones to any. Rows are always fp32."""
    found = []
    for chip, kind in itertools.product(CHIPS, ("tf32", "ieee")):
        found += [Case(chip, kind, size, "above") for size in ("large", "small")]
        found += [Case(chip, kind, "large", "diagonal"), Case(chip, kind, "small", "above", "unaligned")]
    return found


@covering_cases(1, cases(), also=aot.config_of_the_usual_chip)
def test_resources_and_executed_instructions(case):
    made = case.check_resources()
    if case.layout == "aligned" and case.chip != "gfx942":
        assert made.count(r"LDGSTS\S*\.128|UTMALDG") > 0, "rows are not copied to shared memory 16 bytes at a time"
    BUDGET.check(case)


@pytest.mark.parametrize("chip", CHIPS)
def test_merging_takes_few_registers(chip):
    types = {"FOUND": "*fp32", "PLACE": "*i32", "BEST": "*fp32", "NEIGHBOR": "*i64"}
    types |= dict.fromkeys(("size", "slots", "first"), "i64")
    made = build(_merge_kernel, CHIPS[chip], types, {"BLOCK": 256}, num_warps=4)
    aot.assert_sound(made)
    assert made.registers <= 64


def test_nothing_recompiles_when_sizes_change():
    aot.assert_sizes_do_not_recompile(_koleo_panel_kernel, ("m", "n"))
    aot.assert_sizes_do_not_recompile(_merge_kernel, ("size", "slots", "first"))
