"""Tests in several processes, which talk by gloo; and what the processes of one test run do only once."""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

MODULES = [str(Path(__file__).parent), str(Path(__file__).parent / "distributed")]

# Processes are copies of one that has done nothing but these imports, which take longer than most tests.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch.distributed.device_mesh", "torch.distributed.fsdp", "pytest"])

_told: Connection  # in a rank, to whoever has started it


@contextlib.contextmanager
def alone(lock: Path) -> Iterator[None]:
    """One process, and one of its threads, at a time; the others wait."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_processes(code: str, folder: Path, world: int = 2, *, rank_0_holds_the_store: bool = False) -> None:
    """``code`` in processes of one group that know ``rank`` and ``world``; each must reach its end.

    They meet through a file, or through rank 0.

    They are killed only when all have: on its way out, gloo breaks off what others still wait for, or aborts.
    """
    meeting = f"tcp://127.0.0.1:{free_port()}" if rank_0_holds_the_store else f"file://{folder / 'store'}"
    errors = [folder / f"stderr of rank {rank}" for rank in range(world)]
    ends, workers = [], []
    try:
        for rank in range(world):
            end, its_end = _FORKS.Pipe()
            workers.append(_FORKS.Process(target=_run, args=(code, rank, world, meeting, folder, its_end)))
            workers[-1].start()
            its_end.close()
            ends.append(end)
        for rank, end in enumerate(ends):
            try:
                end.recv()
            except EOFError:  # it has died, perhaps for what another one did
                texts = (error.read_text()[-4000:] for error in errors if error.exists())
                raise AssertionError(f"rank {rank}:\n" + "\n".join(texts)) from None
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def run_python(code: str, *, limit_s: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a process that has imported neither the package nor Triton before."""
    with tempfile.TemporaryDirectory() as folder:
        worker = _FORKS.Process(target=_run_python, args=(code, os.environ | environment, Path(folder)))
        worker.start()
        worker.join(limit_s)
        worker.kill()
        worker.join()
        out, err = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    assert worker.exitcode is not None
    return subprocess.CompletedProcess(code, worker.exitcode, out, err)


def _run_python(code: str, environment: dict[str, str], folder: Path) -> None:
    _begin(folder / "stdout", folder / "stderr")
    os.environ.update(environment)
    exec(code, {"__name__": "__main__"})


def _begin(stdout: Path, stderr: Path) -> None:
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    gc.freeze()  # modules that it was forked with are not garbage


def _run(code: str, rank: int, world: int, meeting: str, folder: Path, end: Connection) -> None:
    global _told
    _told = end
    _begin(folder / f"stdout of rank {rank}", folder / f"stderr of rank {rank}")
    faulthandler.dump_traceback_later(300, exit=True)  # rather than to hang
    sys.path[:0] = MODULES
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    exec(code, {"__name__": "__main__", "sys": sys, "torch": torch, "dist": dist, "rank": rank, "world": world})
    passed()
    with contextlib.suppress(EOFError):
        end.recv()  # until it is killed


def passed() -> None:
    """Said by a process that has done its part: by itself at the end, or before it kills itself."""
    _told.send(None)
