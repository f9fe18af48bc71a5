"""pytorch-metric-learning's own tests of its losses, with this library's classes in the places of its own.

    git clone --depth 1 https://github.com/KevinMusgrave/pytorch-metric-learning
    python tests/examples/metric_learning_tests.py pytorch-metric-learning

prints a table of what passes, and why the rest does not. It ends with an error if anything else fails. The package that
is installed is tested, with the tests of the checkout.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils import distributed

from ssl_kernels.integrations import pytorch_metric_learning as ours

FILES = {
    "losses/test_ntxent_loss.py": "`NTXentLoss`, `SupConLoss`",
    "losses/test_cross_batch_memory.py": "`CrossBatchMemory`",
    "losses/test_losses_without_labels.py": "the losses without labels",
    "losses/test_self_supervised_loss.py": "`SelfSupervisedLoss`",
}
DIFFERENCES = {  # why a test does not pass
    "test_loss": "of `MultiSimilarityLoss` in the memory, which since 2.9 refuses pairs that are positive and negative",
}


class Results:
    def __init__(self) -> None:
        self.passed: dict[str, int] = defaultdict(int)
        self.failed: dict[str, dict[str, str]] = defaultdict(dict)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = next(file for file in FILES if file in report.nodeid)
        if report.failed:
            self.failed[file][report.nodeid.split("::")[-1]] = str(report.longrepr).splitlines()[-1]
        elif report.passed and report.when == "call":
            self.passed[file] += 1


def main(checkout: str) -> int:
    os.environ.setdefault("TEST_DEVICE", "cpu")
    os.environ.setdefault("TEST_DTYPES", "float32,float64")
    for name in ("NTXentLoss", "SupConLoss", "CrossBatchMemory"):
        setattr(losses, name, getattr(ours, name))
    distributed.CrossBatchMemory = ours.CrossBatchMemory
    results = Results()
    tests = Path(checkout) / "tests"
    options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", checkout]
    status = pytest.main([*options, "-c", "/dev/null", *(str(tests / file) for file in FILES)], plugins=[results])

    print("\n| class | tests | pass | do not, and why |\n|---|---:|---:|---|")
    for file, names in FILES.items():
        passed, failed = results.passed[file], results.failed[file]
        told = "; ".join(f"`{test}`: {DIFFERENCES.get(test, error)}" for test, error in failed.items())
        print(f"| {names} | {passed + len(failed)} | {passed} | {told} |")
    unexplained = {test for failed in results.failed.values() for test in failed} - DIFFERENCES.keys()
    return 1 if unexplained or status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
