"""A pytest plugin: what was collected and how each test ended, one JSON line each, also of a run that is cut short."""

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


def pytest_collection_finish(session: pytest.Session) -> None:
    _write(collected=[item.nodeid for item in session.items])


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _write(test=report.nodeid, outcome="failed", detail=str(report.longrepr)[-2000:])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" and report.passed:
        return
    if report.skipped:
        detail = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _write(test=report.nodeid, outcome="skipped", detail=detail.removeprefix("Skipped: "))
    else:
        _write(test=report.nodeid, outcome=report.outcome, detail=report.longreprtext[-2000:])
