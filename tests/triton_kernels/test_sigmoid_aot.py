"""Every shipped configuration of the sigmoid kernel, compiled for chips that need not be there.

Asserted of each: no spills, shared memory within the chip's limit, matrix instructions where the products are to run on
the tensor cores and none where fp32 is to stay fp32, one exponential and one reciprocal square root per element and no
logarithm, wide loads and stores where rows are aligned. The size of the code is compared with sigmoid_budget.json;
`python tests/triton_kernels/test_sigmoid_aot.py` writes that file anew, for a new compiler or a change that is meant.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from aot import CHIPS, Resources, build, compiler_version

from ssl_kernels.kernels.sigmoid import CONFIGS, Config, _sigmoid_panel_kernel, _softplus_and_sigma, kernel_constants

BUDGET = pathlib.Path(__file__).with_name("sigmoid_budget.json")
FAMILY = {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_100", "gfx942": "gfx9"}
CONSUMER_SHARED_BYTES = 99 * 1024  # of the chips that run the configurations of sm_80 besides the A100
TRITON_TYPE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class Case(NamedTuple):
    chip: str
    kind: str
    dtype: torch.dtype
    size: str
    variant: str

    def __str__(self) -> str:
        return "-".join([self.chip, self.kind, TRITON_TYPE[self.dtype], self.size, self.variant])

    @property
    def config(self) -> Config:
        return CONFIGS[FAMILY[self.chip], self.kind][self.size == "small"]


def cases() -> list[Case]:
    """Large tiles are given to aligned rows only; small ones to any."""
    found = []
    for chip, kind in ((chip, kind) for chip in CHIPS for kind in ("half", "tf32", "ieee")):
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        found += [Case(chip, kind, dtype, "large", v) for v in ("plain", "positive_ids", "ignored_ids", "loss_only")]
        found += [Case(chip, kind, dtype, "small", v) for v in ("plain", "unaligned", "unaligned_positive_ids")]
        if kind == "half":
            found += [
                Case(chip, kind, torch.float16, "large", "plain"),
                Case(chip, kind, torch.float16, "small", "plain"),
            ]
    return found


@functools.cache
def compiled(case: Case) -> Resources:
    """The kernel as the launcher would specialise it for this case."""
    element = TRITON_TYPE[case.dtype]
    aligned = not case.variant.startswith("unaligned")
    has_ids, loss_only = case.variant.endswith("_ids"), case.variant == "loss_only"
    width = case.config.block_d * 8 + (0 if aligned else 3)
    ignored = case.variant == "ignored_ids"
    constants = kernel_constants(case.config, case.kind, width, has_ids, ignored, loss_only, with_grad=True)

    types = {"X": f"*{element}", "Y": f"*{element}", "GRAD": f"*{element}", "X_IDS": "*i64", "Y_IDS": "*i64"}
    types |= dict.fromkeys(("PARTIALS", "SCALE", "BIAS"), "*fp32")
    types |= dict.fromkeys(("m", "n", "diagonal"), "i64")
    types |= dict.fromkeys(("D", "stride_xm", "stride_xd", "stride_yn", "stride_yd", "stride_gm"), "i32")
    divisible = {"PARTIALS", "SCALE", "BIAS", "X_IDS", "Y_IDS"}  # allocated whole, or cut at multiples of 16
    fixed: dict[str, Any] = dict(constants)
    if aligned:
        fixed |= {"stride_xd": 1, "stride_yd": 1}
        divisible |= {"X", "Y", "GRAD", "D", "stride_xm", "stride_yn", "stride_gm"}
    if not has_ids:
        fixed |= {"X_IDS": None, "Y_IDS": None}
    if loss_only:
        fixed |= {"GRAD": None}
    types = {name: kind for name, kind in types.items() if name not in fixed}
    return build(
        _sigmoid_panel_kernel,
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

    exponentials, roots = made.count(r"MUFU\.EX2|v_exp_f32"), made.count(r"MUFU\.RSQ|v_rsq_f32")
    # One of each per element, and some for the vectors of positives.
    assert 1 <= exponentials / elements_per_thread(case) <= 1.3
    assert 1 <= roots / elements_per_thread(case) <= 1.3
    assert made.count(r"MUFU\.LG2|v_log_f32") == 0
    # What remains is the division of the program number into a row and a column block.
    assert made.count(r"MUFU\.(RCP|SQRT|TANH)|v_(rcp|sqrt)_\w*f32") <= 6
    assert made.count(r"REDG|RED\.|ATOMG|ATOM\.|global_atomic") == 0

    if not case.variant.startswith("unaligned") and case.chip != "gfx942":
        assert made.count(r"LDGSTS\S*\.128") > 0, "rows are not copied to shared memory 16 bytes at a time"
        if case.variant != "loss_only":
            assert made.count(r"STG\S*\.128") > 0, "G is not stored 16 bytes at a time"


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
        made = build(_elementwise_kernel, CHIPS[chip], types, {"HOW": how, "BLOCK": block}, tuple(types), warps, 1)
        count[how] = made.instructions * warps * CHIPS[chip].target.warp_size / block
    assert count["ours"] - count["neither"] < 13.5
    assert count["formula"] - count["neither"] > 35


def recorded() -> dict[str, Any]:
    return json.loads(BUDGET.read_text())


@pytest.mark.parametrize("case", cases(), ids=str)
def test_instructions_stay_within_the_recorded_budget(case):
    budget = recorded()
    if budget["compiler"] != compiler_version():
        pytest.skip(f"recorded with {budget['compiler']}, this is {compiler_version()}")
    assert instructions_per_element(case) == pytest.approx(budget["instructions_per_element"][str(case)], rel=0.05)


def test_nothing_recompiles_when_sizes_change():
    parameters = {p.name: p for p in _sigmoid_panel_kernel.params}
    for name in ("m", "n", "diagonal"):
        assert parameters[name].do_not_specialize
        assert parameters[name].annotation_type == "i64"  # whatever the value, which otherwise picks the type


def write_budget() -> None:
    figures = {str(case): round(instructions_per_element(case), 1) for case in cases()}
    BUDGET.write_text(
        json.dumps({"compiler": compiler_version(), "instructions_per_element": figures}, indent=2) + "\n"
    )


if __name__ == "__main__":
    write_budget()
