"""WebDataset shards, streamed: batches for training, and pairs in memory for evaluation."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ssl_kernels.trainers.data.batches import Batch, loader, with_faults, without_faults
from ssl_kernels.trainers.data.faults import Fault, Faults
from ssl_kernels.trainers.data.fingerprint import names_within
from ssl_kernels.trainers.data.identity import Fingerprints, keys_of
from ssl_kernels.trainers.data.images import BadImageError, centre_crop, image_seeds, open_image, random_crop
from ssl_kernels.trainers.data.pairs import Tokenize, make_batch
from ssl_kernels.trainers.data.pixels import WHITE, Colour
from ssl_kernels.trainers.data.shard_names import expand
from ssl_kernels.trainers.data.tars import Losses, Sample, samples
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.processes import ALONE, Share

_BUFFER = 1000  # samples that are shuffled among each other, on top of the shuffled shards
_SPARES = 32  # samples that have passed, to take the place of one that cannot be decoded


class ShardBatches(IterableDataset[Batch]):
    """Batches from shards: shards shuffled, then samples within a buffer, both by (seed, epoch, pass, worker).

    Worker w of W makes the batches w, w + W, ... of an epoch from its own share of the shards. To start in mid-epoch it
    reads past what it had delivered without decoding it. A stream that ends before the epoch does starts over in a new
    order. Samples that share a caption or an image with the held-out pairs are passed over, as are incomplete ones; one
    whose image cannot be decoded is replaced by one of those that passed before it.

    Each worker of several processes has shards of its own likewise, and makes its process's part of a batch. The parts
    know nothing of each other: instead of ids they have keys, from which `ids_of_keys` makes those of the whole.
    """

    def __init__(
        self, urls: str, tokenize: Tokenize, *, size: int, batch_size: int, seed: int, workers: int, augment: bool,
        epoch_pairs: int, held_out: Fingerprints, share: Share = ALONE, faults: Faults | None = None,
        background: Colour = WHITE, encoding: str = "utf-8",
    ) -> None:  # fmt: skip
        self.names, self.share = expand(urls), share
        if max(1, workers) * share.world > len(self.names):
            several = f" in each of {share.world} processes" if share.world > 1 else ""
            raise UserError(f"--workers: {workers}{several} is more than the {len(self.names)} shards of --data {urls}")
        self.tokenize, self.size, self.batch_size, self.seed = tokenize, size, batch_size, seed
        self.workers, self.augment, self.held_out = workers, augment, held_out
        self.background, self.encoding = background, encoding
        self.faults = Faults() if faults is None else faults
        self.expected = epoch_pairs // len(self.names)  # samples of a shard
        # Samples that share a caption or an image with held-out pairs, and those of several captions, once counted.
        self.leaking = self.several = 0
        self.epoch_pairs = epoch_pairs or self._count()
        if self.epoch_pairs < batch_size:
            reasons = "; ".join(self.faults.lines())
            raise UserError(
                f"--batch-size: {batch_size} is more than the {self.epoch_pairs} pairs of an epoch of {urls}"
                + (f" ({reasons})" if reasons else "")
            )
        self.epoch = self.start = 0

    def _count(self) -> int:
        """The pairs of all shards that can be trained on; `faults` is told of the others."""
        losses, found = Losses(), list[Fault]()
        total = fresh = 0
        for name in self.names:
            before, own = total, list[Fault]()
            for sample in samples(name, own, encoding=self.encoding):
                total += 1
                fresh += not self.held_out.match(sample.captions, sample.image)
                self.several += len(sample.captions) > 1
            found += losses.of(own, total - before)
        self.expected = losses.expected
        found += losses.of_parts()
        self.faults.update(found)
        self.faults.check(total + sum(fault.lost for fault in found))
        self.leaking = total - fresh
        return fresh

    @property
    def fingerprint(self) -> str:
        """What a resumed run must find again: the names of the shards, wherever these lie, and the processes' workers
        among which they are dealt."""
        several = f"{self.share.world} processes, " if self.share.world > 1 else ""
        return f"{several}{self.workers} workers: {' '.join(names_within(self.names))}"

    def __len__(self) -> int:
        return self.epoch_pairs // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.epoch, self.start = epoch, start
        for number, batch in enumerate(loader(self, self.workers), epoch * len(self) + start + 1):
            yield without_faults(batch, self.faults, min(self.epoch_pairs, number * self.batch_size))

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        # The loader asks its workers in turn from the first: renumbering them makes that the one whose turn it is.
        worker = ((info.id if info else 0) + self.start) % workers
        rank, world = self.share
        found: list[Fault] = []
        passed: deque[Sample] = deque(maxlen=_SPARES)
        stream = self._stream(worker * world + rank, workers * world, found)
        for number in range(worker, len(self), workers):
            batch = list(itertools.islice(stream, self.batch_size // world))
            if number >= self.start:
                seeds = (self.seed, self.epoch, number + 1, *([rank] if rank else []))
                made = self._batch(batch, passed, np.random.default_rng(seeds), found)
                yield with_faults(made, list(found))
                found.clear()
            passed.extend(batch)

    def _stream(self, place: int, places: int, found: list[Fault]) -> Iterator[Sample]:
        fruitless = 0
        for again in itertools.count():
            names = [
                self.names[i]
                for i in np.random.default_rng((self.seed, self.epoch, again)).permutation(len(self.names))
            ]
            chance = random.Random(f"{self.seed} {self.epoch} {again} {place}")
            fresh = (s for s in self._read(names[place::places], found) if not self.held_out.match(s.captions, s.image))
            for sample in wds.filters.shuffle(_BUFFER, rng=chance)(fresh):
                fruitless = 0
                yield sample
            # A share may be held out whole; the next pass deals the shards anew.
            fruitless += 1
            if fruitless > 20 * places:
                raise UserError("--data: the shards hold no pair that is not held out")

    def _read(self, names: list[str], found: list[Fault]) -> Iterator[Sample]:
        for name in names:
            yield from samples(name, found, expected=self.expected, encoding=self.encoding)

    def _batch(
        self, batch: list[Sample], passed: Sequence[Sample], rng: np.random.Generator, found: list[Fault]
    ) -> Batch:
        crops, spares = image_seeds(rng, len(batch)), image_seeds(rng, len(batch))
        taken, images = [], []
        for sample, crop, spare in zip(batch, crops, spares, strict=True):
            sample, picture = self._readable(sample, [*passed, *batch], spare, found)
            taken.append(sample)
            images.append(random_crop(picture, self.size, crop) if self.augment else centre_crop(picture, self.size))
        draws = zip(taken, rng.random(len(taken)).tolist(), strict=True)  # as in tables, of several captions one
        captions = [sample.captions[int(draw * len(sample.captions))] for sample, draw in draws]
        sources = [sample.image for sample in taken]
        made = make_batch(torch.stack(images), captions, sources, self.tokenize)
        if self.share.world > 1:
            made["ids"] = keys_of(captions, sources)
        return made

    def _readable(
        self, sample: Sample, others: list[Sample], seed: int, found: list[Fault]
    ) -> tuple[Sample, Image.Image]:
        """A sample with its image, or one of the others, in an order drawn from `seed`, that can be decoded."""
        try:
            return sample, self._open(sample)
        except BadImageError as error:
            found.append(Fault(error.where, error.reason))
        for i in np.random.default_rng(seed).permutation(len(others)).tolist():
            try:
                return others[i], self._open(others[i])
            except BadImageError as error:
                found.append(Fault(error.where, error.reason))
        raise UserError(f"--data: cannot read the image {sample.where}, nor any of {len(others)} that came before it")

    def _open(self, sample: Sample) -> Image.Image:
        return open_image(sample.image, self.background, sample.where)
