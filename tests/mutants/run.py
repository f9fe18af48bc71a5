"""Plants the bugs of bugs.toml one by one, and names those that the tests of `make test` do not see.

`python tests/mutants/run.py [WORD ...]` takes all bugs, or those whose file's path holds one of the words. Each is
planted in a copy of the tree, build/mutants, which stays: C++ is compiled there once, and then what a bug has changed.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
COPY = ROOT / "build" / "mutants"
TIMEOUT_S = 1200  # a bug may also make a test run for ever, and is seen by that


@dataclass(frozen=True)
class Bug:
    path: str
    before: str
    after: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.path}: {self.before.strip()!r} -> {self.after.strip()!r}"

    def planted(self, text: str) -> str:
        if text.count(self.before) != 1:
            raise ValueError(f"{self}: expected the text once, found it {text.count(self.before)} times")
        return text.replace(self.before, self.after)


def bugs() -> list[Bug]:
    files = tomllib.loads(Path(__file__).with_name("bugs.toml").read_text())
    return [Bug(path, *pair, tuple(f["tests"])) for path, f in files.items() for pair in f["bugs"]]


def copy_tree() -> None:
    """What differs from it, compiled modules among it, so that the compiler finds the rest as it left it."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    compiled = [str(path.relative_to(ROOT)) for path in (ROOT / "ssl_kernels").glob("*.so")]
    for name in [*filter(None, listed.split("\0")), *compiled]:
        source, target = ROOT / name, COPY / name
        if source.is_file() and not (target.exists() and target.read_bytes() == source.read_bytes()):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())


def call(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    ours = {
        **os.environ, "PYTHONPATH": str(COPY), "PYTHONDONTWRITEBYTECODE": "1", "SSL_KERNELS_CUDA": "0",
        "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], cwd=COPY, env={**ours, **environment}, capture_output=True, text=True,
        timeout=TIMEOUT_S,
    )  # fmt: skip


def build() -> bool:
    """Whether it compiles; what has not changed is not compiled again."""
    return call("setup.py", "-q", "build_ext", "--inplace").returncode == 0


def first_failure(tests: tuple[str, ...]) -> str:
    """Of the default selection; empty if all pass."""
    for test in tests:
        interpreted = "interpreter" in test
        environment = {"TRITON_INTERPRET": "1"} if interpreted else {}
        profile = "brief" if interpreted else "default"
        command = ("-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider")
        command += (f"--hypothesis-profile={profile}", f"tests/{test}")
        try:
            done = call(*command, **environment)
        except subprocess.TimeoutExpired:
            return f"{test} runs on and on"
        if done.returncode != 0:
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return failed[0].split(" - ")[0] if failed else f"{test}: exit status {done.returncode}"
    return ""


def main(words: list[str]) -> int:
    chosen = [bug for bug in bugs() if not words or any(word in bug.path for word in words)]
    copy_tree()
    stale = False  # whether what is compiled has a bug
    lives, sound = [], set[str]()
    for bug in chosen:
        place, is_cpp = COPY / bug.path, bug.path.startswith(("csrc/cpu", "csrc/torch"))
        text = place.read_text()
        unknown = tuple(test for test in bug.tests if test not in sound)
        if stale and (not is_cpp or unknown):
            stale = not build()
        if failure := first_failure(unknown):
            raise SystemExit(f"without a bug: {failure}")
        sound.update(unknown)
        begun = time.monotonic()
        place.write_text(bug.planted(text))
        try:
            found = first_failure(bug.tests) if not is_cpp or build() else "ERROR setup.py"
        finally:
            place.write_text(text)
            stale |= is_cpp
        dead = found != "" and not found.startswith("ERROR")  # what does not compile or load proves nothing
        lives += [] if dead else [bug]
        print(f"{'died ' if dead else 'LIVES'} {time.monotonic() - begun:4.0f} s  {bug}  {found}", flush=True)
    print(f"{len(chosen)} bugs, {len(lives)} of them live")
    for bug in lives:
        print(f"  {bug}\n    asked: {shlex.join(bug.tests)}")
    return 1 if lives else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
