"""Two hosts: network namespaces that a pair of virtual cards joins, with a rank in each."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
HOSTS = ("10.231.77.1", "10.231.77.2")
RANK = """
import sys
sys.path[:0] = sys.argv[3:]
import torch, torch.distributed as dist
rank = int(sys.argv[1])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="tcp://" + sys.argv[2], rank=rank, world_size=2)
import losses
losses.every_loss_is_that_of_one_process(rank, 2, shards=1)
dist.barrier()
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[list[str]]:
    names = [f"ssl{os.getpid()}{end}" for end in "ab"]
    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", "eth9", "netns", names[0], "type", "veth", "peer", "name", "eth9", "netns", names[1])
        for name, host in zip(names, HOSTS, strict=True):
            ip("-n", name, "address", "add", f"{host}/24", "dev", "eth9")
            ip("-n", name, "link", "set", "eth9", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "del", name)


@pytest.mark.slow
def test_two_hosts(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        try:
            names = stack.enter_context(two_hosts())
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        workers = []
        for rank, name in enumerate(names):
            command = [sys.executable, "-c", RANK, str(rank), f"{HOSTS[0]}:29555", str(FOLDER), str(FOLDER.parent)]
            with (tmp_path / f"rank {rank}").open("w") as log:
                environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth9"}
                inside = ["ip", "netns", "exec", name, *command]
                workers.append(subprocess.Popen(inside, env=environment, stdout=log, stderr=log))
        for rank, worker in enumerate(workers):
            assert worker.wait(timeout=280) == 0, (tmp_path / f"rank {rank}").read_text()[-3000:]
