"""Turns what gpu_check.py found into Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu_check import Report

Row = dict[str, Any]


def markdown(report: Report) -> str:
    head = ", ".join(f"{name} {value}" for name, value in report.machine.items() if value is not None)
    lines = ["# gpu-check", "", head or "The benchmarks did not start, and said nothing of the machine.", ""]
    if report.tiny:
        lines += ["Tiny sizes: this shows that the check runs, not how fast anything is.", ""]
    lines += [
        f"{report.elapsed_s:.0f} s of {report.budget_s:.0f} s.",
        "",
        "| step | outcome | s | at most | |",
        "|---|---|---:|---:|---|",
    ]
    for step in report.steps:
        first = step.detail.splitlines()[0] if step.detail else ""
        lines.append(f"| {step.name} | {step.status} | {step.seconds:.0f} | {step.limit_s:.0f} | {first} |")
    for step in report.steps:
        if step.status == "failed" and "\n" in step.detail:
            lines += ["", f"{step.name}:", "", "```", step.detail[-3000:], "```"]
    lines += ["", "## Tests", ""]
    tests = report.tests
    if not tests:
        lines.append("They did not run.")
    for failure in tests.get("failed", []):
        lines += [f"- failed: `{failure['test']}`", "", "```", failure["detail"][-1000:], "```", ""]
    lines += skipped_tests(tests)
    if tests.get("not_reached"):
        lines.append("- A second run gets further: kernels that were compiled are kept in Triton's cache.")
        lines.append(f"- not reached, for time: {', '.join(f'`{t}`' for t in tests['not_reached'])}")
    lines += ["", "## CUDA graphs", ""]
    failed = [g["op"] for g in report.graphs if g["outcome"] == "failed"]
    counts = {o: sum(g["outcome"] == o for g in report.graphs) for o in ("passed", "failed", "skipped")}
    lines.append(
        ", ".join(f"{n} {o}" for o, n in counts.items()) + (f"; failed: {', '.join(failed)}" if failed else "")
    )
    for op in dict.fromkeys(row["op"] for row in report.benchmarks):
        lines += ["", f"## {op}", "", *table([row for row in report.benchmarks if row["op"] == op])]
    lines += ["", "## Peers", ""]
    lines += [f"- {name}: {found}" for name, found in report.providers.items()]
    return "\n".join(lines) + "\n"


def skipped_tests(tests: Row) -> list[str]:
    """How many for each reason."""
    reasons = [skipped["detail"] for skipped in tests.get("skipped", [])]
    return [f"- skipped {reasons.count(reason)}: {reason}" for reason in dict.fromkeys(reasons)]


def table(rows: Sequence[Row]) -> list[str]:
    """A line to each provider, shape and mode: times as times longer than ours in the same process."""
    ratios = in_ours(rows)
    titles = ("ms", "time in ours", "of matrix rate", "of bandwidth", "launch, ms", "peak MB", "relative error")
    lines = [f"| mode | shape | | {' | '.join(titles)} |", "|---|---|---|" + "---:|" * len(titles)]
    seen: set[tuple[Any, ...]] = set()
    for row in (r for r in rows if r["status"] == "measured"):
        key = (row["provider"], row["shape"], row["mode"])
        if key in seen:  # ours again, beside another peer
            continue
        seen.add(key)
        cells = [row["mode"], row["shape"], row["provider"], f"{row['ms']:.3g}"]
        cells.append(f"{ratios[id(row)]:.2f}x" if id(row) in ratios else "")
        cells += [f"{row[name]:.2f}" if name in row else "" for name in ("of_matrix_rate", "of_bandwidth")]
        cells.append(f"{row['launch_ms']:.3g}" if row["launch_ms"] else "")
        cells.append("" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}")
        lines.append("| " + " | ".join([*cells, f"{row['error']:.1g}"]) + " |")
    others = unmeasured(rows)
    return [*lines, "", *others] if others else lines


def in_ours(rows: Sequence[Row]) -> dict[int, float]:
    """By the id of a row: its time as times longer than ours in the same process, where ours was measured there."""
    measured = [row for row in rows if row["status"] == "measured"]
    ours = {(r["group"], r["shape"], r["mode"]): r["ms"] for r in measured if r["provider"] == "ours"}
    beside = ((row, ours.get((row["group"], row["shape"], row["mode"]))) for row in measured)
    return {id(row): row["ms"] / ms for row, ms in beside if ms is not None}


def unmeasured(rows: Sequence[Row]) -> list[str]:
    """Each provider and shape with the reason."""
    found = (f"- {r['provider']} {r.get('shape', '')}: {explained(r)}" for r in rows if r["status"] != "measured")
    return list(dict.fromkeys(found))


def explained(row: Row) -> str:
    return row["status"] + (f": {row['detail']}" if row["detail"] else "")
