"""A run for each of several seeds, one after the other, each in a process and a folder of its own; then their table."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ssl_kernels.trainers import run_folder
from ssl_kernels.trainers.checkpoints import CHECKPOINT, write_atomically
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation import compare
from ssl_kernels.trainers.loop_config import LoopConfig

SERIES, SUMMARY = "series.json", "summary.json"


def arguments(argv: Sequence[str]) -> list[str]:
    """The arguments of a command; where --resume names a series, those that it was started with come first."""
    folder = _series_of(argv)
    if folder is None:
        return list(argv)
    rest = [*_without(argv, "--resume"), "--output-dir", str(folder)]
    return [*_without(_read(folder)["arguments"], "--overwrite"), *rest]


def run(config: LoopConfig, argv: Sequence[str], prog: str, console: Console) -> int:
    """Train with every seed of the configuration that `argv` stands for, and return the exit code.

    Seeds that have finished are not trained again, and one that was stopped goes on.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1" or "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("--seeds: each run starts its own processes; expected --devices instead of torchrun")
    folder = config.output_dir.absolute()
    resumed = _series_of(argv)
    about: dict[str, Any] = {"arguments": list(argv), "folder": os.getcwd()}
    if resumed is None:
        _begin(folder, config)
    else:
        about = {"arguments": _without(arguments(argv), "--overwrite"), "folder": _read(resumed)["folder"]}
    write_atomically(folder / SERIES, lambda path: path.write_text(json.dumps(about, indent=2) + "\n"))
    runs = [config.output_dir / f"seed-{seed}" for seed in config.seeds]
    for seed, place in zip(config.seeds, runs, strict=True):
        if (place / SUMMARY).exists():
            console.print(f"seed {seed}: has finished before, in {place}", highlight=False, soft_wrap=True)
            continue
        console.print(f"seed {seed}: in {place}", highlight=False, soft_wrap=True)
        console.file.flush()
        code = start([*_command(prog), *_run_arguments(about, argv, seed, place.absolute())], about["folder"])
        if code:
            print(f"the series continues with: {prog} --resume {shlex.quote(str(config.output_dir))}", file=sys.stderr)
            return code
    console.print(compare.make_table(runs))
    return 0


def _series_of(argv: Sequence[str]) -> Path | None:
    """The folder of the series that --resume names, if it names one."""
    for word, value in zip(argv, [*argv, ""][1:], strict=True):
        folder = Path(word.removeprefix("--resume=") if word.startswith("--resume=") else value)
        if word.partition("=")[0] == "--resume" and (folder / SERIES).is_file():
            return folder
    return None


def _read(folder: Path) -> dict[str, Any]:
    try:
        about = json.loads((folder / SERIES).read_text())
        return {"arguments": [str(word) for word in about["arguments"]], "folder": str(about["folder"])}
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"--resume: {folder / SERIES} tells of no series ({type(error).__name__})") from None


def _begin(folder: Path, config: LoopConfig) -> None:
    """See that a folder is free, or free it of an earlier series' results."""
    if (folder / CHECKPOINT).exists():
        raise UserError(f"--output-dir: {folder} already holds a run; expected another folder for a series")
    if (folder / SERIES).exists() and not config.overwrite:
        raise UserError(
            f"--output-dir: {folder} already holds a series; --resume {folder} continues it, --overwrite starts over"
        )
    for place in folder.glob("seed-*"):
        if config.overwrite:
            run_folder.erase(place)
        elif (place / CHECKPOINT).exists():
            raise UserError(f"--output-dir: {place} already holds a run of no series; --overwrite starts over")


def _run_arguments(about: dict[str, Any], argv: Sequence[str], seed: int, place: Path) -> list[str]:
    """The arguments of the run of a seed. Where an option is given twice, the last one counts."""
    if (place / CHECKPOINT).exists():
        return [*(_without(argv, "--resume") if _series_of(argv) else []), "--seeds", "--resume", str(place)]
    return [*about["arguments"], "--seeds", "--seed", str(seed), "--output-dir", str(place)]


def _without(argv: Sequence[str], flag: str) -> list[str]:
    """Arguments less an option and its value, of which --overwrite has none."""
    kept: list[str] = []
    skip = False
    for word in argv:
        if not skip and word.partition("=")[0] != flag:
            kept.append(word)
        skip = word == flag and flag != "--overwrite"
    return kept


def _command(prog: str) -> list[str]:
    """The command that users know as `prog`, in this Python."""
    name, *rest = prog.split()
    return [sys.executable, *(rest if name == "python" else ["-m", "ssl_kernels.cli", *rest])]


def start(command: Sequence[str], folder: str) -> int:
    """Run a command in a working directory; its exit code. Signals are passed on to it, each once."""
    with subprocess.Popen(command, cwd=folder, start_new_session=True) as process, _passed_on(process):
        code = process.wait()
    return 128 - code if code < 0 else code


@contextlib.contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """A terminal's Ctrl-C comes here alone, for the process has a session of its own."""
    names = ("SIGINT", "SIGTERM", "SIGHUP")
    before = {}
    try:
        for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
            with contextlib.suppress(ValueError):  # not the main thread: the embedding program handles signals
                before[number] = signal.signal(number, lambda number, _: process.send_signal(number))
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
