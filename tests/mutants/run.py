"""Plants the bugs of bugs.toml one by one, and names those that the tests of `make test` do not see.

`python tests/mutants/run.py [--jobs N] [WORD ...]` takes all bugs, or those whose file's path holds one of the words.
Each is planted in a copy of the tree, one copy a job, build/mutants-*, which stay: C++ is compiled there once, and then
what a bug has changed. Tests run in forks of a process that has imported torch and the like (asking.py). Which test has
seen which bug is kept in seen_by.json, and that test is asked first next time.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from py_compile import PycInvalidationMode
from typing import TypeVar

import tomllib

sys.path.insert(0, str(Path(__file__).parent))
from asking import Answer, Server

ROOT = Path(__file__).resolve().parents[2]
SEEN_BY = Path(__file__).with_name("seen_by.json")
PLANTED = ("ssl_kernels", "examples")  # the folders of Python with bugs

Item = TypeVar("Item")


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

    def __init__(self, root: Path) -> None:
        self.root = root
        self.is_stale = False  # whether what is compiled has a bug
        self.servers: dict[bool, Server] = {}  # that of interpreted kernels, that of the rest

    def update(self) -> None:
        """Makes it as the tree is."""
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
        self.compile()

    def compile(self) -> None:
        """Python then knows by a hash what a bug has changed: by time and size it could overlook it."""
        for folder in PLANTED:
            compileall.compile_dir(
                self.root / folder, quiet=1, force=True, invalidation_mode=PycInvalidationMode.CHECKED_HASH
            )

    def environment(self, **added: str) -> dict[str, str]:
        ours = {"PYTHONPATH": str(self.root), "SSL_KERNELS_CUDA": "0", "CUDA_VISIBLE_DEVICES": "", "MAX_JOBS": "2"}
        threads = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
        return {**os.environ, **ours, **threads, "PYTHONDONTWRITEBYTECODE": "", **added}

    def build(self) -> bool:
        """Whether it compiles; what has not changed is not compiled again."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=self.root, env=self.environment(), capture_output=True).returncode == 0

    def ask(self, tests: Iterable[str], *options: str) -> Answer:
        """What comes of those of the default selection: files or single tests, below tests/, of one kind."""
        names = [f"tests/{test}" for test in tests]
        is_interpreted = any("interpreter" in name for name in names)
        if is_interpreted not in self.servers:
            added = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if is_interpreted else {}
            self.servers[is_interpreted] = Server(self.root, self.environment(**added))
        profile = "--hypothesis-profile=" + ("brief" if is_interpreted else "default")
        return self.servers[is_interpreted].ask(profile, *options, *names)

    def seen(self, bug: Bug, first: str) -> str:
        """The first test that fails with this bug, `first` asked before the rest; empty if none does.

        It is 'ERROR' and a name if something does not compile or cannot be collected, which proves nothing.
        """
        place = self.root / bug.path
        text = place.read_text()
        self.make_sound(bug.is_cpp)
        place.write_text(bug.planted(text))
        try:
            if bug.is_cpp:
                self.is_stale = True
                if not self.build():
                    return "ERROR setup.py"
            for test in (first, *bug.tests) if first else bug.tests:
                answer = self.ask([test], "-x")
                if answer.failed:
                    return answer.failed[0].removeprefix("tests/")
                if answer.errors:
                    return f"ERROR {answer.errors[0]}"
                if not answer.ran and test != first:  # the first may be no more
                    return f"ERROR tests/{test}"
            return ""
        finally:
            place.write_text(text)

    def make_sound(self, except_cpp: bool = False) -> None:
        """Compiles what a bug has left, unless another one in C++ will have it compiled."""
        if self.is_stale and not except_cpp:
            self.is_stale = not self.build()

    def close(self) -> None:
        for server in self.servers.values():
            server.close()


def share(copies: list[Copy], groups: Iterable[list[Item]], work: Callable[[Copy, Item], None]) -> None:
    """Works in all copies at once. Each takes group after group: the first from the front, the others from the back."""
    left, lock, is_over = deque(groups), threading.Lock(), threading.Event()

    def take(copy: Copy) -> None:
        while True:
            with lock:
                if not left:
                    return
                group = left.popleft() if copy is copies[0] else left.pop()
            for item in group:
                if is_over.is_set():
                    return
                work(copy, item)

    with ThreadPoolExecutor() as pool:
        try:
            for done in as_completed([pool.submit(take, copy) for copy in copies]):
                done.result()
        finally:
            is_over.set()


@dataclass
class Run:
    """What is found out in all copies."""

    seen_by: dict[str, str]
    lives: list[Bug] = field(default_factory=list)
    unsound: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def plant(self, copy: Copy, bug: Bug) -> None:
        begun = time.monotonic()
        found = copy.seen(bug, self.seen_by.get(str(bug), ""))
        is_dead = found != "" and not found.startswith("ERROR")
        with self.lock:
            if is_dead:
                self.seen_by[str(bug)] = found
            else:
                self.seen_by.pop(str(bug), None)
                self.lives.append(bug)
            SEEN_BY.write_text(json.dumps(self.seen_by, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
        seconds = time.monotonic() - begun
        print(f"{'died ' if is_dead else 'LIVES'} {seconds:4.0f} s  {bug}  {found}", flush=True)

    def ask_without(self, copy: Copy, tests: list[str]) -> None:
        copy.make_sound()
        answer = copy.ask(tests)
        self.unsound += answer.failed + answer.errors


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="only bugs of files whose path holds one of them")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="one a processor unless given"
    )
    options = parser.parse_args(arguments)
    known = {str(bug): bug for bug in bugs()}
    chosen = [bug for bug in known.values() if not options.words or any(word in bug.path for word in options.words)]
    before = json.loads(SEEN_BY.read_text()) if SEEN_BY.exists() else {}
    # The first copy begins with C++, the others with the rest, so that mostly one of them compiles.
    groups = [list(group) for _, group in groupby(chosen, lambda bug: bug.path)]
    groups.sort(key=lambda group: not group[0].is_cpp)
    copies = [Copy(ROOT / "build" / f"mutants-{number}") for number in range(min(len(groups), options.jobs))]
    for copy in copies:
        copy.update()
    run = Run({bug: test for bug, test in before.items() if bug in known})
    try:
        share(copies, groups, run.plant)
        # A test that fails without a bug has seen nothing.
        asked = sorted({run.seen_by[str(bug)] for bug in chosen if str(bug) in run.seen_by})
        share(
            copies,
            [[list(tests)] for _, tests in groupby(asked, lambda test: test.partition("::")[0])],
            run.ask_without,
        )
    finally:
        for copy in copies:
            copy.close()

    for name in run.unsound:
        print(f"fails without a bug: {name}")
    print(f"{len(chosen)} bugs, {len(run.lives)} of them live")
    for bug in run.lives:
        print(f"  {bug}\n    asked: {shlex.join(bug.tests)}")
    return 1 if run.lives or run.unsound else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
