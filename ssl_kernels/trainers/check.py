"""`ssl-kernels check DATA`: read all of a table, a folder or shards once, before anything is trained on it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ssl_kernels.trainers.data import files, folders, shard_names, tars, trees
from ssl_kernels.trainers.data.faults import Fault, Faults, place
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.inspection import Inspection
from ssl_kernels.trainers.data.text_files import check_encoding
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.ranges import at_least, require

PROG = "ssl-kernels check"
_EXAMPLES = 5  # of each kind


@dataclass
class CheckConfig:
    """Read all images and captions once and report bad and odd ones. The exit status is 1 if any cannot be used."""

    data: tyro.conf.Positional[str]
    """A table of image paths and captions, a folder of images, or WebDataset shards, as the trainers take them."""
    image_column: str = ""
    """Column of a table that holds the image's path, relative to the table; by default found by its usual names."""
    caption_column: str = ""
    """Column of a table that holds the caption; by default found by its usual names."""
    encoding: str = "utf-8"
    """Encoding of a table that does not begin with a mark of its own, or of captions in shards, such as latin-1."""
    workers: int = os.cpu_count() or 1
    """Number of processes that read; the default is the number of processors."""
    out: Path | None = None
    """A file to write everything that was found into, a line of JSON to each."""


@dataclass
class Report:
    """What was found: `bad` cannot be used, `odd` is used all the same."""

    images: int
    bad: Faults
    odd: Faults
    found: Found = field(default_factory=lambda: Found(""))

    def lines(self) -> list[str]:
        """The same for people."""
        lines = [*self.found.lines(), f"{self.images:,} images can be read"]
        for title, faults in (("bad, left out of training", self.bad), ("odd, but used", self.odd)):
            lines += [f"{title}:", *(f"  {line}" for line in faults.lines(most=_EXAMPLES))] if len(faults) else []
        return lines if len(self.bad) or len(self.odd) else [*lines, "nothing is bad or odd"]


def check(config: CheckConfig, console: Console) -> Report:
    """Read everything once, in parallel."""
    require(config, at_least(0), "workers")
    check_encoding(config.encoding)
    report = Report(0, Faults(max_bad=1.0), Faults(), Found(place(config.data)))
    inspection = Inspection(_files(config, report), config.encoding)
    first: dict[bytes, str] = {}
    losses = tars.Losses()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    parts = inspection.parts(min(config.workers, len(inspection)))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for part in progress.track(parts, len(inspection), description="reading"):
            report.bad.update(losses.of(part.bad, len(part.contents)))
            for fault in part.odd:  # an image may be odd in several ways
                report.odd.found[f"{fault.where}: {fault.reason}"] = fault
            for digest, where in part.contents:
                report.images += 1
                if first.setdefault(digest, where) != where:
                    again = Fault(f"{where} = {first[digest]}", "copies of another image")
                    report.odd.found[again.where] = again
    report.bad.update(losses.of_parts())
    return report


def _files(config: CheckConfig, report: Report) -> Sequence[Path] | Sequence[str]:
    """The images or the shards; `report` is told of rows and links that lead to none."""
    path = Path(os.path.expanduser(config.data))
    if shard_names.is_shards(config.data):
        names = shard_names.expand(config.data, "DATA")
        report.found.holds["shards"] = len(names)
        return names
    if not path.exists():
        raise UserError(f"DATA: expected a table, a folder of images or shards, got {place(path)}")
    if path.is_dir() and not files.metadata(path):
        tree = trees.read(path, report.found, report.bad)
        folders.parts(tree, report.found)
        if not tree.files:
            raise UserError(f"DATA: no images in {place(path)}")
        return [file.path for file in tree.files]
    images = files.read_table(
        files.table_path(config.data, "DATA"), config.image_column, config.caption_column, "DATA",
        encoding=config.encoding, faults=report.bad, found=report.found,
    ).images  # fmt: skip
    assert isinstance(images, list)
    return list(dict.fromkeys(images))


def main(argv: Sequence[str] | None = None) -> int:
    """Check the data that the arguments name, print a report, and return 0 if all can be used, else 1."""
    try:
        config = tyro.cli(CheckConfig, args=argv, prog=PROG)
        console = Console(width=None if sys.stdout.isatty() else 150)
        report = check(config, console)
        if config.out is not None:
            _write(config.out, report)
    except UserError as error:
        print(f"{PROG}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return 130
    for line in report.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 1 if len(report.bad) else 0


def _write(path: Path, report: Report) -> None:
    records = [
        {"where": fault.where, kind: fault.reason}
        for kind, faults in (("bad", report.bad), ("odd", report.odd)) for fault in faults
    ]  # fmt: skip
    try:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror}") from None
