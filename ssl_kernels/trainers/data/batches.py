"""Batches in an order of their own in every epoch.

A batch is a pure function of (seed, epoch, number of the batch): order, augmentation and caption choice are drawn
from a generator seeded with these three alone. That is what lets a run continue bit-exactly in mid-epoch, with any
number of loader workers. Each of several processes makes its own part of the batch that one process would make.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ssl_kernels.trainers.processes import Share

Batch = dict[str, Any]  # what a kind of data makes of it


class ShuffledBatches(Dataset[Batch], ABC):
    """Batches out of `count` examples; an item is this process's share of the batch `number` of the epoch `epoch`."""

    def __init__(self, count: int, *, batch_size: int, seed: int, workers: int, share: Share) -> None:
        self.count, self.batch_size, self.seed, self.workers, self.share = count, batch_size, seed, workers, share
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch that is being read

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What a resumed run must find again."""

    @abstractmethod
    def make(self, indices: list[int], own: slice, rng: np.random.Generator) -> Batch:
        """The part `own` of the batch of these examples. All that is random is drawn from `rng`, for all parts."""

    def __len__(self) -> int:
        return self.count // self.batch_size

    def indices(self, epoch: int, number: int) -> list[int]:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self.count))
        indices: list[int] = self._order[1][number * self.batch_size : (number + 1) * self.batch_size].tolist()
        return indices

    def __getitem__(self, item: tuple[int, int]) -> Batch:
        epoch, number = item
        rng = np.random.default_rng((self.seed, epoch, number + 1))
        return self.make(self.indices(epoch, number), self.share.of(self.batch_size), rng)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; `workers` processes prepare them ahead."""
        items = [(epoch, number) for number in range(start, len(self))]
        return iter(loader(self, self.workers, sampler=items))


def loader(dataset: Dataset[Batch], workers: int, **options: Any) -> DataLoader[Batch]:
    """A loader of whole batches. Its own generator keeps it from drawing from torch's global one at every start."""
    return DataLoader(
        dataset, batch_size=None, num_workers=workers, worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip


def _leave_signals_to_the_main_process(worker: int) -> None:
    """Ctrl-C, a scheduler and `timeout` signal a whole process group: a worker has one of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setpgrp"):
        os.setpgrp()
