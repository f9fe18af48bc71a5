"""From a command line to a running trainer, and from what can go wrong to one clear line."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console

from ssl_kernels.trainers import checkpoints, series
from ssl_kernels.trainers.errors import InterruptedRunError, LostRankError, NonFiniteError, UserError, one_line
from ssl_kernels.trainers.loop_config import RESUMABLE, LoopConfig, plain
from ssl_kernels.trainers.processes import own_share

Config = TypeVar("Config", bound=LoopConfig)


def run(kind: type[Config], train: Callable[[Config, Console], None], argv: Sequence[str] | None, prog: str) -> int:
    """Parse the arguments into a `kind`, train, and return the exit code."""
    try:
        argv = list(sys.argv[1:] if argv is None else argv)
        config = parse(kind, series.arguments(argv), prog)
        config.check()
        # A pipe or a log file has no width of its own, and 80 columns would wrap every line of the table.
        console = Console(width=None if sys.stdout.isatty() else 150)
        if config.seeds:
            return series.run(config, argv, prog, console)
        train(config, console)
    except UserError as error:
        rank = own_share().rank
        if not (rank and isinstance(error, NonFiniteError)):  # which all processes meet together
            print(f"{prog}: error: {f'rank {rank}: ' if rank else ''}{one_line(error)}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteError | LostRankError) else 2
    except InterruptedRunError as stop:
        if own_share().rank == 0:
            resume = f"{prog} --resume {shlex.quote(str(Path(stop.checkpoint).parent))}"
            print(
                f"{stop.signal_name}: stopped after saving {stop.checkpoint}; continue with: {resume}", file=sys.stderr
            )
        return stop.exit_code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted outside of training; a written checkpoint still resumes", file=sys.stderr)
        return 130
    return 0


def parse(kind: type[Config], argv: Sequence[str], prog: str) -> Config:
    """The configuration of the arguments; with `--resume` that of the checkpoint, which they may not contradict."""
    resume = _resume_of(argv)
    if resume is None:
        return tyro.cli(kind, args=argv, prog=prog)
    path = checkpoints.checkpoint_path(resume)
    saved = _restore(kind, checkpoints.load_checkpoint(path)["config"], path)
    config = tyro.cli(kind, args=argv, prog=prog, default=saved)
    before, now = plain(saved), plain(config)
    for name in sorted(before.keys() - RESUMABLE):
        if before[name] != now[name]:
            raise UserError(
                f"--{name.replace('_', '-')}: the run in {path.parent} has {before[name]!r}, not {now[name]!r};"
                " a resumed run keeps its settings"
            )
    return config


def _resume_of(argv: Sequence[str]) -> Path | None:
    for flag, value in zip(argv, [*argv, ""][1:], strict=True):
        if flag == "--resume" and value not in ("", "None"):
            return Path(value)
        if flag.startswith("--resume="):
            return Path(flag.removeprefix("--resume="))
    return None


def _restore(kind: type[Config], saved: dict[str, Any], path: Path) -> Config:
    names = {f.name for f in dataclasses.fields(kind)}
    if saved.keys() != names:
        odd = ", ".join(sorted(saved.keys() ^ names))
        raise UserError(f"--resume: {path} is of another trainer or version (it differs in: {odd})")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return kind(**{**values, "output_dir": path.parent, "resume": path, "overwrite": False})
