"""What the loss modules have in common whose batch several processes may hold together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from ssl_kernels.distributed import Group, across


class LossInGroup(nn.Module):
    """A loss over the ranks of a group; see :mod:`ssl_kernels.distributed`.

    Args:
        group, strategy, grad_reduce, even_batches: as of the losses of :mod:`ssl_kernels.functional`. A group of None
            is all processes where ``world_size``, as open_clip passes it, says that there are others; else this one.
        rank, world_size: of this process. They must be those of the group.
    """

    def __init__(
        self, group: Group, strategy: str, grad_reduce: str, even_batches: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__()
        across(None, strategy, grad_reduce, even_batches, False, "mean")
        self.group = group
        self.strategy = strategy
        self.grad_reduce = grad_reduce
        self.even_batches = even_batches
        self.rank = rank
        self.world_size = world_size

    def how(self) -> dict[str, Any]:
        """These as arguments of a function."""
        return {
            "group": self._group(),
            "strategy": self.strategy,
            "grad_reduce": self.grad_reduce,
            "even_batches": self.even_batches,
        }

    def is_alone(self) -> bool:
        return self.group is None and self.world_size == 1

    def _group(self) -> Group:
        if self.group is not None or self.world_size == 1:
            return self.group
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{type(self).__name__}: world_size={self.world_size}: expected torch.distributed to be initialised"
            )
        for name, told, found in (
            ("world_size", self.world_size, dist.get_world_size()), ("rank", self.rank, dist.get_rank())
        ):  # fmt: skip
            if told != found:
                raise ValueError(f"{type(self).__name__}: {name}: expected {found}, as of this process, got {told}")
        return dist.group.WORLD
