"""From a command line to a running trainer, and from what can go wrong to one clear line."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro
from rich.console import Console

from ssl_kernels import _interrupt
from ssl_kernels.trainers import checkpoints, config_files, run_folder, series
from ssl_kernels.trainers.errors import (
    InterruptedRunError,
    LostRankError,
    NonFiniteError,
    StoppedRunError,
    UserError,
    describe,
    one_line,
)
from ssl_kernels.trainers.loop_config import RESUMABLE, LoopConfig, plain
from ssl_kernels.trainers.processes import own_share

Config = TypeVar("Config", bound=LoopConfig)


def run(kind: type[Config], train: Callable[[Config, Console], None], argv: Sequence[str] | None, prog: str) -> int:
    """Parse the arguments into a `kind`, train in its folder, and return the exit code."""
    _interrupt.over()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names of files may be no text
            stream.reconfigure(errors="backslashreplace")
    config: Config | None = None
    try:
        argv = list(sys.argv[1:] if argv is None else argv)
        config = parse(kind, series.arguments(argv), prog)
        config.check()
        # A pipe or a log file has no width of its own, and 80 columns would wrap every line of the table.
        console = Console(width=None if sys.stdout.isatty() else 150)
        with run_folder.held(config.output_dir):
            if config.seeds:
                return series.run(config, argv, prog, console)
            train(config, console)
    except InterruptedRunError as stop:
        if own_share().rank == 0:
            _say(f"{stop.signal_name}: stopped after saving {stop.checkpoint}; continue with: {_resume(prog, stop)}")
        return stop.exit_code
    except KeyboardInterrupt:
        _say(f"{prog}: interrupted outside of training; a written checkpoint still resumes")
        return 130
    except Exception as error:
        return _fail(error, config, prog)
    return 0


def _fail(error: Exception, config: LoopConfig | None, prog: str) -> int:
    """Say in a line or two what went wrong, and return the exit code: 2 for what the user can mend, else 1."""
    rank = own_share().rank
    if rank and isinstance(error, NonFiniteError):  # which all processes meet together
        return 1
    place = f"{prog}: error: {f'rank {rank}: ' if rank else ''}"
    cause = error.cause if isinstance(error, StoppedRunError) else error
    is_bug = not isinstance(cause, UserError | OSError)
    where = _keep_traceback(error, config) if is_bug else ""
    _say(f"{place}{one_line(error) if isinstance(error, UserError) else describe(error)}{where}")
    if isinstance(error, StoppedRunError) and error.checkpoint is not None and rank == 0:
        _say(f"continue with: {_resume(prog, error)}")
    return 1 if is_bug or isinstance(error, NonFiniteError | LostRankError) else 2


def _keep_traceback(error: Exception, config: LoopConfig | None) -> str:
    """Where in the code an error was raised, for whoever mends it: in a file of the run, or without one on stderr."""
    text = "".join(traceback.format_exception(error))
    path = config.output_dir / run_folder.TRACEBACK if config is not None else None
    try:
        if path is not None and own_share().rank == 0:
            path.write_text(text, errors="backslashreplace")
            return f" (traceback in {path})"
    except OSError:
        pass
    _say(text)
    return ""


def _resume(prog: str, stop: InterruptedRunError | StoppedRunError) -> str:
    return f"{prog} --resume {shlex.quote(str(Path(str(stop.checkpoint)).parent))}"


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # a terminal may be gone
        print(line, file=sys.stderr)


def parse(kind: type[Config], argv: Sequence[str], prog: str) -> Config:
    """The configuration of the arguments, and below them of the file that --config names; with `--resume` that of the
    checkpoint, which they may not contradict."""
    file = _value_of("--config", argv)
    given = [*(config_files.arguments(kind, Path(file)) if file else []), *argv]
    resume = _value_of("--resume", given)
    if resume is None:
        return _parse(kind, given, argv, prog, None)
    path, state = checkpoints.newest(Path(resume), lambda line: _say(f"{prog}: note: {line}"))
    saved = _restore(kind, state["config"], path)
    config = _parse(kind, given, argv, prog, saved)
    config.resume = path
    before, now = plain(saved), plain(config)
    for name in sorted(before.keys() - RESUMABLE):
        if before[name] != now[name]:
            raise UserError(
                f"--{name.replace('_', '-')}: the run in {path.parent} has {before[name]!r}, not {now[name]!r};"
                " a resumed run keeps its settings"
            )
    return config


def _parse(kind: type[Config], given: list[str], argv: Sequence[str], prog: str, default: Config | None) -> Config:
    """The arguments of a file, which `given` begins with, then those of the command line."""
    of_file = given[: len(given) - len(argv)]
    for words in (of_file, argv) if of_file else (argv,):
        if default is None:
            default = tyro.cli(kind, args=words, prog=prog)
        else:
            default = tyro.cli(kind, args=words, prog=prog, default=default)
    assert default is not None
    return default


def _value_of(flag: str, argv: Sequence[str]) -> str | None:
    for word, value in zip(argv, [*argv, ""][1:], strict=True):
        if word == flag and value not in ("", "None"):
            return value
        if word.startswith(f"{flag}="):
            return word.removeprefix(f"{flag}=")
    return None


def _restore(kind: type[Config], saved: dict[str, Any], path: Path) -> Config:
    names = {f.name for f in dataclasses.fields(kind)}
    if saved.keys() != names:
        odd = ", ".join(sorted(saved.keys() ^ names))
        raise UserError(f"--resume: {path} is of another trainer or version (it differs in: {odd})")
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return kind(**{**values, "output_dir": path.parent, "resume": path, "overwrite": False})
