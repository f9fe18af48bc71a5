"""The list of planted bugs has not rotted: each can still be planted, and there are tests to see it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from run import ROOT, bugs, name_of

NOT_OPS = {"__init__.py", "_checks.py", "matmul.py", "reuse.py"}


def test_every_bug_can_be_planted() -> None:
    for bug in bugs():
        text = (ROOT / bug.path).read_text()
        assert bug.planted(text) != text
        for test in bug.tests:
            assert (ROOT / "tests" / test).is_file(), f"{bug}: no tests/{test}"


@pytest.mark.parametrize(
    ("folder", "pattern", "least"),
    [("csrc/cpu", "*-inl.h", 2), ("csrc/cuda", "*.cu", 2), ("ssl_kernels/ops", "*.py", 2)],
)
def test_every_kernel_and_op_has_some(folder: str, pattern: str, least: int) -> None:
    planted = Counter(bug.path for bug in bugs())
    names = [path.name for path in (ROOT / folder).glob(pattern) if path.name not in NOT_OPS]
    assert names
    assert not [name for name in names if planted[f"{folder}/{name}"] < least]


@pytest.mark.parametrize(
    "name", ["test_op.py::test_it", "test_op.py::test_it[a - b[0]-c d]", "a/test_b.py::interpreted"]
)
@pytest.mark.parametrize("why", ["", " - AssertionError: assert [1] == [2]"])
def test_a_failed_test_is_named(name: str, why: str) -> None:
    assert name_of(f"FAILED tests/{name}{why}") == name
