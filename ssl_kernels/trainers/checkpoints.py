"""Checkpoints from which a run continues bit-exactly, and files that are written whole or not at all.

A checkpoint is a zip archive, as all that `torch.save` writes, with a CRC-32 of each of its parts. They are compared
whenever one is read: weights that a disk has changed are never trained on.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from ssl_kernels.trainers.errors import UserError

CHECKPOINT, BEST = "last.pt", "best.pt"
_PARTS = {"model", "optimizer", "step", "total", "data", "rng", "config", "elapsed_s"}


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An error of the system names this file, and not the temporary one that was written in its place, or none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = os.fspath(path)
        raise


def write_atomically(path: Path, write: Callable[[Path], object], keep: int = 1) -> None:
    """Write a file under another name beside it, flush it to the disk, then rename: a reader sees the old file or the
    new one. Of the old ones, the last `keep - 1` stay: see `earlier`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            _keep(path, keep)
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def earlier(path: Path) -> Iterator[Path]:
    """Where the versions of a file before this one are, if they were kept, the last one first: `last-1.pt`, ..."""
    return (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))


def _keep(path: Path, keep: int) -> None:
    """Give each version the name of the one before it, and drop those that are too old."""
    versions = [path, *itertools.islice(earlier(path), keep - 1)]
    for old in itertools.islice(earlier(path), keep - 1, None):
        if not old.exists():
            break
        old.unlink()
    for newer, older in reversed(list(itertools.pairwise(versions))):
        if newer.exists():
            older.unlink(missing_ok=True)
            if newer == path:
                link(path, older)
            else:
                newer.rename(older)


def link(path: Path, other: Path) -> None:
    """Let a file have another name too, in the place of what had that name."""
    temporary = other.with_name(f".{other.name}.{os.getpid()}.tmp")
    with naming(other):
        try:
            os.link(path, temporary)
        except OSError:  # of a file system without links
            temporary.write_bytes(path.read_bytes())
        os.replace(temporary, other)


def clean(folder: Path) -> None:
    """Remove what writes that were killed have left in a folder that nobody writes into now."""
    for path in folder.glob(".*.[0-9]*.tmp"):
        path.unlink(missing_ok=True)


class _Stream:
    """A file for `torch.save`, whose writer in C++ must not meet an exception: it is kept, and the rest is dropped."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        """The file is flushed when it is closed."""


def save_checkpoint(path: Path, state: dict[str, Any], keep: int = 1) -> None:
    """Write a checkpoint whole or not at all; of those before it, the last `keep - 1` stay."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            stream = _Stream(file)
            torch.save(state, stream)  # type: ignore[arg-type]
            if stream.error is not None:
                raise stream.error

    write_atomically(path, write, keep)


def checkpoint_path(resume: Path, flag: str = "--resume") -> Path:
    """The checkpoint that `--resume` or another flag means: the file itself, or the newest in the folder."""
    path = resume / CHECKPOINT if resume.is_dir() else resume
    if not path.is_file():
        before = next(earlier(path))
        if resume.is_dir() and before.is_file():  # a kill between two names
            return before
        raise UserError(f"{flag}: no checkpoint at {path}; expected a run's folder or its {CHECKPOINT}")
    return path


def newest(resume: Path, say: Callable[[str], object]) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint of a folder that is whole, and what it holds; or that of the file that `resume` is.

    A damaged one that an older one stands in for is told to `say`.
    """
    path = checkpoint_path(resume)
    try:
        return path, load_checkpoint(path)
    except UserError as error:
        if not resume.is_dir() or path.name != CHECKPOINT:
            raise
        for older in itertools.takewhile(Path.is_file, earlier(path)):
            with contextlib.suppress(UserError):
                state = load_checkpoint(older)
                say(f"{error}; the run goes on from step {state['step']} of {older}")
                return older, state
        raise


def load_checkpoint(path: Path, flag: str = "--resume") -> dict[str, Any]:
    """What a checkpoint holds. Raises `UserError` if it is damaged, with the name of the one before it, if that is
    there."""
    try:
        damaged = _damaged_part(path)
        state = {} if damaged else torch.load(path, map_location="cpu", weights_only=True)
        missing = _PARTS - state.keys()
    except Exception as error:  # torch, zipfile and pickle each have their own
        damaged = (str(error) or type(error).__name__).splitlines()[0][:120]
    if damaged:
        before = next(earlier(path))
        advice = f"; {flag} {before} is the one before it" if before.is_file() else ""
        raise UserError(f"{flag}: {path} is not a readable checkpoint ({damaged}){advice}")
    if missing:
        raise UserError(f"{flag}: {path} is not a checkpoint of this trainer (it lacks {', '.join(sorted(missing))})")
    return dict(state)


def _damaged_part(path: Path) -> str:
    """What differs from its checksum, or nothing."""
    with zipfile.ZipFile(path) as archive:
        part = archive.testzip()
    return f"{part} differs from its checksum" if part else ""


def rng_state() -> dict[str, Any]:
    """Where every random generator of this process stands, in types that `torch.load(weights_only=True)` knows."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": (version, list(internal), gauss),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put every random generator back to where `rng_state` found it."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
