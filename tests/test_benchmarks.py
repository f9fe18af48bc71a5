"""`ssl-kernels bench` and `pytest benchmarks`, at sizes that say nothing of speed, and what becomes of the results."""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssl_kernels import cli
from ssl_kernels.bench import clip, harness, memory, results, sigmoid, small, suite
from ssl_kernels.bench.problem import Case, NotComparableError

PEERS = ("open_clip", "lightly", "pytorch_metric_learning", "transformers", "timm")
ROOT = Path(__file__).resolve().parent.parent


def run(*arguments: str, cwd: Path = ROOT) -> str:
    # pytest-benchmark measures nothing where it believes that it shares the machine with other workers.
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    alone["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=alone, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Inductor's compiling of the formulas would take most of the time; without it they are traced all the same.
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_every_case_is_measured_and_reported(tmp_path: Path, backend: str) -> None:
    for needed in ("rich", *PEERS):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    said = run(
        *("-m", "ssl_kernels.cli", "bench", "--tiny", "--compile-backend", backend, "--output", "found"), cwd=tmp_path
    )
    (folder,) = (tmp_path / "found").iterdir()
    found = results.read(folder, suite.NAMES)
    assert list(found) == list(suite.NAMES)
    cases = suite.cases(size="tiny")
    assert len(cases) == sum(len(result["runs"]) for result in found.values())
    for case in cases:
        op, shape, provider, mode = case
        what = {"shape": op.describe(*shape) + op.suffix, "provider": provider, "mode": mode}
        assert f"{case.name}\n" in said  # its progress, where there is no terminal
        (measured,) = [entry for entry in found[op.name]["runs"] if what.items() <= entry.items()]
        assert measured["seconds"] > 0
        assert ("ours_seconds" in measured) == (provider != "ours")
    for op in suite.OPS:
        assert op.title in said
        assert found[op.name]["machine"]["name"] == folder.name
        assert found[op.name]["absent"] == []
    assert max(path.stat().st_size for path in folder.iterdir()) < 20_000


@pytest.mark.slow  # the fixture and the cases are those of the test above
def test_pytest_compares_with_an_earlier_run(tmp_path: Path) -> None:
    pytest.importorskip("lightly", reason="lightly is not installed")
    # pytest-benchmark wants its storage below the folder that it is started in.
    options = [str(ROOT / "benchmarks"), "--size=tiny", "--ops=queue", "-q", f"--benchmark-storage={tmp_path / 'runs'}"]
    run("-m", "pytest", *options, "--benchmark-autosave", cwd=tmp_path)
    said = run("-m", "pytest", *options, "--benchmark-compare", cwd=tmp_path)
    assert said.count("bench_op[queue-16-64-16-ours] (0001_") == 1


@pytest.mark.slow  # a process of its own; the test below has the reason
def test_pytest_of_the_whole_checkout_measures_nothing() -> None:
    # The tests themselves and the modules' doctests are others' to collect.
    ignored = [f"--ignore={folder}" for folder in ("tests", "ssl_kernels", "docs", "examples")]
    arguments = ["-m", "pytest", ".", "-q", "-o", "addopts=", *ignored]
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, done.stdout + done.stderr


def test_only_a_folder_that_pytest_starts_in_may_name_plugins() -> None:
    assert "pytest_plugins" not in runpy.run_path(str(ROOT / "benchmarks/conftest.py"))


def test_a_full_run_has_each_case_once_and_spares_the_others_large_batches() -> None:
    for size in suite.SIZES:
        names = [case.name for case in suite.cases(size=size)]
        assert len(set(names)) == len(names)
        assert {case.op.name for case in suite.cases(size=size)} == set(suite.NAMES)
    swept = [case for case in suite.cases(["nt_xent"]) if case.shape == (8192, 128)]
    assert [case.provider for case in swept] == ["ours"]
    dense = max(case.shape[0] for case in suite.cases(["nt_xent"]) if case.provider == "lightly")
    assert dense == suite.MOST_DENSE / 2


def has_a_mapping_of_its_own(nbytes: int) -> bool:
    """Whether malloc would take so many bytes from the system, not from its heap."""
    if not memory.is_readable():
        return False
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_size_t],
        [ctypes.c_void_p],
    )
    block = libc.malloc(nbytes)
    try:
        return bool(ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value & 2)
    finally:
        libc.free(block)


class Timer:
    """In place of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.order: list[str] = []
        self.mapped: list[bool] = []

    def pedantic(self, call: Any, rounds: int, setup: Any = lambda: None) -> None:
        for _ in range(rounds):
            setup()
            self.order.append("timed")
            self.mapped.append(has_a_mapping_of_its_own(16 * 2**20))
            call()


def test_ours_takes_a_step_before_each_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, (op, *_) = Timer(), [op for op in suite.OPS if op.name == "sigmoid"]
    monkeypatch.setattr(harness, "_seconds", lambda call: (timer.order.append("ours"), call(), 0.125)[-1])
    harness.measure(timer, "full", "eager", Case(op, op.tiny[0], "eager", "forward"))
    assert timer.order[1:] == ["ours", "timed"] * 4  # the first is to learn how long a step takes
    assert timer.extra_info["ours_seconds"] == 0.125


def test_who_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "errors", {})
    monkeypatch.setattr(sigmoid, "SigLipLoss", lambda: lambda *leaves: 1.001 * sigmoid.eager(*leaves))
    with pytest.raises(AssertionError, match=r"ours: relative error 0.001, allowed 0.0001"):
        harness.measure(Timer(), "tiny", "eager", Case(sigmoid.SIGMOID, (64, 16), "ours", "forward"))


@pytest.mark.parametrize("reason", [ModuleNotFoundError(name="open_clip"), NotComparableError("too large")])
def test_who_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch, reason: Exception) -> None:
    def fails() -> None:
        raise reason

    monkeypatch.setattr(sigmoid, "peer", lambda name: fails)
    case = Case(sigmoid.SIGMOID, (64, 16), "open_clip", "forward")
    expected = "open_clip is not installed" if isinstance(reason, ModuleNotFoundError) else "too large"
    with pytest.raises(pytest.skip.Exception, match=expected):
        harness.measure(Timer(), "tiny", "eager", case)


def test_without_peers_ours_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "errors", {})
    for name in [name for name in sys.modules if name.partition(".")[0] in PEERS]:
        monkeypatch.delitem(sys.modules, name)
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)
    measured, absent = set(), {}
    for case in suite.cases(["clip", "ema", "small"], "tiny"):
        timer = Timer()
        if case.provider == "compile" or case.mode == "forward":
            continue
        try:
            harness.measure(timer, "tiny", "eager", case)
            measured.add(case.name)
        except pytest.skip.Exception as reason:
            absent[case.name] = str(reason)
    assert all(case.name in measured for case in suite.cases(["small"], "tiny") if case.provider == "ours")
    assert absent["small-ClipLoss-16-peer"] == "open_clip is not installed"
    assert absent["small-KoLeoLoss-16-peer"] == "lightly is not installed"
    assert absent["clip-64-16-transformers-forward+backward"] == "transformers is not installed"
    assert absent["ema-3 parameters-fp32-timm"] == "timm is not installed"


def test_a_module_that_ours_lacks_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise ModuleNotFoundError(name="ssl_kernels.lost")

    monkeypatch.setattr(sigmoid, "SigLipLoss", fails)
    with pytest.raises(ModuleNotFoundError):
        harness.measure(Timer(), "tiny", "eager", Case(sigmoid.SIGMOID, (64, 16), "ours", "forward"))


@pytest.mark.skipif(not memory.is_readable(), reason="peak memory is read from Linux's /proc")
def test_tiles_that_are_kept_between_steps_count() -> None:
    for _ in range(2):
        timer = Timer()
        harness.measure(timer, "tiny", "eager", Case(clip.CLIP, (2048, 32), "ours", "forward+backward"))
        assert timer.extra_info["peak_mb"] > 16  # 4 bytes to each of 2,048 x 2,048 pairs


@pytest.mark.skipif(not memory.is_readable(), reason="the allocator is glibc's")
def test_all_times_are_taken_with_the_same_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    ctypes.CDLL("libc.so.6").mallopt(memory._M_MMAP_THRESHOLD, 2**17)  # as in a new process
    for long in (1000.0, 0.0):
        monkeypatch.setattr(harness, "LONG_GFLOP", long)
        timer = Timer()
        harness.measure(timer, "full", "eager", Case(sigmoid.SIGMOID, (64, 16), "ours", "forward"))
        assert timer.mapped
        assert not any(timer.mapped)


def test_an_interrupted_run_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = pytest.importorskip("ssl_kernels.bench.command", reason="rich is not installed")

    def interrupted(arguments: list[str], plugins: Any) -> pytest.ExitCode:
        (path,) = (word.partition("=")[2] for word in arguments if word.startswith("--benchmark-json="))
        Path(path).write_text(json.dumps(DOCUMENT))
        return pytest.ExitCode.INTERRUPTED

    monkeypatch.setattr(command.pytest, "main", interrupted)
    with pytest.raises(SystemExit, match="interrupted"):
        command.main(["queue", "--output", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_quick_run_takes_each_small_loss() -> None:
    assert len({case.shape[0] for case in suite.cases(["small"], "quick")}) == len(small.LOSSES)


DOCUMENT: dict[str, Any] = {
    "machine_info": {
        "cpu": {"brand_raw": "Intel(R) Xeon(R) Processor @ 2.10GHz", "family": 6, "model": 143},
        "machine": "x86_64", "system": "Linux", "python_version": "3.11.7", "node": "somebody's",
        "threads": 2, "instruction_set": "avx512", "load_before": 0.123456789,
    },
    "benchmarks": [
        {
            "extra_info": {"op": "queue", "shape": "B=1", "mode": "update", "peak_mb": 1.0, **more},
            "stats": {"min": seconds, "median": 2 * seconds, "rounds": 3, "data": [1.0] * 100},
        }
        for seconds, more in (
            (0.001, {"provider": "ours", "gbytes": 0.01, "copy_gbytes_per_s": 20.0}),
            (0.003456789, {"provider": "lightly", "ours_seconds": 0.002}),
        )
    ],
}  # fmt: skip


def test_results_keep_what_a_reader_needs(tmp_path: Path) -> None:
    absent = [{"op": "queue", "shape": "B=1", "mode": "update", "provider": "moco", "reason": "not installed"}]
    paths = results.write(tmp_path, results.from_document(DOCUMENT, absent, "full"))
    assert [path.relative_to(tmp_path).parts[1] for path in paths] == ["queue.json"]
    result = json.loads(paths[0].read_text())
    assert "somebody" not in paths[0].read_text()
    assert result["machine"]["processor"] == "Intel Xeon family 6 model 143"
    assert result["runs"][1]["seconds"] == 0.0034568
    (row,) = results.rows(result)
    assert (row.time("lightly"), row.memory("lightly"), row.time("moco")) == ("1.7x", "1", "not installed")
    assert row.peer == "lightly"
    assert row.limit == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("times", "text"), [(0.04, "0.0"), (1.26, "1.3"), (9.99, "10.0"), (12.6, "13"), (99.6, "100"), (271.4, "271")]
)
def test_ratios_have_the_digits_that_they_bear(times: float, text: str) -> None:
    assert results.relative(times) == text


def test_the_command_names_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "sigmoids"])
    assert "expected ops of sigmoid, clip" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else name)
    assert cli.main(["bench"]) == 2
    assert 'bench: missing rich; install the extra "bench": pip install ".[bench]" in' in capsys.readouterr().err


def test_compare_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--help"]) == 0
    assert "usage: ssl-kernels compare RUN" in capsys.readouterr().out
