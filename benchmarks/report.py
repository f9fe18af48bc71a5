"""Turns a pytest-benchmark JSON into a Markdown table and a picture, as ratios taken in that one run.

    python benchmarks/report.py benchmarks/results/sigmoid.json

writes sigmoid.md and sigmoid.png beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PEERS = ("open_clip", "eager", "compile")
Key = tuple[str, int, int, str]  # mode, batch, width, provider


def load(path: Path) -> tuple[dict[Key, dict[str, Any]], dict[str, Any]]:
    document = json.loads(path.read_text())
    runs: dict[Key, dict[str, Any]] = {}
    for entry in document["benchmarks"]:
        info = entry["extra_info"]
        key = (info["mode"], info["batch"], info["width"], info["provider"])
        runs[key] = info | {"seconds": entry["stats"]["min"]}
    return runs, document["machine_info"]


def rows(runs: dict[Key, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per mode and shape. The machine's rate is the best seen at that width: the strictest to be held to."""
    table = []
    for (mode, batch, width, provider), ours in sorted(runs.items()):
        if provider != "ours":
            continue
        same_width = [r for r in runs.values() if r["width"] == width]
        rate = ours["gflop"] / ours["seconds"]
        row: dict[str, Any] = {
            "mode": mode,
            "batch": batch,
            "width": width,
            "of_torch_mm": rate / max(r["torch_mm_gflops"] for r in same_width),
            "of_fastest_gemm": rate / max(r["fastest_gemm_gflops"] for r in same_width),
            "ours_mb": ours["peak_mb"],
        }
        for peer in PEERS:
            if (other := runs.get((mode, batch, width, peer))) is not None:
                row[peer] = other["seconds"] / ours["seconds"]
                row[f"{peer}_mb"] = other["peak_mb"]
        table.append(row)
    return table


def markdown(table: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    lines = [
        f"fp32, {machine['threads']} threads, {machine['cpu'].get('brand_raw', machine['machine'])}, "
        f"{machine['instruction_set']}, torch {machine['torch']}. Times as times longer than ours; rates as a fraction "
        "of the machine's own fp32 matrix product at that width; peak memory above the inputs.",
        "",
        "| mode | B | D | open_clip | eager | compile | of torch.mm | of fastest GEMM | ours MB | open_clip MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        peers = " | ".join(f"{row[p]:.2f}x" if p in row else "" for p in PEERS)
        other_mb = f"{row['open_clip_mb']:.0f}" if "open_clip_mb" in row else ""
        lines.append(
            f"| {row['mode']} | {row['batch']} | {row['width']} | {peers} | {row['of_torch_mm']:.2f} | "
            f"{row['of_fastest_gemm']:.2f} | {row['ours_mb']:.0f} | {other_mb} |"
        )
    return "\n".join(lines) + "\n"


def plot(table: list[dict[str, Any]], path: Path) -> None:
    table = [row for row in table if row["mode"] == "forward+backward" and "open_clip" in row]
    labels = [f"{row['batch']} x {row['width']}" for row in table]
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(12, 0.35 * len(table) + 1.8), sharey=True)
    height = 0.27
    for k, peer in enumerate(PEERS):
        at = [i + (k - 1) * height for i in range(len(table))]
        speed.barh(at, [row[peer] for row in table], height, label=peer)
        memory.barh(at, [row[f"{peer}_mb"] for row in table], height)
    speed.axvline(1, color="black", linewidth=0.8)
    speed.set_yticks(range(len(table)), labels)
    speed.invert_yaxis()
    speed.set_xlabel("time of forward + backward, in times ours")
    speed.set_ylabel("batch x features")
    speed.legend()
    memory.plot([row["ours_mb"] for row in table], range(len(table)), "k|", markersize=12, label="ours")
    memory.set_xlabel("peak MB above the inputs")
    memory.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argument: str) -> None:
    path = Path(argument)
    runs, machine = load(path)
    table = rows(runs)
    text = markdown(table, machine)
    path.with_suffix(".md").write_text(text)
    plot(table, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/report.py RESULTS.json")
    main(sys.argv[1])
