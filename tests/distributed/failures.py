"""Run by each rank: calls in which the ranks differ, and ranks that do not answer."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import passed

import ssl_kernels.functional as K


def differences_raise_everywhere(rank: int, world: int) -> None:
    """Rank 1 does something else; all ranks say what, and none hangs."""
    group = dist.group.WORLD
    x, odd = torch.randn(6, 8), rank == 1
    wants = x.clone().requires_grad_()

    def clip(x: torch.Tensor, **how: Any) -> None:
        K.clip_loss(x, x, 10.0, group=group, **how)

    def either() -> None:
        (K.nt_xent_loss(x, x, 0.1, group=group) if odd else clip(x))

    others = "ranks 0, 2"
    for call, message in (
        (lambda: clip(x[:, : 7 if odd else 8]), f"clip_loss: features: .* got 8 on {others}; 7 on rank 1"),
        (lambda: clip(x.double() if odd else x), f"dtype: .* got torch.float32 on {others}; torch.float64 on rank 1"),
        (lambda: clip(x if odd else wants), r"gradients wanted: .* got \['x', 'y'\] on ranks 0, 2; \[\] on rank 1"),
        (lambda: clip(x, reduction="sum" if odd else "mean"), f"reduction: .* mean on {others}; sum on rank 1"),
        (lambda: clip(x, label_smoothing=0.1 if odd else 0.2), "label_smoothing: .* 0.2 on ranks 0, 2; 0.1 on rank 1"),
        (lambda: clip(x, offset=int(odd)), "offset: .* got 0 on ranks 0, 2; 1 on rank 1"),
        (lambda: clip(x, strategy="ring" if odd else "gather"), "strategy: .* gather on ranks 0, 2; ring on rank 1"),
        (lambda: clip(x, grad_reduce="sum" if odd else "mean"), "grad_reduce: .* mean on ranks 0, 2; sum on rank 1"),
        (lambda: clip(x, **({"x_ids": torch.arange(6), "y_ids": torch.arange(6)} if odd else {})), "ids: .* True on"),
        (either, "function: .* clip_loss on ranks 0, 2; nt_xent_loss on rank 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()
    clip(x)  # and the group still works
    with pytest.raises(ValueError, match="reduction: expected 'mean' or 'sum' over several processes, got 'none'"):
        clip(x, reduction="none")


def a_rank_that_is_gone_is_named(rank: int, world: int) -> None:
    """Also where another failure, of which all knew, came before."""
    x = torch.randn(6, 8)
    short = dist.new_group()
    _expect_soon(short)
    if rank != 1:
        with pytest.raises(RuntimeError, match="nt_xent_loss: rank 1 did not answer"):
            K.nt_xent_loss(x, x, 0.1, group=short)
    dist.barrier()
    # The connection breaks: that is seen at once.
    _without(1, rank, signal.SIGKILL, "clip_loss: rank 1 did not answer, having ended, or being stuck or elsewhere")


def a_rank_that_is_stuck_is_named(rank: int, world: int) -> None:
    _without(1, rank, signal.SIGSTOP, "clip_loss: rank 1 did not answer, having ended, or being stuck or elsewhere")


def the_rank_that_holds_the_store_is_gone(rank: int, world: int) -> None:
    _without(0, rank, signal.SIGKILL, "nor does the store that they share: rank 0, unless torchrun holds it")


def the_rank_that_holds_the_store_is_stuck(rank: int, world: int) -> None:
    _without(0, rank, signal.SIGSTOP, "nor does the store that they share: rank 0, unless torchrun holds it")


def _expect_soon(*groups: dist.ProcessGroup) -> None:
    """What does not arrive within a second is missed from now on. How far apart the ranks are matters to no test: each
    misses what never comes, and then waits ten seconds for the others to say that they do, too."""
    dist.barrier()
    for group in groups:
        group._get_backend(torch.device("cpu"))._set_default_timeout(timedelta(seconds=1))


def _without(one: int, rank: int, end: signal.Signals, message: str) -> None:
    group = dist.new_group(timeout=timedelta(seconds=120))
    x = torch.randn(6, 8, requires_grad=True)
    K.clip_loss(x, x, 10.0, group=group, strategy="ring").backward()
    if end == signal.SIGSTOP:
        _expect_soon(group)
    if rank == one:
        passed()
        os.kill(os.getpid(), end)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=message):
        K.clip_loss(x, x, 10.0, group=group, strategy="ring")
    assert time.monotonic() - begun < 60


def different_groups_are_named(rank: int, world: int) -> None:
    some, all_of_them = dist.new_group([0, 1]), dist.new_group()
    _expect_soon(all_of_them, *([] if rank == 2 else [some]))
    x = torch.randn(6, 8)
    with pytest.raises(
        RuntimeError,
        match=r"in different calls: rank 0: clip_loss over ranks 0, 1, 2; rank 1: clip_loss over ranks 0, 1[;:]",
    ):
        K.clip_loss(x, x, 10.0, group=some if rank == 1 else all_of_them)
