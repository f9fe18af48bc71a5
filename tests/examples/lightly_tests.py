"""lightly's own tests of its losses, with this library's classes in the places of its own.

    pip install pytest-mock
    git clone --depth 1 https://github.com/lightly-ai/lightly
    python tests/examples/lightly_tests.py lightly

prints a table of what passes, and why the rest does not. It ends with an error if anything else fails.
"""

from __future__ import annotations

import importlib
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import ssl_kernels
from ssl_kernels.integrations import lightly as modules
from ssl_kernels.losses.center import Center

IN_PLACE_OF = {
    "lightly.loss.barlow_twins_loss.BarlowTwinsLoss": ssl_kernels.BarlowTwinsLoss,
    "lightly.loss.dino_loss.DINOLoss": ssl_kernels.DINOLoss,
    "lightly.loss.ibot_loss.IBOTPatchLoss": ssl_kernels.IBOTPatchLoss,
    "lightly.loss.koleo_loss.KoLeoLoss": ssl_kernels.KoLeoLoss,
    "lightly.loss.ntx_ent_loss.NTXentLoss": ssl_kernels.NTXentLoss,
    "lightly.loss.vicreg_loss.VICRegLoss": ssl_kernels.VICRegLoss,
    "lightly.models.modules.center.Center": Center,
    "lightly.models.modules.memory_bank.MemoryBankModule": modules.MemoryBankModule,
    "lightly.models.utils.update_momentum": modules.update_momentum,
}
FILES = {
    "loss/test_barlow_twins_loss.py": "BarlowTwinsLoss",
    "loss/test_dino_loss.py": "DINOLoss",
    "loss/test_ibot_loss.py": "IBOTPatchLoss",
    "loss/test_koleo_loss.py": "KoLeoLoss",
    "loss/test_ntx_ent_loss.py": "NTXentLoss",
    "loss/test_vicreg_loss.py": "VICRegLoss",
    "models/modules/test_memory_bank.py": "MemoryBankModule",
    "models/test_ModelUtils.py::TestModelUtils::test_momentum_works": "update_momentum",
}
INTEGER_SIZE = "a bank's size is (rows, features) here; lightly 1.6, too, refuses a number of rows alone"
WORDING = "it raises, with another error or in other words"
DIFFERENCES = {  # why a test of lightly's does not pass
    "test_single_view_raises": WORDING,
    "test_with_correlated_embedding": INTEGER_SIZE,
    "test_forward_pass_memory_bank": INTEGER_SIZE,
    "test_forward_pass_neg_temp": "a temperature is positive here",
    "test_forward_pass__error_batch_size_1": WORDING,
    "test_forward_pass__error_different_shapes": WORDING,
    "test_forward_easy": INTEGER_SIZE,
    "test_forward": "the first, as those above; the second: no row is dropped here where a batch wraps around the end",
    "test_init__negative_size": WORDING,
    "test_init__no_dim_warning": INTEGER_SIZE,
    "test_forward__no_dim": INTEGER_SIZE,
}


class Results:
    def __init__(self) -> None:
        self.passed: dict[str, int] = defaultdict(int)
        self.failed: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        file = next(file for file in FILES if file.split("::")[0] in report.nodeid)
        if report.failed:
            name = report.nodeid.split("::")[-1].split("[")[0]
            self.failed[file][name].append(str(report.longrepr).splitlines()[-1])
        elif report.passed and report.when == "call":
            self.passed[file] += 1


def main(checkout: str) -> int:
    sys.path.insert(0, checkout)
    for place, ours in IN_PLACE_OF.items():
        module, name = place.rsplit(".", 1)
        theirs = getattr(importlib.import_module(module), name)
        for other in [other for key, other in sys.modules.items() if key.startswith("lightly")]:
            if getattr(other, name, None) is theirs:
                setattr(other, name, ours)
    results = Results()
    tests = Path(checkout) / "tests"
    options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", checkout]
    status = pytest.main([*options, "-c", "/dev/null", *(str(tests / file) for file in FILES)], plugins=[results])

    unexplained = 0
    print("\n| class | tests | pass | do not, and why |\n|---|---:|---:|---|")
    for file, name in FILES.items():
        failed = results.failed[file]
        reasons: dict[str, list[str]] = defaultdict(list)
        for test, errors in failed.items():
            unexplained += test not in DIFFERENCES
            reasons[DIFFERENCES.get(test, errors[0].strip())].append(f"`{test}`")
        told = "; ".join(f"{', '.join(tests)}: {why}" for why, tests in reasons.items())
        passed = results.passed[file]
        print(f"| `{name}` | {passed + sum(map(len, failed.values()))} | {passed} | {told} |")
    return 1 if unexplained or status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
