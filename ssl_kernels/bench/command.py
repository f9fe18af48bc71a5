"""`ssl-kernels bench`: ours beside the peers that are installed, on this machine.

pytest-benchmark measures, as in `pytest benchmarks`; this chooses what, shows how far it is, and keeps what was found.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich import box
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ssl_kernels.bench import results, suite


class Watch:
    """A plugin of pytest that shows the case at work and keeps why others cannot be measured."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.task = progress, progress.add_task("starting", total=None)
        self.absent: list[results.Run] = []
        self.failures: list[str] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.progress.update(self.task, total=len(session.items))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        case = nodeid.partition("[")[2].rstrip("]")
        self.progress.update(self.task, description=case)
        if not self.progress.console.is_terminal:  # which alone sees the line above change
            self.progress.console.print(case)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: Any, call: pytest.CallInfo[None]) -> Any:
        report = yield
        if report.skipped:
            op, shape, provider, mode = item.callspec.params["case"]
            where = {"op": op.name, "shape": op.describe(*shape) + op.suffix, "provider": provider, "mode": mode}
            self.absent.append({**where, "reason": str(getattr(call.excinfo, "value", "skipped"))})
        if report.failed:
            self.failures.append(f"{item.name}: {report.longreprtext}\n")
        if report.when == "teardown":
            self.progress.advance(self.task)
        return report


def main(argv: Sequence[str], prog: str = "ssl-kernels bench") -> int:
    """Measure, print a table, and write the results; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Measure time and memory of the losses beside the peers that are installed, plain PyTorch and "
        "torch.compile. Outputs are compared before any time is taken. Close other programs first.",
    )
    names = ", ".join(suite.NAMES)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"what to measure, of {names}; by default all of them")
    parser.add_argument("--quick", action="store_true", help="one shape an op, no torch.compile; a few minutes in all")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"), help="folder of the results [%(default)s]")
    parser.add_argument("--threads", type=int, help="threads of every provider [torch's number]")
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # shows that it runs, not how fast
    parser.add_argument("--compile-backend", default="inductor", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if unknown := [op for op in arguments.ops if op not in suite.NAMES]:
        parser.error(f"expected ops of {names}, got {unknown[0]!r}")

    size = "tiny" if arguments.tiny else "quick" if arguments.quick else "full"
    options = ["--size", size]
    options += ["--ops", ",".join(arguments.ops or suite.NAMES), "--compile-backend", arguments.compile_backend]
    options += ["--threads", str(arguments.threads)] if arguments.threads else []
    console = Console(file=sys.stdout)  # also while what pytest prints goes elsewhere
    document, watch = measure(options, console)
    found = results.from_document(document, watch.absent, size)
    paths = results.write(arguments.output, found)
    for op, result in found.items():
        console.print(make_table(op, result))
    console.print("Times are relative to ours: 2.0x means twice as slow.")
    console.print("written:", *map(str, paths), highlight=False, soft_wrap=True)
    for failure in watch.failures:
        print(failure, file=sys.stderr)
    return 1 if watch.failures else 0


def measure(options: Sequence[str], console: Console) -> tuple[dict[str, Any], Watch]:
    """pytest-benchmark's document of the suite, and what was seen on the way."""
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        watch, path = Watch(progress), Path(folder) / "benchmarks.json"
        # Neither the options nor the plugins of a project that this happens to run in.
        arguments = ["-c", os.devnull, "--rootdir", folder, "-p", "ssl_kernels.bench.plugin", "-p", "no:cacheprovider"]
        arguments += ["-o", "python_functions=bench_*", "--capture=no", f"--benchmark-json={path}", *options]
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = pytest.main([*arguments, suite.__file__], plugins=[watch])
        if code == pytest.ExitCode.INTERRUPTED:
            raise SystemExit("interrupted; nothing was written")
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not path.exists():
            raise SystemExit("\n".join(watch.failures) or said.getvalue() or f"pytest ended with {code}")
        return json.loads(path.read_text()), watch


def make_table(name: str, result: results.Result) -> Table:
    """A line to each shape and mode of an op, a column to each provider."""
    op = next(op for op in suite.OPS if op.name == name)
    rows = list(results.rows(result))
    providers = list(dict.fromkeys(provider for row in rows for provider in row.others))
    table = Table(title=op.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    labels = [results.LABELS.get(provider, provider) for provider in providers]
    for column in ("ours, ms", *labels, "MB ours", "MB peer"):
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        what = row.shape if row.mode == op.modes[-1] else f"{row.shape}, {row.mode}"
        memory = (row.memory(provider) for provider in ("ours", row.peer))
        table.add_row(what, results.milliseconds(row.ours), *map(row.time, providers), *memory)
    return table
