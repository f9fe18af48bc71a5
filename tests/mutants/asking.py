"""Runs tests in forks of a process that has already imported what takes long: torch, its compilers, the peers.

A `Server` starts this file as such a process: to begin with Python and these imports takes longer than most tests. The
process never imports ssl_kernels or a test, so that each fork finds them as they stand in the tree by then.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pytest

IMPORTED = [
    *("numpy", "torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.distributed.fsdp", "triton", "pytest"),
    *("hypothesis.extra.numpy", "pytest_benchmark.plugin", "torchvision", "rich.console", "tyro", "matplotlib.pyplot"),
    *("timm", "sentence_transformers", "open_clip", "pytorch_metric_learning", "lightly.loss", "lightning_fabric"),
]
OPTIONS = [
    *("-q", "--tb=no", "--disable-plugin-autoload", "-p", "hypothesispytest", "-p", "benchmark"),
    *("-p", "no:cacheprovider", "-p", "no:faulthandler"),
]
LIMIT_S = 120  # for a test; one that a bug makes run for ever is ended after it


class Answer(NamedTuple):
    failed: list[str]  # tests, as pytest names them: they, their fixtures, or the process during them
    errors: list[str]  # files that do not load
    ran: int  # tests that were started


class Server:
    """Answers from forks of one process, whose directory is the tree that is tested."""

    def __init__(self, root: Path, environment: dict[str, str], imported: Sequence[str] = IMPORTED) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *imported],
            cwd=root, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, *arguments: str) -> Answer:
        """What comes of `pytest ARGUMENTS`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        return Answer(*json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        self.process.communicate()


class _Notes:
    """A plugin of pytest that notes what happens at once, lest it be lost with a process that dies."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, *words: str) -> None:
        with self.path.open("a") as file:
            print(json.dumps(words), file=file)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        self.note("started", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.note("failed", report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.note("finished", nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.note("errors", report.nodeid)


def _answer(arguments: list[str], folder: Path) -> Answer:
    """What comes of `pytest ARGUMENTS` in a fork, which may use the folder."""
    notes = folder / "notes"
    notes.touch()
    child = os.fork()
    if child == 0:
        _run([*OPTIONS, f"--basetemp={folder}/tests", *arguments], notes)
    try:
        os.waitpid(child, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests have started and left
    noted: dict[str, list[str]] = {"started": [], "failed": [], "errors": [], "finished": []}
    for line in notes.read_text().splitlines():
        kind, test = json.loads(line)
        noted[kind].append(test)
    reported = {*noted["failed"], *noted["errors"], *noted["finished"]}
    died = [test for test in noted["started"] if test not in reported]
    return Answer(noted["failed"] + died, noted["errors"], len(noted["started"]))


def _run(arguments: list[str], notes: Path) -> None:
    """The life of a fork."""
    try:
        os.setsid()  # a group of its own, which is killed with it
        null = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(null, stream)
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        sys.argv = ["pytest", *arguments]
        found = importlib.util.find_spec("ssl_kernels").origin
        assert Path(found).is_relative_to(Path.cwd()), found
        importlib.import_module("pytest").main(arguments, plugins=[_Notes(notes)])
    finally:
        os._exit(0)


def main() -> None:
    sys.path[0] = str(Path.cwd())
    for name in sys.argv[1:]:
        with contextlib.suppress(ImportError):  # a peer that is not installed
            importlib.import_module(name)
    assert "ssl_kernels" not in sys.modules
    gc.freeze()  # forks share what they do not touch
    for line in sys.stdin:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            answer = _answer(json.loads(line), Path(folder))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
