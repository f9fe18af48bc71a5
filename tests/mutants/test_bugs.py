"""The list of planted bugs has not rotted: each can still be planted, and there are tests to see it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from asking import Server
from run import ROOT, Bug, Copy, bugs

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


def test_a_bug_dies_by_the_test_that_fails_and_lives_where_none_does(tmp_path: Path) -> None:
    for name, text in {
        "pyproject.toml": "[tool.pytest.ini_options]",
        "ssl_kernels/__init__.py": "def double(x: int) -> int:\n    return 2 * x\n",
        "tests/test_nothing.py": "def test_nothing():\n    pass\n",
        "tests/test_double.py": "import pytest\nfrom ssl_kernels import double\n\n"
        "@pytest.mark.parametrize('x', [0, 5])\ndef test_double(x):\n    assert double(x) == x + x\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tests = ("test_nothing.py", "test_double.py")
    copy = Copy(tmp_path)
    copy.compile()
    copy.servers[False] = Server(tmp_path, copy.environment(), ["pytest", "hypothesis", "pytest_benchmark.plugin"])
    try:
        for after, found in {
            "3 * x": "test_double.py::test_double[5]",
            "x * 2": "",
            "__import__('os').abort()": "test_double.py::test_double[0]",
            "2 * ": "ERROR tests/test_double.py",
            "2 ** x": "test_double.py::test_double[0]",
        }.items():
            bug = Bug("ssl_kernels/__init__.py", "2 * x", after, tests)
            assert copy.seen(bug, "") == found
            assert copy.seen(bug, "test_double.py::test_double[5]") == found.replace("[0]", "[5]")
            assert copy.seen(bug, "test_double.py::test_of_old") == found
        assert copy.ask(["test_double.py"]) == ([], [], 2)
    finally:
        copy.close()
