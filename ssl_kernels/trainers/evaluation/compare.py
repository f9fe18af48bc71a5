"""Finished runs beside each other, such as those of several seeds: `ssl-kernels compare runs/dino runs/dino-1 ...`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ssl_kernels.trainers.errors import UserError

Figures = dict[str, dict[str, Any]]  # by name


def load(folder: Path) -> Figures:
    """What a run reported at its end."""
    path = folder / "summary.json"
    try:
        return {figure["name"]: figure for figure in json.loads(path.read_text())["figures"]}
    except FileNotFoundError:
        raise UserError(f"no {path}: expected the folders of runs that were evaluated") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is not the summary of a run ({type(error).__name__})") from None


def make_table(folders: Sequence[Path]) -> Table:
    """A line to each figure: of every run, from the lowest to the highest, and what it is to be judged by."""
    runs = [load(folder) for folder in folders]
    for folder, run in zip(folders, runs, strict=True):
        if run.keys() != runs[0].keys():
            other = sorted(run.keys() ^ runs[0].keys())[0]
            raise UserError(f"{folder}: expected the figures of {folders[0]}, but {other!r} is in one of them only")
    first = next(iter(runs[0].values()), {})
    baselines = [key for key, value in first.items() if key not in ("name", "model", "note") and value != ""]
    table = Table(title=f"{len(runs)} runs", title_justify="left", title_style="bold")
    table.add_column("", no_wrap=True)
    for column in (*map(str, folders), "lowest to highest", *(key.replace("_", " ") for key in baselines)):
        table.add_column(column, justify="right")
    for name in runs[0]:
        scores = [run[name]["model"] for run in runs]
        others = (spread(run[name].get(key) for run in runs) for key in baselines)
        table.add_row(name, *(f"{score:.3f}" for score in scores), spread(scores), *others)
    return table


def spread(values: Iterable[float | None]) -> str:
    """From the lowest to the highest of those that are known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, high = f"{min(known):.3f}", f"{max(known):.3f}"
    return low if low == high else f"{low} to {high}"


def main(folders: Sequence[str]) -> None:
    """Print the table. Raises `UserError` for folders that cannot be compared."""
    Console().print(make_table([Path(folder) for folder in folders]))
