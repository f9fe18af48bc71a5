"""Every shipped configuration of the softmax over keys, compiled for chips that need not be there.

Asserted of each: no spills, shared memory within the chip's limit, matrix instructions where the products are to run on
the tensor cores and none where fp32 is to stay fp32, one exponential per element, wide loads where rows are aligned.
What a usual program executes is compared with key_softmax_budget.json, which `python tests/triton_kernels/report.py`
writes anew, for a new compiler or a change that is meant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import aot
import pytest
from aot import CHIPS, KINDS, Budget, Launch, Resources, build
from covering import covering, covering_cases

from ssl_kernels.kernels.info_nce import _info_nce_gradients_kernel, _info_nce_rows_kernel
from ssl_kernels.kernels.key_softmax import (
    CONFIGS,
    Config,
    _key_softmax_kernel,
    _merge_splits_kernel,
    converts_keys_first,
    kernel_constants,
)

BUDGET = Budget("key_softmax")
WIDTHS = {"whole": 128, "deep": 512, "unaligned": 253, "narrow": 128}
PLACES = {"whole": 0, "deep": 1, "unaligned": 2, "narrow": 1}  # of their configurations: for few features, measured


@dataclass(frozen=True)
class Case(aot.Case):
    query: str  # Triton's types
    keys: str
    size: str
    result: str = "mean"  # or "lse" alone

    @property
    def config(self) -> Config:
        return CONFIGS[CHIPS[self.chip].family, self.kind][PLACES[self.size]]

    @property
    def launch(self) -> Launch:
        """The second of 128 splits of a queue, for the first queries and columns."""
        width, span = WIDTHS[self.size], 512
        sizes = {"M": 256, "K": 128 * span, "span": span, "D": width, "stride_qm": width, "stride_kn": width}
        return Launch(sizes | {"stride_qd": 1, "stride_kd": 1}, self.config.block_m * span, program=(0, 1, 0))

    def build(self) -> Resources:
        want_mean = self.result == "mean"
        fixed: dict[str, Any] = kernel_constants(self.config, self.kind, WIDTHS[self.size], want_mean)
        keys = self.query if converts_keys_first(CHIPS[self.chip].family, self.kind) else self.keys
        types = {"QUERY": f"*{self.query}", "KEYS": f"*{keys}"}
        types |= dict.fromkeys(("MAXIMA", "SUMS", "MEANS", "SCALE"), "*fp32")
        types |= dict.fromkeys(("M", "K", "span"), "i64")
        types |= dict.fromkeys(("D", "stride_qm", "stride_qd", "stride_kn", "stride_kd"), "i32")
        divisible = {"MAXIMA", "SUMS", "MEANS", "SCALE"}
        if self.size != "unaligned":
            fixed |= {"stride_qd": 1, "stride_kd": 1}
            divisible |= {"QUERY", "KEYS", "D", "stride_qm", "stride_kn"}
        if not want_mean:
            fixed |= {"MEANS": None}
        warps, stages = self.config.num_warps, self.config.num_stages
        return build(_key_softmax_kernel, CHIPS[self.chip], types, fixed, divisible, warps, stages)


def cases() -> list[Case]:
    """Unaligned ones come with keys of another dtype: there is nothing larger than those."""
    found = []
    for chip, kind in itertools.product(CHIPS, KINDS):
        own, other = ("bf16", "fp32") if kind == "half" else ("fp32", "bf16")
        found += [Case(chip, kind, own, own, "deep"), Case(chip, kind, own, other, "unaligned")]
        if kind != "ieee":  # which has one configuration for all aligned widths
            found += [Case(chip, kind, own, own, "whole")]
        if kind == "half":
            found += [Case(chip, kind, "fp16", "fp32", "whole")]
    return [*found, Case("sm_90", "half", "bf16", "bf16", "whole", "lse")]


@covering(1, chip=CHIPS, kind=["half", "tf32"])
def test_what_measurements_may_choose_has_the_resources_too(chip, kind):
    dtype = "bf16" if kind == "half" else "fp32"
    Case(chip, kind, dtype, dtype, "narrow").check_resources()


@covering_cases(1, cases(), also=aot.config_of_the_usual_chip)
def test_resources_and_executed_instructions(case):
    made = case.check_resources()
    # One of each element, and one of each row; a compiler may prepare the first step apart from the others.
    assert 1 <= made.count(r"MUFU\.EX2|v_exp_f32") / case.elements_per_thread <= 2.7
    if case.size != "unaligned" and case.chip != "gfx942":
        assert made.count(r"(LDGSTS|LDG)\S*\.128") > 0, "keys are not read 16 bytes at a time"
    BUDGET.check(case)


@pytest.mark.parametrize("chip", CHIPS)
def test_merging_takes_few_registers(chip):
    types = dict.fromkeys(("MAXIMA", "SUMS", "MEANS", "LSE", "MEAN", "SCALE"), "*fp32")
    types |= {"M": "i64", "D": "i32", "splits": "i32"}
    constants = {"WANT_MEAN": True, "SPLITS": 16, "BLOCK_E": 128}
    made = build(_merge_splits_kernel, CHIPS[chip], types, constants, num_warps=4)
    aot.assert_sound(made)
    assert made.registers <= 128


@covering(1, chip=CHIPS, width=[1000, 256])
def test_rows_and_gradients_take_few_registers(chip, width):
    """Of aligned rows, and of others."""
    in_16_bits = ("QUERY", "POSITIVE", "BY_QUERY", "BY_POSITIVE")
    types = dict.fromkeys(in_16_bits, "*bf16") | {"factor": "fp32"}
    types |= dict.fromkeys(("LSE", "SCALE", "PULL", "LOSS", "SLOPE", "UPSTREAM", "BY_SCALE"), "*fp32")
    types |= dict.fromkeys(("D", "stride_qm", "stride_qd", "stride_pm", "stride_pd", "stride_u"), "i32")
    divisible = [name for name, kind in types.items() if kind.startswith("*")] + ["D", "stride_qm", "stride_pm"]
    for kernel in (_info_nce_rows_kernel, _info_nce_gradients_kernel):
        given: dict[str, Any] = {"BLOCK_D": 256 if width == 256 else 1024}
        if kernel is _info_nce_rows_kernel:
            given["POSITIVE_IS_KEY"] = False
        if width == 256:
            given |= {name: 1 for name in ("stride_qd", "stride_pd") if name in kernel.arg_names}
        own = {name: kind for name, kind in types.items() if name in kernel.arg_names}
        warps = 1 if width == 256 else 4
        made = build(kernel, CHIPS[chip], own, given, divisible if width == 256 else (), num_warps=warps)
        aot.assert_sound(made)
        assert made.registers <= 96


def test_nothing_recompiles_when_sizes_change():
    aot.assert_sizes_do_not_recompile(_key_softmax_kernel, ("M", "K", "span"))
