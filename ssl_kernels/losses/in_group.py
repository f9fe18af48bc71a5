"""The base of the loss modules that take a group of processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from ssl_kernels.distributed import Group, across, world


class LossInGroup(nn.Module):
    """A loss over the ranks of a group; see :mod:`ssl_kernels.distributed`.

    Args:
        group, strategy, grad_reduce, even_batches: see :mod:`ssl_kernels.distributed`.
        rank, world_size, gather_distributed: how open_clip and lightly ask for a loss over all processes, which is what
            they mean without a group. A rank or a world size that is not this process's is an error.
    """

    def __init__(
        self,
        group: Group,
        strategy: str,
        grad_reduce: str,
        even_batches: bool,
        *,
        rank: int = 0,
        world_size: int = 1,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        across(None, strategy, grad_reduce, even_batches, False, "mean")
        if gather_distributed and not dist.is_available():
            raise ValueError("gather_distributed: expected False, for this build of torch has no torch.distributed")
        self.group = group
        self.strategy = strategy
        self.grad_reduce = grad_reduce
        self.even_batches = even_batches
        self.rank = rank
        self.world_size = world_size
        self.gather_distributed = gather_distributed

    def how(self) -> dict[str, Any]:
        """These settings, as arguments of a function in :mod:`ssl_kernels.functional`."""
        return {
            "group": self._group(),
            "strategy": self.strategy,
            "grad_reduce": self.grad_reduce,
            "even_batches": self.even_batches,
        }

    def is_alone(self) -> bool:
        return self.world_size == 1 and self._group() is None

    def _group(self) -> Group:
        if self.group is not None:
            return self.group
        if self.world_size == 1:
            return world() if self.gather_distributed else None
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


def overridden(loss: LossInGroup, base: type[nn.Module]) -> bool:
    """Whether a subclass overrides open_clip's methods for logits or labels. Its loss is then over the rows of this
    process."""
    if all(getattr(type(loss), name) is getattr(base, name) for name in ("get_logits", "get_ground_truth")):
        return False
    if not loss.is_alone():
        raise NotImplementedError(
            f"{type(loss).__name__}: get_logits or get_ground_truth is overridden: the loss of what they return is not "
            "implemented over several processes"
        )
    return True
