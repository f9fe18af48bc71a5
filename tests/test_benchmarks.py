"""`ssl-kernels bench` and `pytest benchmarks`, at sizes that say nothing of speed, and what becomes of the results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssl_kernels import cli
from ssl_kernels.bench import harness, results, sigmoid, suite
from ssl_kernels.bench.problem import Case, NotComparableError

for needed in ("rich", "open_clip", "lightly", "pytorch_metric_learning", "transformers", "timm"):
    pytest.importorskip(needed, reason=f"{needed} is not installed")

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
    options = ["benchmarks", "--size=tiny", "--ops=queue", "-q", f"--benchmark-storage={tmp_path}"]
    run("-m", "pytest", *options, "--benchmark-autosave")
    said = run("-m", "pytest", *options, "--benchmark-compare")
    assert said.count("bench_op[queue-16-64-16-ours] (0001_") == 1


def test_a_full_run_has_each_case_once_and_spares_the_others_large_batches() -> None:
    for size in suite.SIZES:
        names = [case.name for case in suite.cases(size=size)]
        assert len(set(names)) == len(names)
        assert {case.op.name for case in suite.cases(size=size)} == set(suite.NAMES)
    swept = [case for case in suite.cases(["nt_xent"]) if case.shape == (32_768, 128)]
    assert [case.provider for case in swept] == ["ours"]
    dense = max(case.shape[0] for case in suite.cases(["nt_xent"]) if case.provider == "lightly")
    assert dense == suite.MOST_DENSE / 2


class Timer:
    """In place of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.order: list[str] = []

    def pedantic(self, call: Any, rounds: int, setup: Any = lambda: None) -> None:
        for _ in range(rounds):
            setup()
            self.order.append("timed")
            call()


def test_ours_takes_a_step_before_each_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    timer, (op, *_) = Timer(), [op for op in suite.OPS if op.name == "sigmoid"]
    monkeypatch.setattr(harness, "_seconds", lambda call: (timer.order.append("ours"), call(), 0.25)[-1])
    harness.measure(timer, "full", "eager", Case(op, op.tiny[0], "eager", "forward"))
    assert timer.order[1:] == ["ours", "timed"] * 4  # the first is to learn how long a step takes
    assert timer.extra_info["ours_seconds"] == 0.25


def test_who_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "errors", {})
    monkeypatch.setattr(sigmoid, "SigLipLoss", lambda: lambda *leaves: 1.001 * sigmoid.eager(*leaves))
    with pytest.raises(AssertionError, match=r"ours: relative error 0.001, allowed 0.0001"):
        harness.measure(Timer(), "tiny", "eager", Case(sigmoid.SIGMOID, (64, 16), "ours", "forward"))


@pytest.mark.parametrize("reason", [ModuleNotFoundError("no open_clip"), NotComparableError("too large")])
def test_who_cannot_be_measured_is_named(monkeypatch: pytest.MonkeyPatch, reason: Exception) -> None:
    def fails() -> None:
        raise reason

    monkeypatch.setattr(sigmoid, "peer", lambda name: fails)
    case = Case(sigmoid.SIGMOID, (64, 16), "open_clip", "forward")
    expected = "not installed" if isinstance(reason, ModuleNotFoundError) else "too large"
    with pytest.raises(pytest.skip.Exception, match=expected):
        harness.measure(Timer(), "tiny", "eager", case)


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
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "sigmoids"])
    assert "expected ops of sigmoid, clip" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "rich" else name)
    assert cli.main(["bench"]) == 2
    assert 'bench: missing rich; install the extra "bench": pip install ".[bench]" in' in capsys.readouterr().err
