"""What a run of the benchmarks leaves behind: a small JSON to each op, in a folder named after the machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ssl_kernels
from ssl_kernels.bench.problem import is_peer

Run = dict[str, Any]  # a provider at a shape and in a mode
Result = dict[str, Any]  # of an op: the machine, the versions, the runs, and what could not be run and why
PACKAGES = (
    *("torch", "triton", "ssl_kernels", "open_clip_torch", "lightly", "transformers"),
    *("pytorch-metric-learning", "timm", "pytest-benchmark"),
)
LABELS = {  # of providers, for readers
    "ours, recomputing": "ours, no tile kept",
    "ours, written": "ours, written out",
    "compile": "torch.compile",
    "dino": "DINO's loop",
    "foreach_lerp": "_foreach_lerp_",
    "loop": "mul_ and add_",
    "moco": "MoCo's code",
    "pair loop": "DINO's loop",
}
RATES = {  # of a floor's part: the rate that the machine reaches, and what a reader calls it
    ("gflop", "torch_mm_gflops"): "of torch.mm",
    ("gflop", "fastest_gemm_gflops"): "of the fastest GEMM",
    ("gbytes", "copy_gbytes_per_s"): "of the bandwidth",
    ("gexp", "exp_gexp_per_s"): "of the exp rate",
}


def from_document(document: dict[str, Any], absent: Sequence[Run], size: str) -> dict[str, Result]:
    """By op, of pytest-benchmark's JSON of a run of that size, what a reader needs of it."""
    info = document["machine_info"]
    stamp = {
        "machine": machine(info),
        "versions": versions(info["python_version"]),
        "measured": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit(),
        "size": size,
    }
    found: dict[str, Result] = {}
    for kind, runs in (("runs", map(_run, document["benchmarks"])), ("absent", absent)):
        for run in runs:
            of_op = found.setdefault(run["op"], {**stamp, "runs": [], "absent": []})
            of_op[kind].append({key: value for key, value in run.items() if key != "op"})
    return found


def _run(entry: dict[str, Any]) -> Run:
    stats = {"seconds": entry["stats"]["min"], "median_s": entry["stats"]["median"], "rounds": entry["stats"]["rounds"]}
    return {key: _short(value) for key, value in (entry["extra_info"] | stats).items()}


def _short(value: Any) -> Any:
    """Five digits are more than a measurement has."""
    return float(f"{value:.5g}") if isinstance(value, float) and math.isfinite(value) else value


def machine(info: dict[str, Any]) -> dict[str, Any]:
    """What of a machine counts for its speed. Its name makes the folder."""
    cpu = info["cpu"]
    brand = re.sub(r"\(R\)|\(TM\)|CPU|Processor|@.*", "", cpu.get("brand_raw", info["machine"]))
    processor = " ".join(brand.split())
    if not re.search(r"\d", processor) and "family" in cpu:  # a virtual machine's may hide which one it is
        processor += f" family {cpu['family']} model {cpu['model']}"
    count = os.cpu_count()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "name": re.sub(r"[^a-z0-9]+", "-", f"{processor} {count} cpus".lower()).strip("-"),
        "processor": processor,
        "cpus": count,
        "threads": info["threads"],
        "ram_gb": round(ram),
        "instruction_set": info["instruction_set"],
        "system": f"{info['system']} {info['machine']}",
        "load_before": _short(info["load_before"]),
    }


def versions(python: str) -> dict[str, str]:
    """Of Python, torch, and those peers that are installed."""
    found = {"python": python}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the checkout that the package is run from, if it is one."""
    checkout = Path(ssl_kernels.__file__).parents[1]
    if not (checkout / "csrc").is_dir():
        return None
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def write(folder: Path, results: dict[str, Result]) -> list[Path]:
    """<machine>/<op>.json each, with one line to a run."""
    paths = []
    for op, result in results.items():
        path = folder / result["machine"]["name"] / f"{op}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = [f"{json.dumps(key)}: {_listed(value)}" for key, value in result.items()]
        path.write_text("{\n " + ",\n ".join(parts) + "\n}\n")
        paths.append(path)
    return paths


def _listed(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    return "[\n  " + ",\n  ".join(json.dumps(run) for run in value) + "\n ]"


def read(folder: Path, names: Sequence[str]) -> dict[str, Result]:
    """What is there of these ops, in their order."""
    paths = {op: folder / f"{op}.json" for op in names}
    return {op: json.loads(path.read_text()) for op, path in paths.items() if path.exists()}


@dataclass(frozen=True)
class Row:
    """An op at one shape and in one mode: ours, and by provider the others' runs or why there is none."""

    shape: str
    mode: str
    ours: Run
    others: dict[str, Run | str]
    limits: dict[str, float]  # what ours reaches of the machine's rates

    @property
    def peer(self) -> str:
        """The first of the peers that were measured, or else the formula in plain PyTorch."""
        measured = (name for name, other in self.others.items() if is_peer(name) and not isinstance(other, str))
        return next(measured, "eager")

    @property
    def limit(self) -> float | None:
        """The share of the fastest product, or where none is needed, of the bandwidth."""
        return self.limits.get("of the fastest GEMM", self.limits.get("of the bandwidth"))

    def time(self, provider: str) -> str:
        """Relative to ours: "2.00x" is twice as slow."""
        other = self.others.get(provider, "")
        return other if isinstance(other, str) else f"{relative(other['seconds'] / other['ours_seconds'])}x"

    def memory(self, provider: str) -> str:
        """Megabytes above the inputs."""
        run = self.ours if provider == "ours" else self.others.get(provider, "")
        return "" if isinstance(run, str) or run.get("peak_mb") is None else f"{max(0.0, run['peak_mb']):,.0f}"


def relative(times: float) -> str:
    """With as many digits as a measurement bears."""
    return f"{times:.0f}" if times >= 99.5 else f"{times:.2g}" if times >= 10 else f"{times:.1f}"


def milliseconds(run: Run) -> str:
    """Of a step, with the digits that a measurement bears."""
    ms = 1e3 * run["seconds"]
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.2g}" if ms < 10 else f"{ms:.0f}"


def rows(result: Result) -> Iterator[Row]:
    """In the order of the run."""
    runs, absent = result["runs"], result["absent"]
    for ours in runs:
        at = (ours["shape"], ours["mode"])
        if ours["provider"] != "ours":
            continue
        same = [run for run in runs if (run["shape"], run["mode"]) == at and run is not ours]
        others: dict[str, Run | str] = {run["provider"]: run for run in same}
        others |= {run["provider"]: run["reason"] for run in absent if (run["shape"], run["mode"]) == at}
        yield Row(ours["shape"], ours["mode"], ours, others, _limits(runs, ours))


def _limits(runs: Sequence[Run], ours: Run) -> dict[str, float]:
    """The machine's rates are the best seen in the run, which makes ours the smallest share."""
    found = {}
    for (work, rate), name in RATES.items():
        if work in ours:
            best = max(run[rate] for run in runs if rate in run and run.get("width") == ours.get("width"))
            found[name] = ours[work] / ours["seconds"] / best
    return found
