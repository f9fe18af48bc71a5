"""Everything that takes a GPU to know, in one command and within ten minutes: `make gpu-check`.

It builds the extensions for that GPU, and runs tests/gpu on it, the shortest and most telling first: every op once
against the reference; values of every dtype, size and configuration; graphs, streams, memory and waits of the host; a
few of these tests under compute-sanitizer where that is installed. Then come the benchmarks of gpu_bench.py beside the
peers that are installed. One JSON and one Markdown report say what was found, and what was left out for lack of time,
of memory or of a package. Both are written anew after each step and each group of benchmarks, so that a machine which
is taken away in between leaves what it has shown.

    python benchmarks/gpu_check.py [--budget SECONDS] [--skip STEP ...] [--output benchmarks/results/gpu_check.json]

With ``--python python3 --no-build`` another Python checks what it already has: its own torch, and extensions that were
built elsewhere.

The exit status is 0 if all that ran is well, 1 if something of ours is not, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gpu_meter
import torch
from gpu_report import markdown

ROOT = Path(__file__).resolve().parent.parent
BUDGET_S = 600.0
# Of the budget, at most; the benchmarks take what is left.
SHARES = {"build": 0.2, "first": 0.1, "values": 0.25, "device": 0.13, "sanitizer": 0.07, "benchmarks": 1.0}
REPORT_S = 2.0
SANITIZER_TOOLS = ("memcheck", "racecheck")
SANITIZED = (
    "test_small and bfloat16 and (sigmoid_contrastive_loss-mean or clip_loss-mean or info_nce_loss-mean or "
    "dino_loss-centred or sinkhorn_center or koleo_loss-mean or ema_update_-number or enqueue_-normalised)"
)
SANITIZER_FOUND = 86  # its exit status then
SANITIZER_OPTIONS = ("--report-api-errors", "no")  # torch asks drivers for functions that older ones lack
VALUES, TILES = "tests/gpu/test_gpu_values.py", "tests/gpu/test_gpu_tiles.py"
ONCE = "test_every_op or test_small and bfloat16"
# By step: files, which of their tests, and which of these show on a CPU that the step runs.
TESTS = {
    "first": ([VALUES], ONCE, ONCE),
    "values": ([TILES, VALUES], f"not ({ONCE})", "test_a_single_row"),
    "device": (["tests/gpu/test_gpu_device.py", "tests/gpu/test_gpu_trainers.py"], "", "test_cuda_graph"),
}

Row = dict[str, Any]


@dataclass
class Step:
    name: str
    status: str = "not run"  # running, ok, failed, skipped, cut
    seconds: float = 0.0
    limit_s: float = 0.0
    detail: str = ""


@dataclass
class Report:
    device: str
    tiny: bool
    budget_s: float
    measured: str = ""  # the day, in UTC
    elapsed_s: float = 0.0
    machine: Row = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    tests: Row = field(default_factory=dict)
    graphs: list[Row] = field(default_factory=list)
    providers: dict[str, str] = field(default_factory=dict)
    benchmarks: list[Row] = field(default_factory=list)


class Check:
    """One run of all steps within the budget."""

    def __init__(
        self,
        device: str,
        *,
        tiny: bool,
        budget_s: float,
        skip: Sequence[str] = (),
        save: Callable[[Report], None] = lambda _: None,
    ) -> None:
        self.report = Report(device, tiny, budget_s, f"{datetime.now(timezone.utc):%Y-%m-%d}")
        self.report.machine = gpu_meter.machine(torch.device(device), ["triton"])  # ours may not be built yet
        self.skip = skip
        self.at: Row = {}  # what the benchmarks are measuring
        self.start = time.monotonic()
        self._save = save

    def save(self) -> None:
        self.report.elapsed_s = time.monotonic() - self.start
        self._save(self.report)

    def left_s(self) -> float:
        return self.start + self.report.budget_s - REPORT_S - time.monotonic()

    def run(self) -> Report:
        steps: dict[str, Callable[[Step], None]] = {
            "build": self.build, **dict.fromkeys(TESTS, self.tests), "sanitizer": self.sanitizer,
            "benchmarks": self.benchmarks,
        }  # fmt: skip
        for name, work in steps.items():
            step = Step(name, limit_s=max(0.0, min(SHARES[name] * self.report.budget_s, self.left_s())))
            self.report.steps.append(step)
            before = time.monotonic()
            if name in self.skip:
                step.status, step.detail = "skipped", "as asked"
            elif step.limit_s <= 0:
                step.status, step.detail = "cut", "no time was left"
            else:
                print(f"== {name}, within {step.limit_s:.0f} s", file=sys.stderr, flush=True)
                step.status = "running"
                self.save()
                work(step)
            step.seconds = time.monotonic() - before
            self.save()
        return self.report

    def build(self, step: Step) -> None:
        environment, note = build_environment()
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        step.status, output = execute(command, step.limit_s, environment)
        step.detail = note if step.status == "ok" else f"{note}\n{output}"

    def tests(self, step: Step) -> None:
        files, wanted, tiny = TESTS[step.name]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "tests.jsonl"
            command = [*pytest_command(), "-p", "gpu_tests_log", *files, "-k", tiny if self.report.tiny else wanted]
            step.status, output = execute(command, step.limit_s, self.environment(SSL_KERNELS_TEST_LOG=str(log)))
            found = summarize(log)
        self.report.graphs += graphs(found.pop("all"))
        for name, more in found.items():
            self.report.tests[name] = self.report.tests.get(name, type(more)()) + more
        if found["failed"]:  # also of a run that was cut
            step.status = "failed"
        step.detail = f"{found['passed']} passed, {len(found['failed'])} failed, {len(found['skipped'])} skipped"
        if found["not_reached"]:
            step.detail += f", {len(found['not_reached'])} not reached"
        if step.status == "failed" and not found["failed"]:
            step.detail += "\n" + output

    def sanitizer(self, step: Step) -> None:
        tool = sanitizer()
        if tool is None:
            step.status, step.detail = "skipped", "compute-sanitizer is not installed"
            return
        outcomes, deadline = [], time.monotonic() + step.limit_s
        for k, name in enumerate(SANITIZER_TOOLS):
            limit = (deadline - time.monotonic()) / (len(SANITIZER_TOOLS) - k)
            command = [tool, "--tool", name, "--error-exitcode", str(SANITIZER_FOUND), *SANITIZER_OPTIONS]
            command += [*pytest_command(), VALUES, "-k", SANITIZED]
            # Memory that the allocator holds on to is within bounds to the tool.
            status, output = execute(command, limit, self.environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
            outcomes.append(status)
            step.detail += f"{name}: {status}\n" + (f"{output}\n" if status == "failed" else "")
        step.status = next((s for s in ("failed", "cut") if s in outcomes), "ok")

    def benchmarks(self, step: Step) -> None:
        """One process for all groups, and another after whatever takes it down, or the context of its device."""
        deadline = time.monotonic() + step.limit_s
        try:
            waiting = group_names()
        except Exception as error:  # an extension that does not load, for one
            step.status, step.detail = "failed", f"cannot be imported\n{type(error).__name__}: {error}"
            return
        total, rows = len(waiting), self.report.benchmarks
        while waiting and (seconds := deadline - time.monotonic()) > 0:
            job = {"device": self.report.device, "tiny": self.report.tiny, "seconds": seconds, "groups": waiting}
            done: list[str] = []
            self.at = {}
            command = [sys.executable, __file__, "--worker", json.dumps(job)]
            listen = functools.partial(self.receive, done)
            status, output = execute(command, seconds + REPORT_S, self.environment(), listen)
            waiting = waiting[len(done) :]
            if waiting:  # also where what ended the process called that a success
                reason = "out of time" if status == "cut" else f"its process ended: {last_line(output)}"
                at = self.at if self.at.get("group") == waiting[0] else whole(waiting[0])
                rows.append(at | {"status": "cut" if status == "cut" else "failed", "detail": reason})
                waiting = waiting[1:]
        rows += [whole(group) | {"status": "cut", "detail": "no time was left"} for group in waiting]
        cut = sum(row["status"] == "cut" for row in rows)
        wrong = [r for r in rows if r["status"] in ("failed", "outputs differ") and r["provider"] in ("ours", "all")]
        step.status = "failed" if wrong else "cut" if cut else "ok"
        step.detail = f"{total - len(waiting)} of {total} groups, {cut} measurements cut"
        if wrong:
            step.detail += "; wrong: " + ", ".join(f"{row['op']} {row.get('shape', '')}" for row in wrong)

    def receive(self, done: list[str], line: str) -> None:
        """A line of the worker's: of the machine, of an attempt, of a measurement, or the end of a group."""
        try:
            entry = json.loads(line)
        except ValueError:  # printed by somebody else
            return
        if not isinstance(entry, dict):
            return
        if "machine" in entry:
            self.report.machine, self.report.providers = entry["machine"], entry["providers"]
        elif "done" in entry:
            done.append(entry["done"])
            self.save()
        elif entry.get("status") == "started":
            self.at = entry
        elif "provider" in entry:
            self.report.benchmarks.append(entry)

    def environment(self, **more: str) -> dict[str, str]:
        here = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        path = os.pathsep.join(filter(None, here))
        return {"PYTHONPATH": path, "SSL_KERNELS_TEST_DEVICE": self.report.device, **more}


def whole(group: str) -> Row:
    """What stands for all of a group's measurements."""
    return {"op": group.partition(",")[0], "group": group, "provider": "all"}


def build_environment() -> tuple[dict[str, str], str]:
    """With a toolkit of torch's CUDA, its absence from the build is an error; elsewhere it is said."""
    if torch.version.cuda is None:
        return {}, f"without CUDA C++: torch {torch.__version__} is no CUDA build"
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # As setup.py looks for it.
    nvcc = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    release = None
    with contextlib.suppress(OSError):
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)", told)
    if release is None:
        return {}, "without CUDA C++: nvcc was not found"
    if release[1] != torch.version.cuda.split(".")[0]:
        return {}, f"without CUDA C++: nvcc is of CUDA {release[1]}, torch of {torch.version.cuda}"
    environment, note = {"SSL_KERNELS_CUDA": "1"}, "with CUDA C++"
    if torch.cuda.is_available() and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        chip = "{}.{}".format(*torch.cuda.get_device_capability())
        environment["TORCH_CUDA_ARCH_LIST"], note = chip, f"{note} for {chip}"
    return environment, note


def sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return found if Path(found).exists() else None


def pytest_command() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]


def execute(
    command: Sequence[str], limit_s: float, environment: dict[str, str], receive: Callable[[str], None] | None = None
) -> tuple[str, str]:
    """ "ok", "failed" or, past the limit, "cut"; and the end of what it printed. ``receive`` gets each line at once."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, start_new_session=True,
    )  # fmt: skip
    cut = threading.Event()

    def stop() -> None:
        cut.set()
        with contextlib.suppress(ProcessLookupError):  # with whatever it has started
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(max(0.1, limit_s), stop)
    timer.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if receive is not None:
                receive(lines[-1])
        code = process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:  # Ctrl-C does not reach a session of its own
            stop()
            process.wait()
    status = "ok" if code == 0 else "cut" if cut.is_set() else "failed"
    return status, "\n".join(lines)[-4000:]


def last_line(output: str) -> str:
    return next((line for line in reversed(output.splitlines()) if line.strip()), "it printed nothing")[:300]


def summarize(log: Path) -> Row:
    """Of the plugin's log: counts, what failed and why, what was skipped and why, and what was not reached."""
    entries = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    collected = [test for entry in entries for test in entry.get("collected", [])]
    ended = [entry for entry in entries if "test" in entry]
    by_outcome = {o: [e for e in ended if e["outcome"] == o] for o in ("passed", "failed", "skipped")}
    reached = {entry["test"] for entry in ended}
    return {
        "collected": len(collected),
        "passed": len(by_outcome["passed"]),
        "failed": [{"test": e["test"], "detail": e["detail"]} for e in by_outcome["failed"]],
        "skipped": [{"test": e["test"], "detail": e["detail"]} for e in by_outcome["skipped"]],
        "not_reached": [test for test in collected if test not in reached],
        "all": ended,
    }


def graphs(tests: list[Row]) -> list[Row]:
    """How the capture of each op went."""
    captured = [test for test in tests if "::test_cuda_graph[" in test["test"]]
    return [
        {"op": t["test"].partition("[")[2].rstrip("]"), **{k: t[k] for k in ("outcome", "detail")}} for t in captured
    ]


def group_names() -> list[str]:
    import gpu_bench

    return [group.name for group in gpu_bench.GROUPS]


def work(job: Row) -> None:
    """In a process of its own: measure the groups, and print a line of JSON to each finding."""
    import gpu_bench

    def say(**entry: Any) -> None:
        print(json.dumps(entry), flush=True)

    device, deadline = torch.device(job["device"]), time.monotonic() + job["seconds"]
    say(machine=gpu_meter.machine(device), providers={p: gpu_bench.installed(p) for p in gpu_bench.PACKAGES})
    groups = {group.name: group for group in gpu_bench.GROUPS}
    for name in job["groups"]:
        for row in gpu_bench.measure(groups[name], device, tiny=job["tiny"], deadline=deadline):
            say(**row)
        say(done=name)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu-check", description="Checks and measures ssl_kernels on a GPU.")
    parser.add_argument(
        "--budget", type=float, default=BUDGET_S, help="seconds for all steps; what they cut is reported"
    )
    parser.add_argument("--skip", nargs="*", default=[], choices=list(SHARES), help="steps to leave out")
    parser.add_argument("--no-build", action="store_true", help="check the extensions that are there")
    parser.add_argument("--python", metavar="PROGRAM", help="run all of it with this Python")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu_check.json")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)  # cpu: for the tests of this file
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.python and not same_program(options.python, sys.executable):
        told = list(sys.argv[1:] if arguments is None else arguments)
        return subprocess.run([options.python, __file__, *told]).returncode
    if str(ROOT) not in sys.path:  # nothing needs to be installed, and the checkout is what is checked
        sys.path.insert(0, str(ROOT))
    if options.worker:
        work(options.worker)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        built = (
            f"CUDA {torch.version.cuda}"
            if torch.version.cuda
            else f"ROCm {torch.version.hip}"
            if torch.version.hip
            else "CPUs"
        )
        print(f"gpu-check: no GPU: torch {torch.__version__}, built for {built}, finds none here", file=sys.stderr)
        return 2
    options.output.parent.mkdir(parents=True, exist_ok=True)

    def save(report: Report) -> None:
        replace(options.output, json.dumps(asdict(report), indent=1) + "\n")
        replace(options.output.with_suffix(".md"), markdown(report))

    skip = [*options.skip, "build"] if options.no_build else options.skip
    report = Check(options.device, tiny=options.tiny, budget_s=options.budget, skip=skip, save=save).run()
    print(markdown(report))
    return 1 if any(step.status == "failed" for step in report.steps) else 0


def same_program(one: str, other: str) -> bool:
    """As it was called: what an environment links to is another Python."""
    return os.path.abspath(shutil.which(one) or one) == os.path.abspath(other)


def replace(path: Path, text: str) -> None:
    """At no time is there half a file."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(text)
    beside.replace(path)


if __name__ == "__main__":
    sys.exit(main())
