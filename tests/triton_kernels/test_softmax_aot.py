"""Every shipped configuration of the softmax kernels, compiled for chips that need not be there.

Asserted of each: no spills, shared memory within the chip's limit, matrix instructions where the products are to run on
the tensor cores and none where fp32 is to stay fp32, one exponential per element outside of the branches for wide
ranges, wide loads and stores where rows are aligned. What a usual program executes is compared with
softmax_budget.json, which `python tests/triton_kernels/report.py` writes anew, for a new compiler or a change that is
meant.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any

import aot
import pytest
from aot import CHIPS, KINDS, Budget, Launch, Resources, build
from covering import covering, covering_cases

from ssl_kernels.kernels import softmax_grad, softmax_stats
from ssl_kernels.kernels.configs import CONFIGS, Config
from ssl_kernels.kernels.softmax import config_for
from ssl_kernels.kernels.softmax_grad import _softmax_grad_kernel
from ssl_kernels.kernels.softmax_stats import _merge_stats_kernel, _softmax_stats_kernel
from ssl_kernels.kernels.softmax_summary import _finish_scalars_kernel, _summary_sums_kernel, _summary_vectors_kernel

BUDGET = Budget("softmax")


@dataclass(frozen=True)
class Case(aot.Case):
    dtype: str  # Triton's name
    kernel: str  # "stats" or "grad"
    size: str
    variant: str

    @property
    def has_ids(self) -> bool:
        return self.variant.endswith("_ids")

    @property
    def smoothed(self) -> bool:
        return self.has_ids or self.variant == "smoothed"

    @property
    def aligned(self) -> bool:
        return self.size != "small"

    @property
    def config(self) -> Config:
        family = CHIPS[self.chip].family
        shipped = CONFIGS[family, self.kind][self.size != "large"]
        return config_for(shipped, family, self.has_ids, self.smoothed, self.kernel == "grad")

    @property
    def intended_blocks(self) -> int:
        return self.config.blocks

    @property
    def launch(self) -> Launch:
        return aot.panel_launch(self.config, aligned=self.aligned, exponentials=1)

    def build(self) -> Resources:
        aligned = self.aligned
        width = self.config.block_d * 8 + (0 if aligned else 3)
        shared = (self.config, self.kind, width, self.has_ids, self.variant == "ignored_ids")
        strides = ["stride_xm", "stride_xd", "stride_yn", "stride_yd"]
        types = aot.operand_types(self.config, self.dtype, aligned)
        types |= dict.fromkeys(("X_IDS", "Y_IDS"), "*i64")
        types |= {"SCALE": "*fp32"} | dict.fromkeys(("m", "n", "positive", "excluded"), "i64")
        fixed: dict[str, Any]
        if self.kernel == "stats":
            fixed = softmax_stats.kernel_constants(*shared, self.variant != "rows_only", 6 if self.smoothed else 4)
            types |= dict.fromkeys(("ROW_PARTIALS", "COL_PARTIALS"), "*fp32")
            if self.variant == "rows_only":
                fixed |= {"COL_PARTIALS": None}
        else:
            fixed = softmax_grad.kernel_constants(*shared, has_uniform=self.smoothed, with_grad=True)
            vectors = [f"{side}_{name}" for side in ("ROW", "COL") for name in ("TOP", "SHARE", "TARGET", "UNIFORM")]
            types |= dict.fromkeys(("PARTIALS", *vectors), "*fp32")
            strides.append("stride_gm")
            if not self.smoothed:
                fixed |= {"ROW_UNIFORM": None, "COL_UNIFORM": None}
        types |= dict.fromkeys(("D", *strides), "i32")
        divisible = {"ROW_PARTIALS", "COL_PARTIALS", "PARTIALS", "SCALE"}
        if aligned:
            fixed |= {"stride_xd": 1, "stride_yd": 1}
            divisible |= {"D", "stride_xm", "stride_yn", "stride_gm"}
            divisible |= {name for name in ("X", "Y", "GRAD") if types[name].startswith("*")}
        if not self.has_ids:
            fixed |= {"X_IDS": None, "Y_IDS": None}
        kernel = _softmax_stats_kernel if self.kernel == "stats" else _softmax_grad_kernel
        warps, stages = self.config.num_warps, self.config.num_stages
        return build(kernel, CHIPS[self.chip], types, fixed, divisible, warps, stages)


def cases() -> list[Case]:
    """Of what may be asked for, the least and the most: variants with ids come with statistics for label smoothing and
    with uniform targets. Large tiles are given to aligned rows only; the small ones are compiled for any."""
    found = []
    for chip, kind in itertools.product(CHIPS, KINDS):
        dtype = "bf16" if kind == "half" else "fp32"
        variants = [("large", "plain"), ("small", "ignored_ids" if kind == "half" else "positive_ids")]
        if kind == "half":
            variants += [("large", "positive_ids")]
        found += [Case(chip, kind, dtype, kernel, *v) for kernel, v in itertools.product(("stats", "grad"), variants)]
    found += [Case(chip, "half", "bf16", "stats", "large", "rows_only") for chip in CHIPS]
    return [*found, Case("sm_90", "half", "fp16", "grad", "large", "plain")]


def others() -> list[Case]:
    """What else is launched where registers are scarce: small tiles of aligned rows ("few") and of others without ids,
    and label smoothing without ids."""
    found = []
    for chip, kernel in itertools.product(CHIPS, ("stats", "grad")):
        variants = [("large", "smoothed"), ("few", "plain"), ("small", "plain"), ("small", "smoothed")]
        found += [Case(chip, "half", "bf16", kernel, *v) for v in variants]
        if chip in ("sm_90", "sm_100"):
            found += [Case(chip, "tf32", "fp32", kernel, *v) for v in (("large", "smoothed"), ("few", "plain"))]
            found += [
                Case(chip, "half", "fp16", kernel, "large", "smoothed"),
                Case(chip, "half", "bf16", kernel, "few", "positive_ids"),
            ]
    return found


@covering_cases(1, others())
def test_others_have_the_resources_too(case):
    case.check_resources()


@covering_cases(1, cases(), also=aot.config_of_the_usual_chip)
def test_resources_and_executed_instructions(case):
    made = case.check_resources()
    # Where ranges are narrow, and those of the vectors, of which each thread may have its own copy.
    copies = 1.2 if case.has_ids or case.chip == "gfx942" else 0.4
    assert 1 <= case.per_element(r"MUFU\.EX2|v_exp_f32") <= 1 + copies
    # What remains is the division of the program number into a row and a column block.
    assert made.count(r"MUFU\.(RCP|SQRT|RSQ|TANH)|v_(rcp|rsq|sqrt)_\w*f32") <= 6
    if case.size == "large" and case.chip != "gfx942":
        assert made.count(r"LDGSTS\S*\.128|UTMALDG") > 0, "rows are not copied to shared memory 16 bytes at a time"
        if case.kernel == "grad":
            assert made.count(r"STG\S*\.128|UTMASTG") > 0, "G is not stored 16 bytes at a time"
    BUDGET.check(case)


@pytest.mark.parametrize("chip", CHIPS)
def test_merging_takes_few_registers(chip):
    types = {
        "PARTIALS": "*fp32",
        "STATISTICS": "*fp64",
        "SCALE": "*fp32",
        "size": "i64",
        "blocks": "i32",
        "stride_m": "i32",
    }
    constants = {"stride_k": 1, "STATS": 6, "BLOCK": 32, "BLOCKS": 32}
    made = build(_merge_stats_kernel, CHIPS[chip], types, constants, ("PARTIALS",), num_warps=4)
    aot.assert_sound(made)
    assert made.registers <= 128


@covering(1, chip=CHIPS, weighted=[True, False])
def test_what_is_made_of_statistics_takes_few_registers(chip, weighted):
    pointers = {"STATISTICS": "*fp64", "SUMS": "*fp64", "UNPAIRED": "*i64"}
    others = ("SCALE", "ROW_WEIGHT", "LOSS", "SCALARS", "VECTORS", "UPSTREAM", "FACTOR", "BY_SCALE", "BY_BIAS")
    pointers |= dict.fromkeys(others, "*fp32")
    sizes = ("rows", "columns", "row_blocks", "blocks")
    types = pointers | dict.fromkeys(sizes, "i64") | {"smoothing": "fp64"}
    shared: dict[str, Any] = {"SIDES": 2, "STATS": 6, "BLOCK": 256}
    for kernel, constants in (
        (_summary_sums_kernel, shared), (_summary_vectors_kernel, shared | {"MEAN": not weighted, "BLOCKS": 64}),
        (_finish_scalars_kernel, {}),
    ):  # fmt: skip
        own = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        given = constants if weighted else constants | {n: None for n in ("ROW_WEIGHT", "UPSTREAM") if n in own}
        made = build(kernel, CHIPS[chip], own, given, pointers, num_warps=4 if constants else 1)
        aot.assert_sound(made)
        assert made.registers <= 64
        aot.assert_sizes_do_not_recompile(kernel, [name for name in own if name in sizes])


@pytest.mark.parametrize("kernel", [_softmax_stats_kernel, _softmax_grad_kernel], ids=["stats", "grad"])
def test_nothing_recompiles_when_sizes_change(kernel):
    aot.assert_sizes_do_not_recompile(kernel, ("m", "n", "positive", "excluded"))
    # Slices of these begin anywhere when a batch is cut unevenly.
    for parameter in kernel.params:
        if re.match(r"(ROW|COL)_(TOP|SHARE|TARGET|UNIFORM)|[XY]_IDS", parameter.name):
            assert parameter.do_not_specialize_on_alignment
