"""A batch that ranks hold together, and what a loss of it is to be: the loss of one process, and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ssl_kernels.settings import choose_backend

Loss = Callable[..., Tensor]


def shares(world: int, least: int = 0) -> Iterator[list[int]]:
    """Rows of each rank: equal numbers, different ones, and none on one rank, at least ``least`` in all."""
    yield [max(9, least)] * world
    yield [4 + least + 5 * rank for rank in range(world)]
    if world > 1:
        yield [0 if rank == 1 else 1 + least + rank for rank in range(world)]


@dataclass
class Whole:
    """A batch of one or two tensors, and how many of its rows each rank has."""

    tensors: Sequence[Tensor]  # float64
    counts: Sequence[int]
    _found: dict[tuple[str, str, torch.dtype], list[Tensor]] = field(default_factory=dict)

    def rows_of(self, rank: int) -> slice:
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def run(self, loss: Loss, dtype: torch.dtype, rows: slice = slice(None), **how: Any) -> list[Tensor]:
        """The loss of some rows, and its gradients."""
        leaves = [t[rows].to(dtype).requires_grad_() for t in self.tensors]
        value = loss(*leaves, **how)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    def _of_one_process(self, name: str, loss: Loss, dtype: torch.dtype) -> list[Tensor]:
        key = name, choose_backend(torch.device("cpu"), torch.float32, ("cpu",)), dtype
        if key not in self._found:
            self._found[key] = self.run(loss, dtype)
        return self._found[key]

    def check(self, name: str, loss: Loss, rank: int, dtype: torch.dtype = torch.float32, **how: Any) -> list[Tensor]:
        """The error is at most twice that of one process; or some rounding steps, where it happens to have none."""
        alone_dtype = torch.float32 if dtype == torch.float64 else dtype
        exact, alone = (self._of_one_process(name, loss, kind) for kind in (torch.float64, alone_dtype))
        found = self.run(loss, dtype, self.rows_of(rank), **how)
        factor = len(self.counts) if how.get("grad_reduce", "mean") == "mean" else 1
        for index, (ours, theirs, truth) in enumerate(zip(found, alone, exact, strict=True)):
            size = truth.abs().max()
            expected = truth if index == 0 else factor * truth[self.rows_of(rank)]
            error = ((ours - expected).abs().max() / size).item() / (factor if index else 1) if ours.numel() else 0.0
            bound = max(2 * ((theirs - truth).abs().max() / size).item(), 4e-7) if dtype != torch.float64 else 1e-12
            assert error <= bound, (name, list(self.counts), dtype, how, index, error, bound)
        return found
