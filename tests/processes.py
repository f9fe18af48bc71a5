"""Tests in several processes, which talk by gloo; and what the processes of one test run do only once."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MODULES = [str(Path(__file__).parent), str(Path(__file__).parent / "distributed")]

START = """
import faulthandler, sys
sys.path[:0] = sys.argv[4:]
faulthandler.dump_traceback_later(300, exit=True)  # rather than to hang
import torch, torch.distributed as dist
rank, world = int(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=sys.argv[3], rank=rank, world_size=world)
"""

END = """
print("passed", flush=True)
sys.stdin.read()
"""


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
    errors = [folder / f"stderr of rank {rank}" for rank in range(world)]
    workers = []
    meeting = f"tcp://127.0.0.1:{free_port()}" if rank_0_holds_the_store else f"file://{folder / 'store'}"
    try:
        for rank in range(world):
            with errors[rank].open("w") as stderr:
                command = [sys.executable, "-c", START + code + END, str(rank), str(world), meeting, *MODULES]
                pipe = subprocess.PIPE
                workers.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, text=True))
        for rank, worker in enumerate(workers):
            assert worker.stdout is not None
            if worker.stdout.readline() != "passed\n":  # perhaps for what another one did
                raise AssertionError(f"rank {rank}:\n" + "\n".join(error.read_text()[-4000:] for error in errors))
    finally:
        for worker in workers:
            worker.kill()
            worker.communicate()
