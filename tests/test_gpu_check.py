"""`make gpu-check` on a CPU, at sizes that say nothing about speed: its steps, its report, and what goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks").is_dir():
    pytest.skip("needs the checkout, whose benchmarks these are", allow_module_level=True)


import gpu_bench  # noqa: E402
import gpu_check  # noqa: E402
from gpu_check import Check, Report, Step  # noqa: E402

import ssl_kernels  # noqa: E402
from ssl_kernels.bench import sigmoid  # noqa: E402

PEERS = {  # by what they are imported as: how pip calls them, and their code
    "siglip_kernel": ("siglip-kernel", "import os\nprint('it is about to end', flush=True)\nos._exit(7)"),
    "memeff": ("memeff", "class MemoryEfficientCLIPLoss:\n    def __init__(self, temperature): ..."),
    "inf_cl": ("inf-cl", "raise RuntimeError('no driver here')"),
    "cut_cross_entropy": (
        "cut-cross-entropy",
        "def linear_cross_entropy(e, c, targets, *, filter_eps): return 2 * (e * c).sum()",
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """All but the build, beside peers that each fail in a way of its own, with a sanitizer that finds nothing."""
    folder = tmp_path_factory.mktemp("gpu_check")
    for module, (distribution, code) in PEERS.items():
        (folder / f"{module}.py").write_text(code + "\n")
        metadata = folder / f"{distribution.replace('-', '_')}-9.9.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 9.9\n")
    tool = folder / "compute-sanitizer"
    tool.write_text('#!/bin/sh\n[ "$2" = racecheck ] && exit\nshift 6\nexec "$@"\n')  # the tests once are enough
    tool.chmod(0o755)
    output = folder / "results" / "gpu_check.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("OMP_NUM_THREADS", "1")  # of sizes this small, several threads make more work
        patch.setattr(gpu_check, "sanitizer", lambda: str(tool))
        tiny = {"first": ([gpu_check.VALUES], "", "test_small and bfloat16-clip or test_every_op")}
        tiny |= {name: step for name, step in gpu_check.TESTS.items() if name != "first"}
        patch.setattr(gpu_check, "TESTS", tiny)
        patch.setattr(gpu_check, "SANITIZED", "test_small and bfloat16-clip")
        status = gpu_check.main(["--device", "cpu", "--tiny", "--skip", "build", "--output", str(output)])
    return status, json.loads(output.read_text()), output.with_suffix(".md").read_text()


def measured(report: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in report["benchmarks"] if all(row.get(name) == value for name, value in wanted.items())]


def test_every_step_and_the_tests_are_reported(run: tuple[int, dict[str, Any], str]) -> None:
    _, report, text = run
    steps = {step["name"]: step for step in report["steps"]}
    assert [steps[name]["status"] for name in ("build", *gpu_check.TESTS, "sanitizer")] == ["skipped", *["ok"] * 4]
    assert steps["sanitizer"]["detail"] == "memcheck: ok\nracecheck: ok\n"
    assert report["tests"]["passed"] >= 6
    assert report["tests"]["failed"] == report["tests"]["not_reached"] == []
    assert "needs a GPU, and the tests run on cpu" in text
    assert {entry["op"].partition("-")[2].partition("-")[0] for entry in report["graphs"]} >= {"clip_loss", "enqueue_"}
    assert all(entry["outcome"] == "skipped" for entry in report["graphs"])
    assert report["elapsed_s"] < report["budget_s"] == gpu_check.BUDGET_S
    assert report["machine"]["torch"] == torch.__version__
    assert "Tiny sizes" in text


def test_every_op_is_measured_beside_the_others(run: tuple[int, dict[str, Any], str]) -> None:
    _, report, text = run
    for group in gpu_bench.GROUPS:
        if group.name == "sigmoid, siglip-kernel":  # its process ended
            continue
        ours = measured(report, group=group.name, provider="ours", status="measured")
        assert {row["mode"] for row in ours} == {*group.op.modes}
        for row in ours:
            assert row["ms"] > 0
            assert row["error"] < 1e-4
            limit = "of_matrix_rate" if "gflop" in row else "of_bandwidth"
            assert 0 < row[limit] < 100
            if group.name == group.op.name + group.op.suffix:  # the first of its op
                assert f"| {row['mode']} | {row['shape']} | ours | {row['ms']:.3g} | 1.00x |" in text
    assert measured(report, op="clip", provider="eager", status="measured")
    for op in ("sigmoid", "clip", "dino", "ema", "queue", "info_nce", "nt_xent"):
        assert f"\n## {op}\n" in text


def test_peers_that_fail_are_said_to_and_stop_nothing(run: tuple[int, dict[str, Any], str]) -> None:
    status, report, text = run
    (call,) = measured(report, provider="memeff")
    assert call["status"] == "failed"
    assert call["detail"].startswith("TypeError: MemoryEfficientCLIPLoss.__init__() got an unexpected keyword argument")
    (imported,) = measured(report, provider="Inf-CL")
    assert (imported["status"], imported["detail"]) == ("import failed", "RuntimeError: no driver here")
    (wrong,) = measured(report, provider="cut-cross-entropy")
    assert wrong["status"] == "outputs differ"
    assert "ms" not in wrong
    (lost,) = measured(report, provider="siglip-kernel")
    assert (lost["status"], lost["detail"]) == ("failed", "its process ended: it is about to end")
    for row in (call, imported, wrong, lost):
        assert row["detail"] in text
    assert report["providers"]["memeff"] == "9.9"
    # Ours has done nothing wrong.
    assert {step["name"]: step["status"] for step in report["steps"]}["benchmarks"] == "ok"
    assert status == 0


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    assert capsys.readouterr().err.startswith(f"gpu-check: no GPU: torch {torch.__version__}, built for ")


def test_make_knows_it() -> None:
    commands = subprocess.run(["make", "-n", "gpu-check"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert any(line.endswith("python benchmarks/gpu_check.py") for line in commands.splitlines())


# ---- time


def test_what_the_budget_cuts_is_named() -> None:
    report = Check("cpu", tiny=True, budget_s=gpu_check.REPORT_S).run()
    assert [step.status for step in report.steps] == ["cut"] * len(gpu_check.SHARES)
    assert gpu_check.markdown(report).count("| cut | 0 | 0 | no time was left |") == len(gpu_check.SHARES)


def test_a_command_past_its_limit_ends_with_all_that_it_started() -> None:
    start = time.monotonic()
    assert gpu_check.execute(["sh", "-c", "echo begun; sleep 3600; true"], 5.0, {}) == ("cut", "begun")
    assert time.monotonic() - start < 600
    assert gpu_check.execute([sys.executable, "-c", "print('x'); raise SystemExit(3)"], 60, {}) == ("failed", "x")


def test_an_interrupt_ends_what_it_had_started() -> None:
    def interrupt(line: str) -> None:
        started.append(int(line))
        raise KeyboardInterrupt

    started: list[int] = []
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        gpu_check.execute([sys.executable, "-c", child], 60, {}, interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


def test_what_was_found_is_kept_when_the_machine_is_taken_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    output = tmp_path / "report.json"

    def lost(command: list[str], limit_s: float, environment: Any, receive: Any = None) -> tuple[str, str]:
        if receive is None:  # tests
            entries = [{"collected": ["a", "b"]}, {"test": "a", "outcome": "passed", "detail": ""}]
            Path(environment["SSL_KERNELS_TEST_LOG"]).write_text("\n".join(map(json.dumps, entries)))
            return "ok", ""
        row = {"op": "x", "group": "x", "shape": "", "mode": "forward", "provider": "ours", "status": "measured"}
        receive(json.dumps({**row, "ms": 1.0, "launch_ms": 0.1, "peak_mb": 1, "error": 0.0}))
        receive(json.dumps({"done": gpu_bench.GROUPS[0].name}))
        raise SystemExit("the machine is gone")

    monkeypatch.setattr(gpu_check, "execute", lost)
    arguments = ["--device", "cpu", "--tiny", "--no-build", "--skip", "sanitizer", "--output", str(output)]
    with pytest.raises(SystemExit, match="the machine is gone"):
        gpu_check.main(arguments)
    kept = json.loads(output.read_text())
    steps = {step["name"]: step["status"] for step in kept["steps"]}
    assert steps == {
        "build": "skipped", **dict.fromkeys(gpu_check.TESTS, "ok"), "sanitizer": "skipped", "benchmarks": "running",
    }  # fmt: skip
    assert (kept["tests"]["collected"], kept["tests"]["passed"]) == (6, 3)
    assert [row["ms"] for row in kept["benchmarks"]] == [1.0]
    assert "| benchmarks | running |" in output.with_suffix(".md").read_text()
    assert kept["machine"]["torch"] == torch.__version__  # known before the benchmarks tell of it
    assert datetime.fromisoformat(kept["measured"]).year >= 2026
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_another_python_is_handed_the_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text('#!/bin/sh\necho "$@" > "$(dirname "$0")/told"\nexit 3\n')
    other.chmod(0o755)
    arguments = ["--python", str(other), "--no-build", "--budget", "5"]
    assert gpu_check.main(arguments) == 3
    assert (tmp_path / "told").read_text().split() == [gpu_check.__file__, *arguments]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--python", sys.executable]) == 2  # itself


def test_a_checkout_that_is_not_installed_is_what_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a Python that finds torch and nothing else: site's hooks, by which a checkout is installed, are left out."""
    monkeypatch.setenv("PYTHONPATH", str(Path(torch.__file__).parents[1]))
    job = json.dumps({"device": "cpu", "tiny": True, "seconds": 1, "groups": []})
    command = [sys.executable, "-S", gpu_check.__file__, "--worker", job]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["machine"]["ssl_kernels"] == ssl_kernels.__version__
    # Whatever the tests start finds it, too.
    assert Check("cpu", tiny=True, budget_s=60).environment()["PYTHONPATH"].startswith(str(ROOT) + os.pathsep)


def test_the_build_is_for_the_card_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    major = torch.version.cuda.partition(".")[0] if torch.version.cuda else "13"
    monkeypatch.setattr(torch.version, "cuda", f"{major}.0")
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {major}.0, V{major}.0.1\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for wished, expected in (("", {"TORCH_CUDA_ARCH_LIST": "9.0"}), ("8.0", {})):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", wished)
        environment, note = gpu_check.build_environment()
        assert environment == {"SSL_KERNELS_CUDA": "1", **expected}
        assert note == ("with CUDA C++" if wished else "with CUDA C++ for 9.0")


@pytest.mark.parametrize(
    ("missing", "status"), [("pytorch_metric_learning.losses", "not installed"), ("triton", "failed")]
)
def test_ours_beside_a_package_that_is_not_installed(
    missing: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written for a package needs it; what everything needs is missed."""

    def absent() -> Any:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(sigmoid, "SigLipLoss", absent)
    group = dataclasses.replace(gpu_bench.GROUPS[0], providers=("ours",))
    rows = list(gpu_bench.measure(group, torch.device("cpu"), tiny=True, deadline=time.monotonic() + 60))
    assert [row["status"] for row in rows] == [gpu_bench.STARTED, status]
    assert rows[1]["detail"] == f"ModuleNotFoundError: No module named {missing!r}"


def test_groups_past_the_deadline_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = list(gpu_bench.measure(gpu_bench.GROUPS[0], torch.device("cpu"), tiny=True, deadline=time.monotonic()))
    assert [row["provider"] for row in rows] == list(gpu_bench.GROUPS[0].providers)
    assert {row["status"] for row in rows} == {"cut"}

    def one_group(command: Any, limit_s: float, environment: Any, receive: Any = None) -> tuple[str, str]:
        receive(json.dumps({"done": gpu_bench.GROUPS[0].name}))
        return "cut", ""

    monkeypatch.setattr(gpu_check, "execute", one_group)
    check, step = Check("cpu", tiny=True, budget_s=60), Step("benchmarks", limit_s=0.05)
    monkeypatch.setattr(gpu_check.time, "monotonic", ticking(0.04))
    check.benchmarks(step)
    assert step.status == "cut"
    cut = [row["group"] for row in check.report.benchmarks]
    assert cut == [group.name for group in gpu_bench.GROUPS[1:]]


def ticking(by: float) -> Any:
    """A clock that moves on at each look."""
    now = iter(range(10**6))
    return lambda: next(now) * by


def test_tests_that_were_not_reached(tmp_path: Path) -> None:
    log = tmp_path / "tests.jsonl"
    entries = [
        {"collected": ["a", "b::test_cuda_graph[x]", "c", "d"]},
        {"test": "a", "outcome": "passed", "detail": ""},
        {"test": "b::test_cuda_graph[x]", "outcome": "failed", "detail": "AssertionError: 1 != 2"},
        {"test": "c", "outcome": "skipped", "detail": "needs two GPUs"},
    ]
    log.write_text("\n".join(map(json.dumps, entries)))
    found = gpu_check.summarize(log)
    graphs = gpu_check.graphs(found.pop("all"))
    assert (found["collected"], found["passed"], found["not_reached"]) == (4, 1, ["d"])
    assert graphs == [{"op": "x", "outcome": "failed", "detail": "AssertionError: 1 != 2"}]
    text = gpu_check.markdown(Report("cpu", tiny=True, budget_s=1, tests=found, graphs=graphs))
    for part in (
        "failed: `b::test_cuda_graph[x]`",
        "1 != 2",
        "skipped 1: needs two GPUs",
        "not reached, for time: `d`",
    ):
        assert part in text
    assert gpu_check.summarize(tmp_path / "none")["collected"] == 0


def test_files_of_which_no_test_is_collected_are_logged(tmp_path: Path) -> None:
    lacks = "import pytest\npytest.importorskip('nothing_x', reason='nothing_x is absent')\n"
    (tmp_path / "test_lacks.py").write_text(lacks)
    (tmp_path / "test_breaks.py").write_text("import nothing_x")
    log = tmp_path / "tests.jsonl"
    environment = Check("cpu", tiny=True, budget_s=60).environment(SSL_KERNELS_TEST_LOG=str(log))
    command = [*gpu_check.pytest_command(), "-p", "gpu_tests_log", "-c", os.devnull, str(tmp_path)]
    assert gpu_check.execute(command, 60, environment)[0] == "failed"
    found = gpu_check.summarize(log)
    assert [test["detail"] for test in found["skipped"]] == ["nothing_x is absent"]
    (broken,) = found["failed"]
    assert "No module named 'nothing_x'" in broken["detail"]


# ---- what is wrong is not passed over


def test_a_failed_step_is_the_exit_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "execute", lambda *_: ("failed", "nvcc: error"))
    monkeypatch.setattr(gpu_check, "sanitizer", lambda: "compute-sanitizer")
    output = tmp_path / "report.json"
    assert gpu_check.main(["--device", "cpu", "--tiny", "--output", str(output)]) == 1
    assert {step["status"] for step in json.loads(output.read_text())["steps"]} == {"failed"}
    assert "nvcc: error" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize(("outcome", "status"), [("passed", "cut"), ("failed", "failed")])
def test_a_test_that_failed_before_the_time_was_up(outcome: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(command: Any, limit_s: float, environment: dict[str, str]) -> tuple[str, str]:
        entries = [{"collected": ["a", "b"]}, {"test": "a", "outcome": outcome, "detail": ""}]
        Path(environment["SSL_KERNELS_TEST_LOG"]).write_text("\n".join(map(json.dumps, entries)))
        return "cut", ""

    monkeypatch.setattr(gpu_check, "execute", cut)
    step = Step("values", limit_s=60)
    Check("cpu", tiny=True, budget_s=60).tests(step)
    assert step.status == status
    assert step.detail.endswith("1 not reached")


def test_a_process_that_ends_early_fails_whatever_it_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "execute", lambda *_: ("ok", "bye"))
    check, step = Check("cpu", tiny=True, budget_s=60), Step("benchmarks", limit_s=5)
    check.benchmarks(step)
    assert step.status == "failed"
    assert [row["group"] for row in check.report.benchmarks] == gpu_check.group_names()
    assert {row["detail"] for row in check.report.benchmarks} == {"its process ended: bye"}


@pytest.mark.skipif(torch.version.cuda is None, reason="torch is not a CUDA build")
@pytest.mark.parametrize("major", ["", "9", (torch.version.cuda or "").partition(".")[0]])
def test_only_a_toolkit_of_torch_s_cuda_must_build(major: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if major:
        nvcc = tmp_path / "bin/nvcc"
        nvcc.parent.mkdir()
        nvcc.write_text(f"#!/bin/sh\necho Cuda compilation tools, release {major}.1, V{major}.1.2\n")
        nvcc.chmod(0o755)
    environment, note = gpu_check.build_environment()
    if major in ("", "9"):
        assert environment == {}
        assert note.startswith("without CUDA C++: nvcc " + ("is of CUDA 9" if major else "was not found"))
    else:
        assert environment == {"SSL_KERNELS_CUDA": "1"}


def larger(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return 1.01 * sigmoid.eager(x, *others)


def with_a_gradient_of_nan(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    return sigmoid.eager(x, *others) + (x - x.detach()).abs().sum().sqrt()


@pytest.mark.parametrize("wrong", [larger, with_a_gradient_of_nan])
def test_wrong_numbers_of_ours_fail_the_step(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    group = dataclasses.replace(gpu_bench.GROUPS[0], providers=("ours",))
    monkeypatch.setattr(sigmoid, "SigLipLoss", lambda: wrong)
    rows = list(gpu_bench.measure(group, torch.device("cpu"), tiny=True, deadline=time.monotonic() + 60))
    (ours,) = [row for row in rows if row["status"] != gpu_bench.STARTED]
    assert ours["status"] == "outputs differ"

    def worker(command: Any, limit_s: float, environment: Any, receive: Any = None) -> tuple[str, str]:
        receive(json.dumps(ours))
        for name in gpu_check.group_names():
            receive(json.dumps({"done": name}))
        return "ok", ""

    monkeypatch.setattr(gpu_check, "execute", worker)
    step = Step("benchmarks", limit_s=60)
    Check("cpu", tiny=True, budget_s=60).benchmarks(step)
    assert step.status == "failed"
    assert step.detail.endswith("wrong: sigmoid B=64 D=16")


def test_benchmarks_that_cannot_be_imported_are_said_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "gpu_bench", None)
    output = tmp_path / "report.json"
    arguments = [
        "--device",
        "cpu",
        "--tiny",
        "--output",
        str(output),
        "--no-build",
        "--skip",
        *gpu_check.TESTS,
        "sanitizer",
    ]
    assert gpu_check.main(arguments) == 1
    assert "import of gpu_bench halted" in output.with_suffix(".md").read_text()
