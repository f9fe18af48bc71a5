"""Every shipped configuration of the softmax kernels, compiled for chips that need not be there.

Asserted of each: no spills, shared memory within the chip's limit, matrix instructions where the products are to run on
the tensor cores and none where fp32 is to stay fp32, one exponential per element outside of the branches for wide
ranges, wide loads and stores where rows are aligned. The size of the code is compared with softmax_budget.json;
`python tests/triton_kernels/test_softmax_aot.py` writes that file anew, for a new compiler or a change that is meant.
"""

from __future__ import annotations

import functools
import itertools
import json
import pathlib
import re
from typing import Any, NamedTuple

import pytest
import torch
from aot import CHIPS, Resources, build, compiler_version

from ssl_kernels.kernels.softmax import (
    CONFIGS,
    Config,
    _merge_stats_kernel,
    _softmax_grad_kernel,
    _softmax_stats_kernel,
    config_for,
    grad_constants,
    stats_constants,
)

BUDGET = pathlib.Path(__file__).with_name("softmax_budget.json")
FAMILY = {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "gfx942": "gfx9"}
CONSUMER_SHARED_BYTES = 99 * 1024  # of the chips that run the configurations of sm_80 besides the A100
TRITON_TYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Case(NamedTuple):
    chip: str
    kind: str
    dtype: torch.dtype
    kernel: str  # "stats" or "grad"
    size: str
    variant: str

    def __str__(self) -> str:
        return "-".join([self.chip, self.kind, TRITON_TYPE[self.dtype], self.kernel, self.size, self.variant])

    @property
    def config(self) -> Config:
        config = CONFIGS[FAMILY[self.chip], self.kind][self.size == "small"]
        return config_for(config, FAMILY[self.chip], self.variant.endswith("_ids"))


def cases() -> list[Case]:
    """Of what may be asked for, the least and the most: variants with ids come with statistics for label smoothing and
    with uniform targets. Large tiles are given to aligned rows only; the small ones are compiled for any."""
    found = []
    for chip, kind in itertools.product(CHIPS, ("half", "tf32", "ieee")):
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        variants = [("large", "plain"), ("small", "ignored_ids" if kind == "half" else "positive_ids")]
        if kind == "half":
            variants += [("large", "positive_ids")]
        found += [Case(chip, kind, dtype, kernel, *v) for kernel, v in itertools.product(("stats", "grad"), variants)]
    found += [Case(chip, "half", torch.bfloat16, "stats", "large", "rows_only") for chip in CHIPS]
    return [*found, Case("sm_90", "half", torch.float16, "grad", "large", "plain")]


@functools.cache
def compiled(case: Case) -> Resources:
    """The kernel as the launcher would specialise it for this case."""
    element = TRITON_TYPE[case.dtype]
    aligned, has_ids = case.size == "large", case.variant.endswith("_ids")
    width = case.config.block_d * 8 + (0 if aligned else 3)
    shared = (case.config, case.kind, width, has_ids, case.variant == "ignored_ids")
    strides = ["stride_xm", "stride_xd", "stride_yn", "stride_yd"]
    types = {"X": f"*{element}", "Y": f"*{element}", "SCALE": "*fp32", "X_IDS": "*i64", "Y_IDS": "*i64"}
    types |= dict.fromkeys(("m", "n", "positive", "excluded"), "i64")
    fixed: dict[str, Any]
    if case.kernel == "stats":
        fixed = {**stats_constants(*shared, case.variant != "rows_only"), "STATS": 6 if has_ids else 4}
        types |= dict.fromkeys(("ROW_PARTIALS", "COL_PARTIALS"), "*fp32")
        if case.variant == "rows_only":
            fixed |= {"COL_PARTIALS": None}
    else:
        fixed = grad_constants(*shared, has_uniform=has_ids, with_grad=True)
        vectors = [f"{side}_{name}" for side in ("ROW", "COL") for name in ("LSE", "WEIGHT", "TARGET", "UNIFORM")]
        types |= dict.fromkeys(("PARTIALS", *vectors), "*fp32") | {"GRAD": f"*{element}"}
        strides.append("stride_gm")
        if not has_ids:
            fixed |= {"ROW_UNIFORM": None, "COL_UNIFORM": None}
    types |= dict.fromkeys(("D", *strides), "i32")
    divisible = {"ROW_PARTIALS", "COL_PARTIALS", "PARTIALS", "SCALE"}
    if aligned:
        fixed |= {"stride_xd": 1, "stride_yd": 1}
        divisible |= {"X", "Y", "GRAD", "D", "stride_xm", "stride_yn", "stride_gm"}
    if not has_ids:
        fixed |= {"X_IDS": None, "Y_IDS": None}
    types = {name: kind for name, kind in types.items() if name not in fixed}
    return build(
        _softmax_stats_kernel if case.kernel == "stats" else _softmax_grad_kernel,
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
    """Static: the loop over D counts once, and rare tiles count as much as the usual ones."""
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

    # One exponential per element where ranges are narrow, two in the other branch, and those of the vectors.
    exponentials = made.count(r"MUFU\.EX2|v_exp_f32") / elements_per_thread(case)
    if case.variant == "rows_only":
        assert 1 <= exponentials <= 1.3
    else:
        assert 3 <= exponentials <= 4.3
    assert made.count(r"MUFU\.LG2|v_log_f32") == 0
    # What remains is the division of the program number into a row and a column block.
    assert made.count(r"MUFU\.(RCP|SQRT|RSQ|TANH)|v_(rcp|rsq|sqrt)_\w*f32") <= 6
    assert made.count(r"REDG|RED\.|ATOMG|ATOM\.|global_atomic") == 0

    if case.size == "large" and case.chip != "gfx942":
        assert made.count(r"LDGSTS\S*\.128") > 0, "rows are not copied to shared memory 16 bytes at a time"
        if case.kernel == "grad":
            assert made.count(r"STG\S*\.128") > 0, "G is not stored 16 bytes at a time"


@pytest.mark.parametrize("chip", CHIPS)
def test_merging_takes_few_registers(chip):
    types = {"PARTIALS": "*fp32", "STATISTICS": "*fp64", "size": "i64", "blocks": "i32", "stride_m": "i32"}
    constants = {"stride_k": 1, "STATS": 6, "BLOCK": 32, "BLOCKS": 32}
    made = build(_merge_stats_kernel, CHIPS[chip], types, constants, ("PARTIALS",), num_warps=4)
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


@pytest.mark.parametrize("kernel", [_softmax_stats_kernel, _softmax_grad_kernel], ids=["stats", "grad"])
def test_nothing_recompiles_when_sizes_change(kernel):
    parameters = {p.name: p for p in kernel.params}
    for name in ("m", "n", "positive", "excluded"):
        assert parameters[name].do_not_specialize
        assert parameters[name].annotation_type == "i64"  # whatever the value, which otherwise picks the type
    # Slices of these begin anywhere when a batch is cut unevenly.
    for name in [name for name in parameters if re.match(r"(ROW|COL)_(LSE|WEIGHT|TARGET|UNIFORM)|[XY]_IDS", name)]:
        assert parameters[name].do_not_specialize_on_alignment


def write_budget() -> None:
    figures = {str(case): round(instructions_per_element(case), 1) for case in cases()}
    BUDGET.write_text(
        json.dumps({"compiler": compiler_version(), "instructions_per_element": figures}, indent=2) + "\n"
    )


if __name__ == "__main__":
    write_budget()
