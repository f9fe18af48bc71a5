"""Kernels are interpreted or compiled, as TRITON_INTERPRET says when they are decorated: one process cannot do both.

The modules named test_*interpreter.py therefore run in a process of their own. Collected without TRITON_INTERPRET each
is a single test, which runs pytest on the module with the variable set and fails with what that prints.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from processes import run_python

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
TIMEOUT_S = 900

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["*.py"]
elif INTERPRETING:
    collect_ignore_glob = ["test_*aot.py"]


def pytest_pycollect_makemodule(module_path: pathlib.Path, parent: Any) -> pytest.File | None:
    if INTERPRETING or not module_path.match("test_*interpreter.py"):
        return None
    return _InterpretedModule.from_parent(parent, path=module_path)


class _InterpretedModule(pytest.File):
    def collect(self) -> Iterator[pytest.Item]:
        yield _InterpretedRun.from_parent(self, name="interpreted")


class _InterpretedRun(pytest.Item):
    def runtest(self) -> None:
        examples = "default" if self.config.getoption("--hypothesis-profile") == "thorough" else "brief"
        arguments = [
            *("-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", f"--rootdir={self.config.rootpath}"),
            *("-m", self.config.option.markexpr, f"--hypothesis-profile={examples}", str(self.path)),
        ]
        code = f"""
import sys, pytest, torch
torch.set_num_threads(1)  # tiles are small matrices
sys.exit(pytest.main({arguments}))
"""
        done = run_python(code, limit_s=TIMEOUT_S, TRITON_INTERPRET="1")
        if done.returncode != 0:
            raise _InnerFailureError(done.stdout + done.stderr)
        self.add_report_section("call", "interpreted", done.stdout.strip().rsplit("\n", 1)[-1])

    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        if isinstance(excinfo.value, _InnerFailureError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[pathlib.Path, None, str]:
        return self.path, None, f"{self.path.name} under TRITON_INTERPRET=1"


class _InnerFailureError(Exception):
    """What pytest printed in the other process."""


@pytest.fixture
def strict(poisoned_memory: None) -> Iterator[None]:
    """The strict interpreter; what torch.empty returns is NaN."""
    from strict_interpreter import strict_interpreter  # here: the module needs Triton

    with strict_interpreter():
        yield


@pytest.fixture
def tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")
