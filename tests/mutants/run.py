"""Plants the bugs of bugs.toml one by one, and names those that the tests of `make test` do not see.

`python tests/mutants/run.py [WORD ...]` takes all bugs, or those whose file's path holds one of the words. Each is
planted in a copy of the tree, one copy a processor, build/mutants-*, which stay: C++ is compiled there once, and then
what a bug has changed. Which test has seen which bug is kept in seen_by.json, and that test is asked first next time.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).resolve().parents[2]
SEEN_BY = Path(__file__).with_name("seen_by.json")
TIMEOUT_S = 1200  # a bug may also make a test run for ever, and is seen by that


@dataclass(frozen=True)
class Bug:
    path: str
    before: str
    after: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}: {self.before.strip()!r} -> {self.after.strip()!r}"

    @property
    def is_cpp(self) -> bool:
        return self.path.startswith(("csrc/cpu", "csrc/torch"))

    def planted(self, text: str) -> str:
        if text.count(self.before) != 1:
            raise ValueError(f"{self}: expected the text once, found it {text.count(self.before)} times")
        return text.replace(self.before, self.after)


def bugs() -> list[Bug]:
    files = tomllib.loads(Path(__file__).with_name("bugs.toml").read_text())
    return [Bug(path, *pair, tuple(f["tests"])) for path, f in files.items() for pair in f["bugs"]]


class Copy:
    """A copy of the tree in which one bug at a time is planted."""

    def __init__(self, number: int) -> None:
        self.root = ROOT / "build" / f"mutants-{number}"
        self.is_stale = False  # whether what is compiled has a bug
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "ssl_kernels").glob("*.so")]
        names = {*filter(None, listed.split("\0")), *compiled}
        for path in [path for path in self.root.rglob("*.py") if str(path.relative_to(self.root)) not in names]:
            path.unlink()  # a test that is no more must not see anything
        for name in names:
            source, target = ROOT / name, self.root / name
            # What is the same stays, so that the compiler finds it as it left it.
            if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())

    def call(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        ours = {
            **os.environ, "PYTHONPATH": str(self.root), "PYTHONDONTWRITEBYTECODE": "1", "SSL_KERNELS_CUDA": "0",
            "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2", "MAX_JOBS": "2",
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, *command], cwd=self.root, env={**ours, **environment}, capture_output=True, text=True,
            timeout=TIMEOUT_S,
        )  # fmt: skip

    def build(self) -> bool:
        """Whether it compiles; what has not changed is not compiled again."""
        return self.call("setup.py", "-q", "build_ext", "--inplace").returncode == 0

    def failures(self, tests: Iterable[str], *options: str) -> list[str] | None:
        """Those of the default selection that fail: files or single tests, below tests/, of one kind. None if there are
        no such tests."""
        names = [f"tests/{test}" for test in tests]
        is_interpreted = any("interpreter" in name for name in names)
        environment = {"TRITON_INTERPRET": "1"} if is_interpreted else {}
        profile = "--hypothesis-profile=" + ("brief" if is_interpreted else "default")
        command = ("-m", "pytest", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider", profile, *options, *names)
        try:
            done = self.call(*command, **environment)
        except subprocess.TimeoutExpired:
            return [f"{' '.join(names)}: runs on and on"]
        if done.returncode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
            return None
        if done.returncode == 0:
            return []
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed or [f"{' '.join(names)}: exit status {done.returncode}"]

    def seen(self, bug: Bug, first: str) -> str:
        """The first test that fails with this bug, `first` asked before the rest; empty if none does."""
        place = self.root / bug.path
        text = place.read_text()
        if self.is_stale and not bug.is_cpp:
            self.is_stale = not self.build()
        place.write_text(bug.planted(text))
        try:
            if bug.is_cpp:
                self.is_stale = True
                if not self.build():
                    return "ERROR setup.py"
            if first and (failed := self.failures([first], "-x")):
                return failed[0]
            for test in bug.tests:
                failed = self.failures([test], "-x")
                if failed is None:
                    raise ValueError(f"{bug}: there are no tests/{test}")
                if failed:
                    return failed[0]
            return ""
        finally:
            place.write_text(text)


def name_of(line: str) -> str:
    """The test of a line such as 'FAILED tests/test_op.py::test_it[a - b] - AssertionError', below tests/."""
    found = re.match(r"(?:FAILED|ERROR) tests/(\S+?::\w+(?:\[.*?\])?)(?: - |$)", line)
    if found is None:
        raise ValueError(f"expected a line of pytest's summary, got {line!r}")
    return found[1]


@dataclass
class Run:
    """Of some bugs, over a copy for each thread."""

    left: deque[list[Bug]]
    seen_by: dict[str, str]
    lives: list[Bug] = field(default_factory=list)
    is_over: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def work(self, copy: Copy, takes_cpp: bool) -> None:
        while True:
            with self.lock:
                if not self.left:
                    return
                group = self.left.popleft() if takes_cpp else self.left.pop()
            for bug in group:
                if self.is_over:
                    return
                self.plant(copy, bug)

    def plant(self, copy: Copy, bug: Bug) -> None:
        begun = time.monotonic()
        found = copy.seen(bug, self.seen_by.get(str(bug), ""))
        is_dead = found != "" and not found.startswith("ERROR")  # what does not compile or load proves nothing
        with self.lock:
            if found.startswith("FAILED "):
                self.seen_by[str(bug)] = name_of(found)
            if not is_dead:
                self.seen_by.pop(str(bug), None)
                self.lives.append(bug)
            SEEN_BY.write_text(json.dumps(self.seen_by, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        seconds = time.monotonic() - begun
        print(f"{'died ' if is_dead else 'LIVES'} {seconds:4.0f} s  {bug}  {found}", flush=True)


def main(words: list[str]) -> int:
    known = {str(bug): bug for bug in bugs()}
    chosen = [bug for bug in known.values() if not words or any(word in bug.path for word in words)]
    before = json.loads(SEEN_BY.read_text()) if SEEN_BY.exists() else {}
    # The first copy begins with C++, the others with the rest, so that mostly one of them compiles.
    groups = [list(group) for _, group in groupby(chosen, lambda bug: bug.path)]
    groups.sort(key=lambda group: not group[0].is_cpp)
    run = Run(deque(groups), {bug: test for bug, test in before.items() if bug in known})
    copies = [Copy(number) for number in range(min(len(groups), os.cpu_count() or 1))]
    with ThreadPoolExecutor() as pool:
        try:
            for work in as_completed([pool.submit(run.work, copy, copy is copies[0]) for copy in copies]):
                work.result()
        finally:
            run.is_over = True

    # A test that fails without a bug has seen nothing.
    asked = {run.seen_by[str(bug)] for bug in chosen if str(bug) in run.seen_by}
    interpreted = {test for test in asked if "interpreter" in test}
    if copies and copies[0].is_stale:
        copies[0].build()
    unsound = [name for kind in (asked - interpreted, interpreted) if kind for name in copies[0].failures(kind) or []]
    for name in unsound:
        print(f"fails without a bug: {name}")
    print(f"{len(chosen)} bugs, {len(run.lives)} of them live")
    for bug in run.lives:
        print(f"  {bug}\n    asked: {shlex.join(bug.tests)}")
    return 1 if run.lives or unsound else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
