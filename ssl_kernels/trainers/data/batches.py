"""Batches in an order of their own in every epoch.

A batch is a pure function of (seed, epoch, number of the batch): order, augmentation and caption choice are drawn
from a generator seeded with these three alone. That is what lets a run continue bit-exactly in mid-epoch, with any
number of loader workers. Each of several processes makes its own part of the batch that one process would make.

An image that cannot be read is replaced by another, which is drawn from the same generator. A batch comes with what
was found to be bad in it, which the process that trains takes out and tells the others.
"""

from __future__ import annotations

import os
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ssl_kernels.trainers.data.faults import Fault, Faults
from ssl_kernels.trainers.data.images import BadImageError
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.processes import Share, everyones

Batch = dict[str, Any]  # what a kind of data makes of it
T = TypeVar("T")

_FOUND = "faults"  # the name under which a batch has them
_SPARES = 32  # that are drawn in the place of one


class ShuffledBatches(Dataset[Batch], ABC):
    """Batches out of `count` examples; an item is this process's share of the batch `number` of the epoch `epoch`."""

    def __init__(
        self, count: int, *, batch_size: int, seed: int, workers: int, share: Share, faults: Faults | None = None
    ) -> None:
        self.count, self.batch_size, self.seed, self.workers, self.share = count, batch_size, seed, workers, share
        self.faults = Faults() if faults is None else faults
        self._order: tuple[int, np.ndarray] | None = None  # of the epoch that is being read

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """What a resumed run must find again."""

    @property
    @abstractmethod
    def in_memory(self) -> bool:
        """Whether nothing is read while training goes on."""

    @abstractmethod
    def make(self, indices: list[int], own: slice, rng: np.random.Generator, found: list[Fault]) -> Batch:
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
        found: list[Fault] = []
        batch = self.make(self.indices(epoch, number), self.share.of(self.batch_size), rng, found)
        return with_faults(batch, found)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; `workers` processes prepare them ahead."""
        items = [(epoch, number) for number in range(start, len(self))]
        made = loader(self, self.workers, sampler=items)
        if self.in_memory:
            yield from made
            return
        for number, batch in zip(range(start, len(self)), made, strict=True):
            seen = min(self.count, (epoch * len(self) + number + 1) * self.batch_size)
            yield without_faults(batch, self.faults, seen)

    def readable(self, indices: list[int], place: int, seed: int, open: Callable[[int], T], found: list[Fault]) -> T:
        """What `open` makes of an example of a batch, or of the first of others that can be read.

        These are drawn from `seed`, those outside of the batch first; `indices` then names the one that was taken.
        """
        try:
            return open(indices[place])
        except BadImageError as error:
            found.append(Fault(error.where, error.reason))
        batch = set(indices)
        others: list[int] = np.random.default_rng(seed).integers(self.count, size=_SPARES).tolist()
        for other in sorted(others, key=batch.__contains__):
            try:
                picture = open(other)
            except BadImageError as error:
                found.append(Fault(error.where, error.reason))
            else:
                indices[place] = other
                return picture
        raise UserError(
            f"{self.faults.flag}: {found[0].where} cannot be read, nor can {_SPARES} others that were drawn instead"
        )


def with_faults(batch: Batch, found: list[Fault]) -> Batch:
    """A batch as a loader's worker sends it."""
    return {**batch, _FOUND: found} if found else batch


def without_faults(batch: Batch, faults: Faults, seen: int) -> Batch:
    """The same as training takes it. `faults` is told what all processes have found, of `seen` examples by now.

    Raises `UserError` in all processes alike if the run is to stop for it.
    """
    found: Sequence[Fault] = batch.pop(_FOUND, ())
    faults.update(everyones(found, "data that cannot be read"))
    faults.check(seen)
    return batch


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
