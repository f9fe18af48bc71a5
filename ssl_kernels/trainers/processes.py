"""A run in several processes: who starts them, which part of a batch each has, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssl_kernels.distributed import Ranks, several_processes, world
from ssl_kernels.trainers.errors import UserError

T = TypeVar("T")


class Share(NamedTuple):
    """The part of every batch that process `rank` of `world` has: they are equal, and follow each other."""

    rank: int = 0
    world: int = 1

    def of(self, n: int) -> slice:
        """Of n examples, in the order of the batch."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)


ALONE = Share()


def own_share() -> Share:
    return Share(dist.get_rank(), dist.get_world_size()) if several_processes() else ALONE


def is_first() -> bool:
    """Whether this process is the first of its run, by what its launcher says before processes know of each other."""
    told = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK")
    return all(int(os.environ.get(name) or 0) == 0 for name in told)


def counts(devices: int, num_nodes: int) -> tuple[int, int]:
    """Processes to a node, and nodes: those that torchrun has started, or else those that are asked for."""
    asked, started = (devices, num_nodes), int(os.environ.get("WORLD_SIZE", 1))
    found = asked
    if dist.is_available() and dist.is_torchelastic_launched():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        found = here, started // here
        if asked not in ((1, 1), found):
            raise UserError(
                f"--devices {devices} --num-nodes {num_nodes}: torchrun has started {here} processes on each of"
                f" {found[1]} nodes; leave both out"
            )
    if found[0] * found[1] != started and "WORLD_SIZE" in os.environ:  # each would be a run of its own in one folder
        raise UserError(
            f"WORLD_SIZE: expected {found[0] * found[1]}, got {started}; start several processes with torchrun, or by"
            " --devices and --num-nodes"
        )
    return found


def mean_of_ranks(metrics: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Of what is a mean over a process's share of the batch, that over the batch."""
    numbers = {name: float(value) for name, value in metrics.items()}
    if not several_processes():
        return numbers
    return dict(zip(numbers, _told(list(numbers.values()), device, "metrics").mean(0).tolist(), strict=True))


def highest_of_ranks(number: int, device: torch.device) -> int:
    return int(_told([number], device, "a signal").max()) if several_processes() else number


def everyones(own: Sequence[T], what: str) -> list[T]:
    """What each process has to tell, in their order, on all of them; mostly nothing, which costs one small exchange."""
    if not several_processes():
        return list(own)
    accelerator = torch.accelerator.current_accelerator() or torch.device("cpu")
    if not any(count for (count,) in world_ranks(what).agree([len(own)], {}, accelerator)):
        return []
    told: list[list[T]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, list(own))
    return [item for items in told for item in items]


def _told(numbers: list[float], device: torch.device, what: str) -> Tensor:
    return world_ranks(what).gather(torch.tensor(numbers, dtype=torch.float64, device=device))


def world_ranks(what: str) -> Ranks:
    """All processes, of which there are several."""
    group = world()
    assert group is not None
    return Ranks(group.group_name, what)


def lost_ranks(error: RuntimeError) -> str | None:
    """Which processes did not answer, if that is what the error is about."""
    if not several_processes() or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
        return None
    return world_ranks("training").missing()
