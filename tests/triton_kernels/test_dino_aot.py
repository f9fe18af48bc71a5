"""The kernels of the distillation cross-entropy, compiled for chips that need not be there.

Asserted of each: no spills, no atomics, one exponential per element of a student and of a teacher and no logarithm,
wide loads and stores and no exchange between threads where rows are aligned. What a usual program executes is compared
with dino_budget.json, which `python tests/triton_kernels/report.py` writes anew, for a new compiler or a change that is
meant.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import aot
import pytest
from aot import CHIPS, Budget, Launch, Resources, build
from covering import covering_cases

from ssl_kernels.kernels.dino import (
    _STUDENT_POINTERS,
    _TEACHER_POINTERS,
    _WARPS,
    _forward_kernel,
    _grad_kernel,
    _merge_kernel,
    _scale_kernel,
)
from ssl_kernels.kernels.sinkhorn import block_of_row

BUDGET = Budget("dino")
KERNELS = {"forward": _forward_kernel, "grad": _grad_kernel}
DTYPES = ("bf16", "fp16", "fp32")
WIDTHS = {"even": 65536, "ragged": 65552, "unaligned": 65537}


@dataclass(frozen=True)
class Case(aot.Case):
    """Its kind is one of KERNELS, as there is no matrix product."""

    students: str  # Triton's types
    teachers: str
    rows: str  # one of WIDTHS
    variant: str = "plain"

    @property
    def block_k(self) -> int:
        return block_of_row(WIDTHS[self.rows], self.rows != "unaligned")

    @property
    def elements_per_thread(self) -> float:
        return self.block_k / (_WARPS * CHIPS[self.chip].target.warp_size)

    @property
    def intended_blocks(self) -> int:
        return 4

    @property
    def launch(self) -> Launch:
        """Four samples of DINO's two global and eight local crops, or of iBOT's patches. An element is a student's."""
        samples, span, width = 64, 4, WIDTHS[self.rows]
        students, teachers, own = (1, 1, 0) if self.variant == "one_crop" else (10, 2, 2)
        sizes = {"B": samples, "span": span, "V": students, "T": teachers, "own": own, "K": width}
        strides = dict.fromkeys(("stride_sr", "stride_tr"), samples * width * 10)
        strides |= dict.fromkeys(("stride_sb", "stride_tb"), width) | dict.fromkeys(("stride_sk", "stride_tk"), 1)
        return Launch(sizes | strides, students * span * self.block_k)

    def build(self) -> Resources:
        kernel, aligned, probs = KERNELS[self.kind], self.rows != "unaligned", self.variant == "probs"
        types = dict.fromkeys(kernel.arg_names, "*fp32")
        types |= dict.fromkeys((*_STUDENT_POINTERS, "GRAD"), f"*{self.students}")
        types |= dict.fromkeys(_TEACHER_POINTERS, f"*{self.teachers}")
        types |= dict.fromkeys(("B", "span"), "i64") | dict.fromkeys(("V", "T", "own", "K"), "i32")
        strides = {name for name in kernel.arg_names if name.startswith("stride")}
        types |= dict.fromkeys(strides, "i32") | {"grad_scale": "fp32"}
        types = {name: types[name] for name in kernel.arg_names}
        fixed: dict[str, Any] = {
            "HAS_CENTER": not probs,
            "HAS_WEIGHTS": True,
            "TEACHER_PROBS": probs,
            "ALIGNED": aligned,
            "EVEN_K": self.rows == "even",
            "BLOCK_K": self.block_k,
        }
        fixed = {name: value for name, value in fixed.items() if name in types}
        # Where crops and samples begin is not asked, so that only what is allocated whole is known to be aligned.
        divisible = {name for name in types if types[name] == "*fp32"} - {*_STUDENT_POINTERS, *_TEACHER_POINTERS}
        divisible -= {"WEIGHTS"}
        if aligned:
            fixed |= {"stride_sk": 1, "stride_tk": 1}
            divisible |= {"GRAD", "K"} | strides
        if probs:
            fixed |= {"SHIFTS": None, "RECIPROCALS": None, "CENTER": None}
        return build(kernel, CHIPS[self.chip], types, fixed, divisible, _WARPS)


def cases() -> list[Case]:
    found = []
    for chip, kernel in itertools.product(CHIPS, KERNELS):
        found += [Case(chip, kernel, s, t, "even") for s, t in itertools.product(DTYPES, DTYPES)]
        found += [Case(chip, kernel, t, t, rows) for t in ("bf16", "fp32") for rows in ("ragged", "unaligned")]
        found += [
            Case(chip, kernel, "bf16", "fp32", "even", "probs"),
            Case(chip, kernel, *("bf16",) * 2, "even", "one_crop"),
        ]
    return found


@covering_cases(1, cases(), also=lambda case: (case.chip, case.kind))
def test_resources_and_executed_instructions(case):
    made = aot.compiled(case)
    aot.assert_sound(made)
    assert made.shared_bytes <= CHIPS[case.chip].shared_bytes
    assert aot.blocks_per_multiprocessor(made, case.chip) >= case.intended_blocks
    exponentials = made.count(r"MUFU\.EX2|v_exp_f32") / case.elements_per_thread
    assert exponentials == (1 if case.variant == "probs" else 2)
    assert made.count(r"MUFU\.LG2|v_log_f32") == 0
    if case.rows != "unaligned":
        if case.students != "fp32" or case.teachers == "fp32":  # else a thread loads more of a row than it can store
            assert made.shared_bytes <= 64, "elements move between threads"
        assert made.count(r"LDG\S*\.128|global_load_dwordx4") > 0, "rows are not read 16 bytes at a time"
        if case.kind == "grad":
            assert made.count(r"STG\S*\.128|global_store_dwordx4") > 0, "rows are not written 16 bytes at a time"
    BUDGET.check(case)


@pytest.mark.parametrize("chip", CHIPS)
def test_small_kernels_take_few_registers(chip):
    types = dict.fromkeys(
        ("MAXIMA", "SUMS", "DOTS", "MASSES", "WEIGHTS", "TEMPERATURE", "SHIFTS", "FACTORS", "LOSS"), "*fp32"
    )
    types |= {"V": "i32", "B": "i64", "splits": "i32"}
    constants = {"HAS_WEIGHTS": True, "STUDENTS": 16, "SPLITS": 16}
    made = build(_merge_kernel, CHIPS[chip], types, constants, num_warps=4)
    aot.assert_sound(made)
    assert made.registers <= 96
    types = {"GRAD": "*bf16", "FACTOR": "*fp32", "B": "i64", "stride_f": "i32", "K": "i32"}
    made = build(_scale_kernel, CHIPS[chip], types, {"BLOCK_K": 4096, "STEPS": 8}, ("GRAD", "K"), num_warps=4)
    aot.assert_sound(made)
    assert made.registers <= 96
    assert made.count(r"STG\S*\.128|global_store_dwordx4") > 0


def test_nothing_recompiles_when_batches_and_numbers_of_crops_change():
    for kernel in KERNELS.values():
        aot.assert_sizes_do_not_recompile(kernel, ("B", "span"))
        parameters = {p.name: p for p in kernel.params}
        for name in ("V", "T", "own"):
            assert parameters[name].do_not_specialize
            assert parameters[name].annotation_type == "i32"
        for name in (*_STUDENT_POINTERS, *_TEACHER_POINTERS):
            assert parameters[name].do_not_specialize_on_alignment
    aot.assert_sizes_do_not_recompile(_merge_kernel, ("B",))
    aot.assert_sizes_do_not_recompile(_scale_kernel, ("B",))
