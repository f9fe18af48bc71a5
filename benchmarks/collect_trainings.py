"""Gathers what finished runs reached into the file from which docs print the figures of trainings.

    python benchmarks/collect_trainings.py benchmarks/results/MACHINE/trainings.json "train siglip" RUN [RUN ...]

replaces the entries of that command by those of the folders RUN, a seed each.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NOT_FIGURES = ("name", "note")


def entry(command: str, folder: Path) -> dict[str, Any]:
    summary, config = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "config"))
    figures = {
        figure["name"]: {k: v for k, v in figure.items() if k not in NOT_FIGURES and v is not None}
        for figure in summary["figures"]
    }
    return {"command": command, "seed": config["seed"], "steps": summary["steps"], "figures": figures}


def collect(path: Path, command: str, folders: Sequence[Path]) -> None:
    others = json.loads(path.read_text()) if path.exists() else []
    runs = [run for run in others if run["command"] != command] + [entry(command, folder) for folder in folders]
    runs.sort(key=lambda run: (run["command"], run["seed"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n " + ",\n ".join(json.dumps(run) for run in runs) + "\n]\n")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    collect(Path(sys.argv[1]), sys.argv[2], [Path(folder) for folder in sys.argv[3:]])
