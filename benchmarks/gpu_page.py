"""The page docs/gpu_measured.md, from the committed reports of `make gpu-check` and from nothing else.

    python benchmarks/gpu_page.py [REPORT ...]

adds reports to benchmarks/results/gpu/, if there are any to add, and writes the page anew. A report of tiny sizes or of
a CPU says nothing of a GPU, and is refused.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from gpu_check import ROOT, SHARES, Report, Step
from gpu_report import Row, in_ours, skipped_tests, unmeasured

RESULTS, PAGE = ROOT / "benchmarks/results/gpu", ROOT / "docs/gpu_measured.md"

HEAD = """\
# Measured on GPUs

`make gpu-page` wrote this page from the reports of `make gpu-check` in `benchmarks/results/gpu/`, and from nothing
else.
"""
NOTHING = """
Nothing has been measured on a GPU yet: `make gpu-check` on a machine with one writes a report, and `make gpu-page` then
adds that report to this page.
"""
HOW_TO_READ = """
- Outputs are compared first: nobody is timed whose value or gradients differ from those of the formula.
- Times are the device's. Those of others are relative to ours in the same process: 2.0x means twice as slow. What was
  not measured is an empty field, and the reason stands below the table.
- "eager" is the formula in plain PyTorch, "compile" is what `torch.compile` makes of it.
- "GEMM" is the rate of `torch.mm` on matrices of that depth, and "copy" that of a copy in the device's memory, both
  measured in the same process. Our share of them counts only the work that the loss cannot do without.
- "launch" is the host's time to launch a step of ours. "MB" is the peak of a step above what is allocated before it.
"""
VERSIONS = {"torch": "torch", "cuda": "CUDA", "hip": "ROCm", "triton": "Triton", "ssl_kernels": "ssl_kernels"}
OUTCOMES = {
    "failed": "failed after {:.0f} s",
    "cut": "was cut off after {:.0f} s",
    "skipped": "was left out",
    "running": "had not ended when the report was last written",
    "not run": "had not begun when the report was last written",
}
# Of ours, but the rates, which are the machine's: title, field, format.
LIMITS = [
    ("of GEMM", "of_matrix_rate", ".0%"),
    ("GEMM, TFLOP/s", "matrix_tflops", ",.0f"),
    ("of copy", "of_bandwidth", ".0%"),
    ("copy, GB/s", "copy_gbytes_per_s", ",.0f"),
    ("launch, ms", "launch_ms", ".3g"),
    ("MB ours", "peak_mb", ",.0f"),
]


def read(path: Path) -> Report:
    report = Report(**json.loads(path.read_text()))
    report.steps = [Step(**step) for step in report.steps]  # type: ignore[arg-type]
    return report


def reports() -> list[Report]:
    """The latest first."""
    return sorted(map(read, sorted(RESULTS.glob("*.json"))), key=lambda report: report.measured, reverse=True)


def add(path: Path) -> None:
    """To those that are committed, by card, torch and day. One that is there already is not added again."""
    report = read(path)
    if report.tiny or report.device != "cuda":
        sizes = "tiny" if report.tiny else "full"
        raise SystemExit(f"{path}: expected a report of a GPU at full sizes, got {sizes} sizes on {report.device}")
    if any(kept.read_text() == path.read_text() for kept in RESULTS.glob("*.json")):
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    words = f"{report.machine['device']} torch {report.machine['torch']} {report.measured}"
    name, count = re.sub(r"[^a-z0-9.]+", "-", words.lower()), 1
    while (target := RESULTS / (f"{name}.json" if count == 1 else f"{name}-{count}.json")).exists():
        count += 1
    target.write_text(path.read_text())


def page(found: Sequence[Report]) -> str:
    if not found:
        return HEAD + NOTHING
    return HEAD + HOW_TO_READ + "".join(f"\n{line}" for report in found for line in section(report)) + "\n"


def section(report: Report) -> Iterator[str]:
    """Of one run: with what, what ran to its end, and a table for each op. Each heading tells the card and the day."""
    machine, where = report.machine, f"{report.machine['device']}, {report.measured}"
    yield f"## {where}\n"
    parts = [f"{title} {machine[name]}" for name, title in VERSIONS.items() if machine.get(name)]
    if machine.get("capability"):
        parts += [f"compute capability {machine['capability']}", f"{machine['multiprocessors']} multiprocessors"]
    yield f"{machine['device']}, {', '.join(parts)}; measured {report.measured} in {report.elapsed_s:.0f} s.\n"
    yield from steps(report)
    for op in dict.fromkeys(row["op"] for row in report.benchmarks):
        yield f"\n### {op} on {where}\n"
        yield from table([row for row in report.benchmarks if row["op"] == op])


def steps(report: Report) -> Iterator[str]:
    """The tests in numbers, and whatever did not run to a good end."""
    tests = report.tests
    if tests:
        failed, skipped, late = (len(tests[name]) for name in ("failed", "skipped", "not_reached"))
        yield (
            f"{tests['passed']} of {tests['collected']} tests on the device passed, {failed} failed, {skipped} were "
            f"skipped, and {late} were not reached for lack of time.\n"
        )
    reached = {step.name: step for step in report.steps}
    for name in SHARES:
        step = reached.get(name, Step(name))
        if step.status != "ok":
            first = f": {step.detail.splitlines()[0]}" if step.detail else ""
            yield f"- The step `{name}` {OUTCOMES[step.status].format(step.seconds)}{first}."
    yield from (f"- The test `{failure['test']}` failed." for failure in tests.get("failed", []))
    yield from skipped_tests(tests)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line to each shape and mode: ours in ms, everybody else beside it, and the machine's limits."""
    ratios, lines = in_ours(rows), dict[tuple[str, str, str], dict[str, Row]]()
    for row in rows:
        if row["status"] == "measured":
            key = (row["mode"], row["shape"], row["dtype"])
            lines.setdefault(key, {}).setdefault(row["provider"], row)  # ours again, beside another peer, is left out
    others = [name for name in dict.fromkeys(name for line in lines.values() for name in line) if name != "ours"]
    cells = []
    for key, line in lines.items():
        ours = line.get("ours", {})
        first = [*key, field(ours, "ms", ".3g")]
        first += [beside_ours(line.get(name), ratios) for name in others]
        first += [field(ours, name, form) for _, name, form in LIMITS]
        cells.append([*first, field(line.get("eager", {}), "peak_mb", ",.0f")])
    head = ["mode", "shape", "dtype", "ours, ms", *others, *(title for title, _, _ in LIMITS), "MB eager"]
    used = [k for k in range(len(head)) if any(line[k] for line in cells)]
    if used:
        yield f"| {' | '.join(head[k] for k in used)} |"
        yield "|---|---|---|" + "---:|" * (len(used) - 3)
        yield from (f"| {' | '.join(line[k] for k in used)} |" for line in cells)
    missing = unmeasured(rows)
    if used and missing:
        yield ""
    yield from missing


def beside_ours(row: Row | None, ratios: dict[int, float]) -> str:
    """In ms where ours was not measured."""
    return "" if row is None else f"{ratios[id(row)]:.2f}x" if id(row) in ratios else f"{row['ms']:.3g} ms"


def field(row: Row, name: str, form: str) -> str:
    return "" if row.get(name) is None else f"{row[name]:{form}}"


def main(arguments: Sequence[str]) -> None:
    for path in arguments:
        add(Path(path))
    text = page(reports())
    if not PAGE.exists() or PAGE.read_text() != text:
        PAGE.write_text(text)


if __name__ == "__main__":
    main(sys.argv[1:])
