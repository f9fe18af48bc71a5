"""Every shipped configuration of the softmax over keys, compiled for chips that need not be there.

Asserted of each: no spills, shared memory within the chip's limit, matrix instructions where the products are to run on
the tensor cores and none where fp32 is to stay fp32, one exponential per element, wide loads where rows are aligned.
The size of the code is compared with key_softmax_budget.json; `python tests/triton_kernels/test_key_softmax_aot.py`
writes that file anew, for a new compiler or a change that is meant.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
from typing import Any, NamedTuple

import pytest
from aot import CHIPS, Resources, build, compiler_version

from ssl_kernels.kernels.key_softmax import (
    CONFIGS,
    Config,
    _key_softmax_kernel,
    _merge_splits_kernel,
    kernel_constants,
)

BUDGET = pathlib.Path(__file__).with_name("key_softmax_budget.json")
FAMILY = {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "gfx942": "gfx9"}
CONSUMER_SHARED_BYTES = 99 * 1024  # of the chips that run the configurations of sm_80 besides the A100
SIZES = ("whole", "deep", "unaligned")


class Case(NamedTuple):
    chip: str
    kind: str
    query: str  # Triton's types
    keys: str
    size: str
    want_mean: bool = True

    def __str__(self) -> str:
        what = "mean" if self.want_mean else "lse"
        return "-".join([self.chip, self.kind, self.query, self.keys, self.size, what])

    @property
    def config(self) -> Config:
        return CONFIGS[FAMILY[self.chip], self.kind][SIZES.index(self.size)]


def cases() -> list[Case]:
    """Unaligned ones come with keys of another dtype: there is nothing larger than those."""
    found = []
    for chip, kind in itertools.product(CHIPS, ("half", "tf32", "ieee")):
        own, other = ("bf16", "fp32") if kind == "half" else ("fp32", "bf16")
        found += [Case(chip, kind, own, own, "deep"), Case(chip, kind, own, other, "unaligned")]
        if kind != "ieee":  # which has one configuration for all aligned widths
            found += [Case(chip, kind, own, own, "whole")]
        if kind == "half":
            found += [Case(chip, kind, "fp16", "fp32", "whole")]
    return [*found, Case("sm_90", "half", "bf16", "bf16", "whole", want_mean=False)]


@functools.cache
def compiled(case: Case) -> Resources:
    """The kernel as the launcher would specialise it for this case."""
    width = {"whole": 128, "deep": 512, "unaligned": 253}[case.size]
    fixed: dict[str, Any] = kernel_constants(case.config, case.kind, width, case.want_mean)
    types = {"QUERY": f"*{case.query}", "KEYS": f"*{case.keys}"}
    types |= dict.fromkeys(("MAXIMA", "SUMS", "MEANS", "SCALE"), "*fp32") | dict.fromkeys(("M", "K", "span"), "i64")
    types |= dict.fromkeys(("D", "stride_qm", "stride_qd", "stride_kn", "stride_kd"), "i32")
    divisible = {"MAXIMA", "SUMS", "MEANS", "SCALE"}
    if case.size != "unaligned":
        fixed |= {"stride_qd": 1, "stride_kd": 1}
        divisible |= {"QUERY", "KEYS", "D", "stride_qm", "stride_kn"}
    if not case.want_mean:
        fixed |= {"MEANS": None}
    types = {name: kind for name, kind in types.items() if name not in fixed}
    return build(
        _key_softmax_kernel,
        CHIPS[case.chip],
        types,
        fixed,
        tuple(sorted(divisible & types.keys())),
        num_warps=case.config.num_warps,
        num_stages=case.config.num_stages,
    )


def elements_per_thread(case: Case) -> float:
    threads = case.config.num_warps * CHIPS[case.chip].target.warp_size
    return case.config.block_m * case.config.block_n / threads


def instructions_per_element(case: Case) -> float:
    """Static: loops count once."""
    return compiled(case).instructions / elements_per_thread(case)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_resources(case):
    chip, made = CHIPS[case.chip], compiled(case)
    assert made.spills == 0
    assert made.shared_bytes <= chip.shared_bytes
    if case.chip == "sm_80":
        assert made.shared_bytes <= CONSUMER_SHARED_BYTES

    products = made.count(chip.matrix)
    if case.chip == "gfx942":  # its matrix unit also multiplies fp32 exactly
        assert products > 0
        assert (made.count(r"v_mfma_f32_\w*_xf32") > 0) == (case.kind == "tf32")
    else:
        assert (products > 0) == (case.kind != "ieee")

    # One of each element, and one of each row; a compiler may prepare the first step apart from the others.
    assert 1 <= made.count(r"MUFU\.EX2|v_exp_f32") / elements_per_thread(case) <= 2.7
    assert made.count(r"MUFU\.LG2|v_log_f32") == 0
    assert made.count(r"REDG|RED\.|ATOMG|ATOM\.|global_atomic") == 0
    if case.size != "unaligned" and case.chip != "gfx942":
        assert made.count(r"(LDGSTS|LDG)\S*\.128") > 0, "keys are not read 16 bytes at a time"


@pytest.mark.parametrize("chip", CHIPS)
def test_merging_takes_few_registers(chip):
    types = dict.fromkeys(("MAXIMA", "SUMS", "MEANS", "LSE", "MEAN"), "*fp32")
    types |= {"M": "i64", "D": "i32", "splits": "i32"}
    constants = {"WANT_MEAN": True, "SPLITS": 16, "BLOCK_E": 128}
    made = build(_merge_splits_kernel, CHIPS[chip], types, constants, num_warps=4)
    assert made.spills == 0
    assert made.registers <= 128
    assert made.count(r"REDG|RED\.|ATOMG|ATOM\.|global_atomic") == 0


def recorded() -> dict[str, Any]:
    return json.loads(BUDGET.read_text())


@pytest.mark.parametrize("case", cases(), ids=str)
def test_instructions_stay_within_the_recorded_budget(case):
    budget = recorded()
    if budget["compiler"] != compiler_version():
        pytest.skip(f"recorded with {budget['compiler']}, this is {compiler_version()}")
    assert instructions_per_element(case) == pytest.approx(budget["instructions_per_element"][str(case)], rel=0.05)


def test_nothing_recompiles_when_sizes_change():
    parameters = {p.name: p for p in _key_softmax_kernel.params}
    for name in ("M", "K", "span"):
        assert parameters[name].do_not_specialize
        assert parameters[name].annotation_type == "i64"  # whatever the value, which otherwise picks the type


def write_budget() -> None:
    figures = {str(case): round(instructions_per_element(case), 1) for case in cases()}
    BUDGET.write_text(
        json.dumps({"compiler": compiler_version(), "instructions_per_element": figures}, indent=2) + "\n"
    )


if __name__ == "__main__":
    write_budget()
