"""A pytest plugin: runs what matters most first, and logs what was collected and how each test ended.

One JSON line each, also of a run that is cut short.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

LOG = "SSL_KERNELS_TEST_LOG"


def _write(**entry: Any) -> None:
    with Path(os.environ[LOG]).open("a") as log:
        log.write(json.dumps(entry) + "\n")


# Kernels are compiled as tests come to them, and time may run out before the last. The first compile what most others
# need; those of any size compile kernels that nobody else does.
ORDER = ("::test_small[", "::test_the_host_never_waits[", "::test_cuda_graph[", "", "::test_any_size_and_layout[")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((k for k, name in enumerate(ORDER) if name and name in item.nodeid), ORDER.index(""))

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    _write(collected=[item.nodeid for item in session.items])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Of a file that cannot be imported, or that lacks what all of its tests need."""
    if report.failed:
        _write(test=report.nodeid, outcome="failed", detail=str(report.longrepr)[-2000:])
    elif report.skipped:
        _write(test=report.nodeid, outcome="skipped", detail=_reason(report))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    if report.skipped:
        _write(test=report.nodeid, outcome="skipped", detail=_reason(report))
    else:
        _write(test=report.nodeid, outcome=report.outcome, detail=report.longreprtext[-2000:])


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    detail = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return detail.removeprefix("Skipped: ")
