"""How many steps a run takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.loop_config import LoopConfig


class EpochBatches(Protocol):
    """What the loop asks of the data."""

    batch_size: int

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]: ...


def steps_per_epoch(data: EpochBatches, config: LoopConfig) -> int:
    """Optimizer steps in an epoch, at least one; batches that do not fill a step are left out."""
    if len(data) < config.accumulate:
        raise UserError(
            f"--batch-size {config.batch_size} x --accumulate {config.accumulate}: more than one epoch holds"
            f" ({len(data)} batches of {config.batch_size})"
        )
    return len(data) // config.accumulate


def total_steps(data: EpochBatches, config: LoopConfig) -> int:
    """Optimizer steps in all, at which every schedule ends."""
    return config.max_steps or steps_per_epoch(data, config) * config.epochs
