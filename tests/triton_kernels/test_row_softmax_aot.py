"""Every shipped configuration of the kernels of the softmax over rows, compiled for chips that need not be there.

Asserted of each: no spills, shared memory within the chip's limit, matrix instructions where the products are to run on
the tensor cores and none where fp32 is to stay fp32, one exponential per element, wide loads and stores where rows are
aligned. What a usual program executes is compared with row_softmax_budget.json, which
`python tests/triton_kernels/report.py` writes anew, for a new compiler or a change that is meant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import aot
import pytest
from aot import CHIPS, KINDS, Budget, Launch, Resources, build
from covering import covering_cases

from ssl_kernels.kernels import row_softmax, row_softmax_grad, row_softmax_stats
from ssl_kernels.kernels.configs import CONFIGS, Config
from ssl_kernels.kernels.row_softmax_grad import _row_softmax_grad_kernel
from ssl_kernels.kernels.row_softmax_stats import _row_softmax_stats_kernel

BUDGET = Budget("row_softmax")
GUIDE_WIDTH = 384


@dataclass(frozen=True)
class Case(aot.Case):
    dtype: str  # Triton's name
    kernel: str  # "stats" or "grad"
    size: str  # "large", "few" (small tiles of aligned rows) or "small" (of others)
    variant: str  # words: "ids", "hard", "bias", "guide", "smoothed"; else "plain"

    def has(self, word: str) -> bool:
        return word in self.variant.split("+")

    @property
    def masked(self) -> bool:
        return self.has("ids") or self.has("hard") or self.has("guide")

    @property
    def aligned(self) -> bool:
        return self.size != "small"

    @property
    def config(self) -> Config:
        family = CHIPS[self.chip].family
        shipped = CONFIGS[family, self.kind][self.size != "large"]
        has_ids = self.has("ids") or self.has("hard")
        sums_columns = self.kernel == "grad" and self.has("bias")
        return row_softmax.fitted_for(
            shipped, family, has_ids, self.has("guide"), self.has("smoothed"), self.has("bias"), sums_columns
        )

    @property
    def intended_blocks(self) -> int:
        return self.config.blocks

    @property
    def launch(self) -> Launch:
        usual = aot.panel_launch(self.config, aligned=self.aligned, exponentials=1)
        guide = dict.fromkeys(("E", "stride_am", "stride_bn"), GUIDE_WIDTH) | {"stride_ad": 1, "stride_bd": 1}
        return Launch({**usual.arguments, **guide}, usual.elements, usual.program, usual.exponentials)

    def build(self) -> Resources:
        config, aligned, bias = self.config, self.aligned, self.has("bias")
        width = config.block_d * 8 + (0 if aligned else 3)
        has_ids = self.has("ids") or self.has("hard")
        logits, same_id = bias or self.has("hard"), 2 if self.has("hard") else 0
        fixed: dict[str, Any] = row_softmax.constants(
            config, self.kind, width, has_ids, same_id, logits, bias, self.has("guide"), config.block_d, self.kind,
            config.descriptors,
        )  # fmt: skip
        types = aot.operand_types(config, self.dtype, aligned)
        types |= {"GUIDE_X": types["X"], "GUIDE_Y": types["Y"]}
        types |= dict.fromkeys(("TARGET", "X_IDS", "Y_IDS"), "*i64") | dict.fromkeys(("m", "n"), "i64")
        types |= dict.fromkeys(("PARTIALS", "SCALES", "BIAS", "THRESHOLD"), "*fp32")
        strides = [f"stride_{side}" for side in ("xm", "xd", "yn", "yd", "am", "ad", "bn", "bd")]
        absent = [] if self.has("guide") else ["GUIDE_X", "GUIDE_Y", "THRESHOLD"]
        absent += [] if has_ids else ["X_IDS", "Y_IDS"]
        absent += [] if bias else ["BIAS"]
        if self.kernel == "stats":
            fixed = row_softmax_stats.kernel_constants(fixed, 6 if self.has("smoothed") else 4)
        else:
            fixed = row_softmax_grad.kernel_constants(fixed, self.has("smoothed"), True, bias)
            types |= dict.fromkeys(("COL_PARTIALS", "TOP", "SHARE", "TARGETS", "ALL"), "*fp32")
            strides.append("stride_gm")
            absent += [] if bias else ["COL_PARTIALS"]
            absent += [] if self.has("smoothed") else ["ALL"]
        types |= dict.fromkeys(("D", "E", *strides), "i32")
        divisible = {"PARTIALS", "COL_PARTIALS", "SCALES"}
        if aligned:
            fixed |= dict.fromkeys(("stride_xd", "stride_yd", "stride_ad", "stride_bd"), 1)
            divisible |= {"D", "E", "stride_xm", "stride_yn", "stride_am", "stride_bn", "stride_gm"}
            divisible |= {name for name in ("X", "Y", "GRAD", "GUIDE_X", "GUIDE_Y") if types[name].startswith("*")}
        if not self.has("guide"):  # as the launcher makes constants of zeros
            fixed |= {}
            types |= dict.fromkeys(("E", "stride_am", "stride_ad", "stride_bn", "stride_bd"), "i32")
        fixed |= dict.fromkeys(absent)
        kernel = _row_softmax_stats_kernel if self.kernel == "stats" else _row_softmax_grad_kernel
        return build(kernel, CHIPS[self.chip], types, fixed, divisible, config.num_warps, config.num_stages)


BOTH = ("stats", "grad")


def cases() -> list[Case]:
    """Of what may be asked for, the least and the most. Large tiles are given to aligned rows only; the small ones are
    compiled for any."""
    found = []
    for chip, kind in itertools.product(CHIPS, KINDS):
        dtype = "bf16" if kind == "half" else "fp32"
        variants = [("large", "plain"), ("small", "hard+bias+smoothed")]
        if kind == "half":
            variants += [("large", "bias"), ("large", "ids+guide")]
        found += [Case(chip, kind, dtype, kernel, *v) for kernel, v in itertools.product(BOTH, variants)]
    return [*found, Case("sm_90", "half", "fp16", "grad", "large", "plain")]


def others() -> list[Case]:
    """What else is launched where registers are scarce."""
    found = []
    for chip, kernel in itertools.product(CHIPS, BOTH):
        variants = [("large", "smoothed"), ("large", "bias+smoothed"), ("large", "hard+bias+smoothed")]
        variants += [("few", "plain"), ("few", "bias"), ("small", "guide"), ("few", "ids+guide")]
        found += [Case(chip, "half", "bf16", kernel, *v) for v in variants]
        found += [Case(chip, "tf32", "fp32", kernel, *v) for v in (("large", "bias+smoothed"), ("large", "ids+guide"))]
        found += [Case(chip, "ieee", "fp32", kernel, *v) for v in (("large", "bias+smoothed"), ("large", "ids+guide"))]
    return found


@covering_cases(1, others())
def test_others_have_the_resources_too(case):
    case.check_resources()


@covering_cases(1, cases(), also=lambda case: case.config)
def test_resources_and_executed_instructions(case):
    made = case.check_resources()
    copies = 1.2 if case.masked or case.chip == "gfx942" else 0.4  # those of the vectors
    assert 1 <= case.per_element(r"MUFU\.EX2|v_exp_f32") <= 1 + copies
    assert made.count(r"MUFU\.(RCP|SQRT|RSQ|TANH)|v_(rcp|rsq|sqrt)_\w*f32") <= 6  # of the program's number
    if case.size == "large" and case.chip != "gfx942":
        assert made.count(r"LDGSTS\S*\.128|UTMALDG") > 0, "rows are not copied to shared memory 16 bytes at a time"
        if case.kernel == "grad":
            assert made.count(r"STG\S*\.128|UTMASTG") > 0, "G is not stored 16 bytes at a time"
    BUDGET.check(case)


@pytest.mark.parametrize("kernel", [_row_softmax_stats_kernel, _row_softmax_grad_kernel], ids=BOTH)
def test_nothing_recompiles_when_sizes_change(kernel):
    aot.assert_sizes_do_not_recompile(kernel, ("m", "n"))
    for parameter in kernel.params:  # slices of these begin anywhere when a batch is cut unevenly
        if parameter.name in row_softmax.SLICES:
            assert parameter.do_not_specialize_on_alignment
