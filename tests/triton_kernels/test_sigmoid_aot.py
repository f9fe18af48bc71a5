"""Every shipped configuration of the sigmoid kernel, compiled for chips that need not be there.

Asserted of each: no spills, shared memory within the chip's limit, matrix instructions where the products are to run on
the tensor cores and none where fp32 is to stay fp32, one exponential per element, one reciprocal square root where the
gradient is wanted, and no logarithm, wide loads and stores where rows are aligned. What a usual program executes is
compared with sigmoid_budget.json, which `python tests/triton_kernels/report.py` writes anew, for a new compiler or a
change that is meant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import aot
import pytest
import triton
import triton.language as tl
from aot import CHIPS, KINDS, Budget, Launch, Resources, build
from covering import covering_cases

from ssl_kernels.kernels.sigmoid import (
    CONFIGS,
    Config,
    _sigmoid_panel_kernel,
    _softplus_and_sigma,
    config_for,
    kernel_constants,
)

BUDGET = Budget("sigmoid")


@dataclass(frozen=True)
class Case(aot.Case):
    dtype: str  # Triton's name
    size: str
    variant: str

    @property
    def aligned(self) -> bool:
        return not self.variant.startswith("unaligned")

    @property
    def config(self) -> Config:
        family = CHIPS[self.chip].family
        return config_for(CONFIGS[family, self.kind][self.size == "small"], family, self.variant.endswith("_ids"))

    @property
    def intended_blocks(self) -> int:
        return self.config.blocks

    @property
    def launch(self) -> Launch:
        """A tile that meets neither an edge nor the diagonal."""
        return aot.panel_launch(self.config, aligned=self.aligned)

    def build(self) -> Resources:
        has_ids, ignored, loss_only = (self.variant.endswith(s) for s in ("_ids", "ignored_ids", "loss_only"))
        width = self.config.block_d * 8 + (0 if self.aligned else 3)
        fixed: dict[str, Any] = kernel_constants(
            self.config, self.kind, width, has_ids, ignored, loss_only, with_grad=True
        )
        types = aot.operand_types(self.config, self.dtype, self.aligned)
        types |= dict.fromkeys(("X_IDS", "Y_IDS"), "*i64") | dict.fromkeys(("PARTIALS", "SCALE", "BIAS"), "*fp32")
        types |= dict.fromkeys(("m", "n", "diagonal"), "i64")
        types |= dict.fromkeys(("D", "stride_xm", "stride_xd", "stride_yn", "stride_yd", "stride_gm"), "i32")
        divisible = {"PARTIALS", "SCALE", "BIAS", "X_IDS", "Y_IDS"}  # allocated whole, or cut at multiples of 16
        if self.aligned:
            fixed |= {"stride_xd": 1, "stride_yd": 1}
            divisible |= {"D", "stride_xm", "stride_yn", "stride_gm"}
            divisible |= {name for name in ("X", "Y", "GRAD") if types[name].startswith("*")}
        if not has_ids:
            fixed |= {"X_IDS": None, "Y_IDS": None}
        if loss_only:
            fixed |= {"GRAD": None}
        warps, stages = self.config.num_warps, self.config.num_stages
        return build(_sigmoid_panel_kernel, CHIPS[self.chip], types, fixed, divisible, warps, stages)


def cases() -> list[Case]:
    """Large tiles are given to aligned rows only; small ones to any."""
    found = []
    for chip, kind in itertools.product(CHIPS, KINDS):
        dtype = "bf16" if kind == "half" else "fp32"
        found += [Case(chip, kind, dtype, "large", v) for v in ("plain", "positive_ids", "ignored_ids", "loss_only")]
        found += [Case(chip, kind, dtype, "small", v) for v in ("plain", "unaligned", "unaligned_positive_ids")]
        if kind == "half":
            found += [Case(chip, kind, "fp16", size, "plain") for size in ("large", "small")]
    return found


@covering_cases(1, cases(), also=aot.config_of_the_usual_chip)
def test_resources_and_executed_instructions(case):
    made = case.check_resources()
    # And some for the vectors of positives and row sums, of which each thread may have its own copy.
    assert 1 <= case.per_element(r"MUFU\.EX2|v_exp_f32") <= 1.1
    wanted = 0 if case.variant == "loss_only" else 1
    assert wanted <= case.per_element(r"MUFU\.RSQ|v_rsq_f32") <= wanted + 0.3
    # What remains is the division of the program number into a row and a column block.
    assert made.count(r"MUFU\.(RCP|SQRT|TANH)|v_(rcp|sqrt)_\w*f32") <= 6
    if case.aligned and case.chip != "gfx942":
        assert made.count(r"LDGSTS\S*\.128|UTMALDG") > 0, "rows are not copied to shared memory 16 bytes at a time"
        if case.variant != "loss_only":
            assert made.count(r"STG\S*\.128|UTMASTG") > 0, "G is not stored 16 bytes at a time"
    BUDGET.check(case)


@triton.jit
def _elementwise_kernel(S, G, LOSS, HOW: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    s = tl.load(S + at)
    if HOW == "ours":
        loss, g = _softplus_and_sigma(s)
    elif HOW == "formula":
        loss, g = tl.maximum(s, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(s))), tl.sigmoid(s)
    else:
        loss, g = s, 0.5 * s
    tl.store(LOSS + tl.program_id(0), tl.sum(loss, axis=0))
    tl.store(G + at, g.to(G.dtype.element_ty))


@pytest.mark.parametrize("chip", CHIPS)
def test_softplus_and_sigma_take_13_instructions(chip):
    block, warps = 4096, 4
    types = {"S": "*fp32", "G": "*bf16", "LOSS": "*fp32"}
    count = {}
    for how in ("neither", "ours", "formula"):
        made = build(_elementwise_kernel, CHIPS[chip], types, {"HOW": how, "BLOCK": block}, types, warps, 1)
        count[how] = made.instructions * warps * CHIPS[chip].target.warp_size / block
    assert count["ours"] - count["neither"] < 13.5
    assert count["formula"] - count["neither"] > 35


def test_nothing_recompiles_when_sizes_change():
    aot.assert_sizes_do_not_recompile(_sigmoid_panel_kernel, ("m", "n", "diagonal"))
