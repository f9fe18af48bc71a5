"""Turns a pytest-benchmark JSON into Markdown tables and pictures, one per op, as ratios taken in that one run.

    python benchmarks/report.py benchmarks/results/benchmarks.json

writes benchmarks.md and one <op>.png each beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Run = dict[str, Any]  # the extra_info of a benchmark, and its seconds


def load(path: Path) -> tuple[list[Run], dict[str, Any]]:
    document = json.loads(path.read_text())
    runs = [entry["extra_info"] | {"seconds": entry["stats"]["min"]} for entry in document["benchmarks"]]
    return runs, document["machine_info"]


def is_ours(provider: str) -> bool:
    return provider.startswith("ours")


def table(runs: list[Run]) -> list[dict[str, Any]]:
    """One row per mode, shape and variant of ours. The machine's limit is the best seen in the run: the strictest."""
    rows = []
    for ours in (run for run in runs if is_ours(run["provider"])):
        row: dict[str, Any] = {"mode": ours["mode"], "shape": ours["shape"], "ours": ours["provider"]}
        if "gflop" in ours:
            rate = ours["gflop"] / ours["seconds"]
            same_width = [run for run in runs if run.get("width") == ours["width"]]
            row["of torch.mm"] = rate / max(run["torch_mm_gflops"] for run in same_width)
            row["of fastest GEMM"] = rate / max(run["fastest_gemm_gflops"] for run in same_width)
        if "gbytes" in ours:
            limit = max(run["copy_gbytes_per_s"] for run in runs)
            row["of bandwidth"] = ours["gbytes"] / ours["seconds"] / limit
        if "gexp" in ours:
            limit = max(run["exp_gexp_per_s"] for run in runs)
            row["of exp rate"] = ours["gexp"] / ours["seconds"] / limit
        row["memory"] = {"ours": ours.get("peak_mb")}
        row["times"] = {}
        for other in runs:
            same = (other["mode"], other["shape"]) == (ours["mode"], ours["shape"])
            if same and not is_ours(other["provider"]):
                row["times"][other["provider"]] = other["seconds"] / ours["seconds"]
                row["memory"][other["provider"]] = other.get("peak_mb")
        rows.append(row)
    return rows


def markdown(op: str, rows: list[dict[str, Any]]) -> str:
    peers = list(dict.fromkeys(peer for row in rows for peer in row["times"]))
    known = ("of torch.mm", "of fastest GEMM", "of bandwidth", "of exp rate")
    limits = [name for name in known if any(name in row for row in rows)]
    has_memory = any(row["memory"]["ours"] is not None for row in rows)
    memories = [f"MB {name}" for name in ("ours", *peers)] if has_memory else []
    head = ["mode", "shape", "", *peers, *limits, *memories]
    lines = [f"## {op}", "", "| " + " | ".join(head) + " |", "|---|---|---|" + "---:|" * (len(head) - 3)]
    for row in rows:
        cells = [row["mode"], row["shape"], row["ours"]]
        cells += [f"{row['times'][p]:.2f}x" if p in row["times"] else "" for p in peers]
        cells += [f"{row[name]:.2f}" if name in row else "" for name in limits]
        if has_memory:
            found = (row["memory"].get(name) for name in ("ours", *peers))
            cells += ["" if mb is None else f"{mb:.0f}" for mb in found]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(op: str, rows: list[dict[str, Any]], path: Path) -> None:
    """How much longer the others take, per shape, in the mode that does most."""
    rows = [row for row in rows if row["times"] and row["ours"] == "ours" and row["mode"] == rows[-1]["mode"]]
    peers = list(dict.fromkeys(peer for row in rows for peer in row["times"]))
    figure, axes = plt.subplots(figsize=(8, 0.22 * len(rows) * len(peers) + 1.4))
    height = 0.8 / max(1, len(peers))
    for k, peer in enumerate(peers):
        at = [i + (k - (len(peers) - 1) / 2) * height for i in range(len(rows))]
        axes.barh(at, [row["times"].get(peer, 0) for row in rows], height, label=peer)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [row["shape"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"{op}: time relative to ours")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argument: str) -> None:
    path = Path(argument)
    runs, machine = load(path)
    parts = [
        f"fp32 unless a shape says otherwise, {machine['threads']} threads, "
        f"{machine['cpu'].get('brand_raw', machine['machine'])}, {machine['instruction_set']}, "
        f"torch {machine['torch']}. Times are relative to ours: 2.0x is twice as slow; "
        "rates as a fraction of what the machine itself "
        "reaches in the same run; peak memory above the inputs.\n"
    ]
    for op in dict.fromkeys(run["op"] for run in runs):
        rows = table([run for run in runs if run["op"] == op])
        parts.append(markdown(op, rows))
        plot(op, rows, path.with_name(f"{op}.png"))
    path.with_suffix(".md").write_text("\n".join(parts))
    print("\n".join(parts))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/report.py RESULTS.json")
    main(sys.argv[1])
