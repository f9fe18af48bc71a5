"""The folder of a run: held by one run at a time, and free of what an earlier one has left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ssl_kernels.trainers.checkpoints import BEST, CHECKPOINT, clean, earlier, write_atomically
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.loggers import METRICS, TENSORBOARD, WANDB_ID, json_line
from ssl_kernels.trainers.processes import is_first

LOCK = ".lock"
TRACEBACK = "traceback.txt"
_OF_A_RUN = (
    CHECKPOINT, BEST, METRICS, WANDB_ID, TRACEBACK, "summary.json", "curves.png", "retrieval.png", "features.png",
)  # fmt: skip


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it is not there, and free it of half-written files.

    The first of a run's processes holds it. What it holds is a lock of the kernel's, which ends with the process and
    which no child has. Raises `UserError` that names the run which has the folder, or why there is none.
    """
    if not is_first():
        yield
        return
    made = not folder.exists()
    _make(folder)
    lock = _lock(folder)
    try:
        clean(folder)
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # before it is given up: who has opened it meanwhile looks for it again
        os.close(lock)
        if made:
            with contextlib.suppress(OSError):  # of a run that wrote nothing, nothing is left
                folder.rmdir()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir: cannot create {folder}: {error.strerror}") from None


def _lock(folder: Path) -> int:
    """The descriptor of the folder's lock, which this process has from now on."""
    path = folder / LOCK
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"--output-dir: cannot write into {folder}: {error.strerror}") from None
        if not _take(descriptor):
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise UserError(
                f"--output-dir: {folder} is in use by a run, {holder}; name another folder, or stop that run first"
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        os.close(descriptor)  # of a run that ended meanwhile
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return descriptor


def _take(descriptor: int) -> bool:
    """Lock a file for this process; False where another has it. Without locks, as on Windows, nobody is kept out."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        print(f"note: no lock for --output-dir ({error.strerror}): start no second run in it", file=sys.stderr)
    return True


def erase(folder: Path) -> None:
    """Remove what a run has left in a folder."""
    _make(folder)
    for name in _OF_A_RUN:
        (folder / name).unlink(missing_ok=True)
    for path in earlier(folder / CHECKPOINT):
        if not path.exists():
            break
        path.unlink()
    shutil.rmtree(folder / TENSORBOARD, ignore_errors=True)


def start(folder: Path, config: dict[str, Any], records: Iterable[dict[str, Any]]) -> None:
    """Write what is known of a run before its first step."""
    _make(folder)
    (folder / TRACEBACK).unlink(missing_ok=True)
    lines = "".join(map(json_line, records))
    write_atomically(folder / METRICS, lambda path: path.write_text(lines))
    write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(config, indent=2) + "\n"))
