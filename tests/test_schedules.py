"""Schedules of momentum teachers beside their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_kernels.schedules import cosine_momentum, linear_warmup


@given(total=st.integers(1, 1000), base=st.floats(0, 1), final=st.floats(0, 1), data=st.data())
def test_momentum_is_the_cosine_of_byol(total: int, base: float, final: float, data: Any) -> None:
    step = data.draw(st.integers(0, total))
    byol = final - (final - base) * (math.cos(math.pi * step / total) + 1) / 2
    assert cosine_momentum(step, total, base, final) == pytest.approx(byol, abs=1e-12)
    assert min(base, final) - 1e-12 <= cosine_momentum(step, total, base, final) <= max(base, final) + 1e-12


def test_momentum_ends_exactly_and_stays() -> None:
    assert cosine_momentum(0, 10, 0.996) == pytest.approx(0.996, abs=1e-15)
    for step in (10, 11, 1000):
        assert cosine_momentum(step, 10, 0.996) == 1.0
        assert cosine_momentum(step, 10, 0.996, 0.9995) == 0.9995


@given(steps=st.integers(0, 50), step=st.integers(0, 80), end=st.floats(0.1, 5), fraction=st.floats(0, 1))
def test_warm_up_is_that_of_lightly(steps: int, step: int, end: float, fraction: float) -> None:
    scheduler = pytest.importorskip("lightly.utils.scheduler", reason="lightly is not installed")
    start = end * fraction
    theirs = scheduler.linear_warmup_schedule(step, steps, start, end)
    assert linear_warmup(step, steps, start, end) == pytest.approx(theirs, abs=1e-12)


def test_warm_up_ends_exactly_and_stays() -> None:
    assert [linear_warmup(step, 2, 0.1, 0.7) for step in (0, 2, 3)] == [0.1, 0.7, 0.7]
    assert linear_warmup(1, 2, 0.7, 0.1) == pytest.approx(0.4)
    assert linear_warmup(0, 0, 0.1, 0.7) == 0.7


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cosine_momentum(-1, 10, 0.9), "step: expected at least 0, got -1"),
        (lambda: cosine_momentum(0, 0, 0.9), "total: expected at least 1, got 0"),
        (lambda: cosine_momentum(0, 10, 1.1), r"base: expected a number in \[0, 1\], got 1.1"),
        (lambda: cosine_momentum(0, 10, 0.9, -0.1), r"final: expected a number in \[0, 1\], got -0.1"),
        (lambda: linear_warmup(-1, 10, 0.0, 1.0), "step: expected at least 0, got -1"),
        (lambda: linear_warmup(0, -1, 0.0, 1.0), "steps: expected at least 0, got -1"),
        (lambda: linear_warmup(float("nan"), 5, 0.0, 1.0), "step: expected at least 0, got nan"),  # type: ignore[arg-type]
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
