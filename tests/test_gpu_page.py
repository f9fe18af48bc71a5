"""docs/gpu_measured.md is made of the committed reports of `make gpu-check`, and of nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
if not all((ROOT / folder).is_dir() for folder in ("docs", "benchmarks")):
    pytest.skip("needs the checkout, whose pages these are", allow_module_level=True)

import gpu_page  # noqa: E402
from gpu_check import Report, Step  # noqa: E402


def row(provider: str, ms: float, group: str = "sigmoid", **more: Any) -> dict[str, Any]:
    """As gpu_bench.py gives it."""
    found = {"op": group.partition(",")[0], "provider": provider, "shape": "B=8192 D=512", "dtype": "bfloat16"}
    found |= {"group": group, "status": "measured", "error": 1e-3, "mode": "forward+backward"}
    found |= {"ms": ms, "peak_mb": 1234.4, "launch_ms": 0.25, "gflop": 1.0, "matrix_tflops": 700.2}
    return found | {"of_matrix_rate": 0.512} | more


def absent(provider: str, status: str, detail: str, group: str = "sigmoid") -> dict[str, Any]:
    return {
        "op": "sigmoid",
        "group": group,
        "provider": provider,
        "shape": "B=1 D=2",
        "status": status,
        "detail": detail,
    }


def report(**more: Any) -> Report:
    """A run that was cut off, after one test had failed."""
    card = {"device": "Some H1", "torch": "2.11.0+cu130", "cuda": "13.0", "hip": None, "triton": "3.6.0"}
    card |= {"ssl_kernels": "9.9.9", "capability": "9.0", "memory_gb": 139.8, "multiprocessors": 132}
    tests = {"collected": 12, "passed": 7, "not_reached": ["d", "e"]}
    tests |= {"failed": [{"test": "t.py::a", "detail": "AssertionError: 1 != 2"}]}
    tests |= {"skipped": [{"test": name, "detail": "needs two GPUs"} for name in ("b", "c")]}
    steps = [
        Step("build", "skipped", 0.0, 120.0, "as asked"),
        Step("first", "ok", 31.0, 60.0, "7 passed"),
        Step("values", "failed", 150.2, 150.0, "7 passed, 1 failed\nall that it printed"),
        Step("device", "cut", 77.9, 78.0, "2 not reached"),
        Step("benchmarks", "running", 0.0, 300.0),
    ]
    rows = [
        row("ours", 2.0),
        row("eager", 5.0, peak_mb=9876.5),
        row("compile", 3.0, peak_mb=None),
        absent("open_clip", "out of memory", "as at a smaller shape"),
        row("ours", 2.5, "sigmoid, siglip-kernel"),
        row("siglip-kernel", 5.5, "sigmoid, siglip-kernel"),
        row("ours", 0.5, "queue", mode="update", matrix_tflops=None, of_matrix_rate=None)
        | {"of_bandwidth": 0.25, "copy_gbytes_per_s": 4300.0},
        row("moco", 0.7, "queue", mode="update", shape="B=1"),
    ]
    fields: dict[str, Any] = {"device": "cuda", "tiny": False, "budget_s": 600.0, "measured": "2031-02-03"}
    fields |= {"elapsed_s": 420.4, "machine": card, "steps": steps, "tests": tests, "benchmarks": rows}
    return Report(**(fields | more))


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    folder = tmp_path / "results/gpu"
    monkeypatch.setattr(gpu_page, "RESULTS", folder)
    monkeypatch.setattr(gpu_page, "PAGE", tmp_path / "page.md")
    return folder


def saved(path: Path, **more: Any) -> str:
    path.write_text(json.dumps(asdict(report(**more))))
    return str(path)


def test_the_page_says_what_the_reports_say() -> None:
    assert gpu_page.PAGE.read_text() == gpu_page.page(gpu_page.reports()), "run `make gpu-page`"


def test_the_other_pages_know_whether_a_gpu_has_run_this() -> None:
    for page in ("README.md", "docs/gpu.md", "docs/install.md"):
        says_none = "No GPU has run" in (ROOT / page).read_text()
        assert says_none == (not gpu_page.reports()), f"{page}: does benchmarks/results/gpu/ agree?"


def test_without_a_report_the_page_says_that_and_how_to_make_one() -> None:
    text = gpu_page.page([])
    assert "Nothing has been measured on a GPU yet: `make gpu-check`" in text
    assert "|" not in text
    assert "2.0x" not in text


def test_figures_stand_side_by_side_with_the_card_the_versions_and_the_day() -> None:
    lines = gpu_page.page([report()]).splitlines()
    assert "Nothing has been measured" not in "\n".join(lines)
    assert "## Some H1, 2031-02-03" in lines
    assert (
        "Some H1, torch 2.11.0+cu130, CUDA 13.0, Triton 3.6.0, ssl_kernels 9.9.9, compute capability 9.0, "
        "132 multiprocessors; measured 2031-02-03 in 420 s."
    ) in lines
    at = lines.index("### sigmoid on Some H1, 2031-02-03")
    # siglip-kernel is held against ours in its own process, which is not the one that the table prints.
    assert lines[at + 2 : at + 7] == [
        "| mode | shape | dtype | ours, ms | eager | compile | siglip-kernel | of GEMM | GEMM, TFLOP/s | launch, ms "
        "| MB ours | MB eager |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        "| forward+backward | B=8192 D=512 | bfloat16 | 2 | 2.50x | 1.50x | 2.20x | 51% | 700 | 0.25 | 1,234 | 9,876 |",
        "",
        "- open_clip B=1 D=2: out of memory: as at a smaller shape",
    ]
    at = lines.index("### queue on Some H1, 2031-02-03")
    assert lines[at + 2 :] == [
        "| mode | shape | dtype | ours, ms | moco | of copy | copy, GB/s | launch, ms | MB ours |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
        "| update | B=8192 D=512 | bfloat16 | 0.5 |  | 25% | 4,300 | 0.25 | 1,234 |",
        "| update | B=1 | bfloat16 |  | 0.7 ms |  |  |  |  |",
    ]


def test_what_failed_and_what_was_cut_off_is_said() -> None:
    text = gpu_page.page([report()])
    for said in (
        "7 of 12 tests on the device passed, 1 failed, 2 were skipped, and 2 were not reached for lack of time.",
        "- The step `build` was left out: as asked.",
        "- The step `values` failed after 150 s: 7 passed, 1 failed.",
        "- The step `device` was cut off after 78 s: 2 not reached.",
        "- The step `sanitizer` had not begun when the report was last written.",
        "- The step `benchmarks` had not ended when the report was last written.",
        "- The test `t.py::a` failed.",
        "- skipped 2: needs two GPUs",
    ):
        assert f"\n{said}\n" in text
    assert "`first`" not in text
    assert "all that it printed" not in text
    text = gpu_page.page([report(tests={}, benchmarks=[absent("all", "cut", "no time was left")])])
    assert "tests on the device" not in text
    assert text.endswith("\n### sigmoid on Some H1, 2031-02-03\n\n- all B=1 D=2: cut: no time was left\n")


def test_reports_are_added_once_and_the_latest_comes_first(results: Path, tmp_path: Path) -> None:
    first = saved(tmp_path / "a.json", benchmarks=[])
    gpu_page.main([first])
    name = "some-h1-torch-2.11.0-cu130-2031-02-03"
    assert [path.name for path in results.iterdir()] == [f"{name}.json"]
    later = saved(tmp_path / "b.json", measured="2031-03-01")
    gpu_page.main([first, saved(tmp_path / "c.json"), later])
    gpu_page.main([])
    assert sorted(path.name for path in results.iterdir()) == [
        f"{name}-2.json", f"{name}.json", "some-h1-torch-2.11.0-cu130-2031-03-01.json",
    ]  # fmt: skip
    text = gpu_page.PAGE.read_text()
    days = [line for line in text.splitlines() if line.startswith("## ")]
    assert days == [f"## Some H1, {day}" for day in ("2031-03-01", "2031-02-03", "2031-02-03")]


@pytest.mark.parametrize(
    ("more", "got"), [({"tiny": True}, "tiny sizes on cuda"), ({"device": "cpu"}, "full sizes on cpu")]
)
def test_what_says_nothing_of_a_gpu_is_refused(more: dict[str, Any], got: str, results: Path, tmp_path: Path) -> None:
    path = saved(tmp_path / "a.json", **more)
    with pytest.raises(SystemExit, match=f"a.json: expected a report of a GPU at full sizes, got {got}"):
        gpu_page.main([path])
    assert not results.exists()
    assert not gpu_page.PAGE.exists()
