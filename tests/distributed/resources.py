"""Run by each rank: how much memory a step takes, and how many bytes it sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from memory import peak_mb, saved_bytes
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import distributed, use_tile_budget, use_workspace

ROWS, WIDTH = 128, 8192  # many bytes for few products
FEATURES_MB = ROWS * WIDTH * 4 / 2**20  # of one side


def _step(loss: Callable[..., Tensor], **how: Any) -> Callable[[], list[Tensor]]:
    """Forward and backward pass; the gradients are what it leaves."""
    x, y = (torch.randn(ROWS, WIDTH).mul_(WIDTH**-0.5).requires_grad_() for _ in "xy")

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(loss(x, y, group=dist.group.WORLD, **how), (x, y)))

    return step


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda x, y, **how: K.sigmoid_contrastive_loss(x, y, 10.0, -10.0, **how),
    "clip": lambda x, y, **how: K.clip_loss(x, y, 10.0, **how),
    "nt_xent": lambda x, y, **how: K.nt_xent_loss(x, y, 0.1, **how),
    "rows": lambda x, y, **how: K.row_softmax_loss(x, y, 10.0, **how),
}


def memory_does_not_grow_with_the_ranks(rank: int, world: int) -> None:
    """Beside the features the ring holds 2 blocks of x and of y, and both gradients; "gather" all of x and of y."""
    with use_workspace(1), use_tile_budget(0):
        for name in ("sigmoid", "clip", "rows"):
            for strategy, blocks in (("ring", 6), ("gather", 2 * world)):
                step = _step(LOSSES[name], strategy=strategy)
                with saved_bytes() as sizes:
                    step()
                assert sum(sizes) <= 2 * FEATURES_MB * 2**20 + 2**16, (name, strategy, sum(sizes))
                peak, bound = peak_mb(step, calls=2), (blocks + 2) * FEATURES_MB + 6
                assert peak <= bound, (name, strategy, world, peak, bound)


@contextmanager
def bytes_sent() -> Iterator[list[int]]:
    """Collects what this rank sends: of what is gathered, a copy to each other rank."""
    sent: list[int] = []
    gather, exchange = distributed._all_gather, dist.batch_isend_irecv

    def counted_gather(output: Tensor, tensor: Tensor, **how: Any) -> Any:
        sent.append(tensor.nbytes * (dist.get_world_size() - 1))
        return gather(output, tensor, **how)

    def counted_exchange(moves: list[dist.P2POp]) -> Any:
        sent.extend(move.tensor.nbytes for move in moves if move.op is dist.isend)
        return exchange(moves)

    with (
        patch.object(distributed, "_all_gather", counted_gather),
        patch.object(dist, "batch_isend_irecv", counted_exchange),
    ):
        yield sent


def bytes_are_those_of_the_formula(rank: int, world: int) -> None:
    """As docs/scaling.md has it: blocks of features, each W - 1 times a pass, and 4 floats to a row of a softmax."""
    rows, width = 64, 256
    for dtype in (torch.float32, torch.bfloat16):
        for frozen in (False, True):
            x, y = (torch.randn(rows, width).to(dtype) for _ in "xy")
            x.requires_grad_(not frozen)
            y.requires_grad_()
            block = rows * width * dtype.itemsize
            for strategy in ("gather", "ring"):
                again = 2 if strategy == "ring" else 1
                for name, blocks, vectors in (
                    ("sigmoid", 1 if frozen else 2, 0),
                    ("clip", 2 + (again - 1) * (1 if frozen else 2), 2),
                    ("rows", 2 + (again - 1) * (not frozen), 1.5),  # and targets in 8 bytes
                    ("nt_xent", 2 * again, 2),  # both views, normalised in fp32
                ):
                    if name == "nt_xent" and (frozen or dtype != torch.float32):
                        continue
                    with bytes_sent() as sent:
                        LOSSES[name](x, y, group=dist.group.WORLD, strategy=strategy)
                    formula = (world - 1) * (blocks * block + vectors * 4 * 4 * rows)
                    overhead = (world - 1) * 1400  # the exchange of facts, and sums
                    assert formula <= sum(sent) <= formula + overhead, (name, strategy, dtype, sum(sent), formula)
