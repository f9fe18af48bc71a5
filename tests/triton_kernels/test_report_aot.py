"""docs/gpu_static.md is what report.py makes of the budgets."""

from __future__ import annotations

import aot
import pytest
import report


def test_the_report_is_that_of_the_budgets():
    assert report.REPORT.read_text() == report.text(), "run python tests/triton_kernels/report.py"


@pytest.mark.parametrize("op", report.OPS)
def test_no_budget_has_spills(op):
    assert all(figures["spills"] == 0 for figures in report.load(op)["cases"].values())


def test_the_sigmoid_kernel_keeps_its_promise_on_hopper():
    cases = report.load("sigmoid")["cases"]
    assert cases["sm_90-half-bf16-large-loss_only"]["instructions"] <= 18
    assert cases["sm_90-half-bf16-large-plain"]["instructions"] <= 24


def test_width_is_that_of_the_launches():
    assert report.WIDTH == aot.WIDTH


@pytest.mark.parametrize("chip", report.PEAKS)
def test_a_model_is_the_largest_quotient(chip):
    peak = report.PEAKS[chip]
    work = report.Work(multiply_adds=peak.matrix_tflops * 1e9 / 2, dram_bytes=peak.dram_gb_per_s * 1e6 * 3)
    times = work.milliseconds(peak)
    assert times["tensor cores"] == pytest.approx(1)
    assert times["memory"] == pytest.approx(3)
    assert max(times, key=times.__getitem__) == "memory"
