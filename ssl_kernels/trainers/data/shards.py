"""WebDataset shards: tar files of images with their captions, streamed."""

from __future__ import annotations

import hashlib
import io
import itertools
import random
from collections.abc import Iterator

import numpy as np
import torch
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from ssl_kernels.distributed import gather_rows
from ssl_kernels.trainers.data.batches import Batch, loader
from ssl_kernels.trainers.data.fingerprint import names_within
from ssl_kernels.trainers.data.images import centre_crop, image_seeds, random_crop
from ssl_kernels.trainers.data.pairs import Fingerprints, ImageTextPairs, Tokenize, make_batch, shared_ids
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.processes import ALONE, Share, own_share

IMAGE_KEYS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("txt", "caption")
_BUFFER = 1000  # samples that are shuffled among each other, on top of the shuffled shards

Sample = tuple[bytes, str, str]  # encoded image, caption, key


def expand(urls: str, flag: str = "--data") -> list[str]:
    """The shards a pattern such as "shards-{000..099}.tar" names; local ones must exist."""
    names = list(wds.shardlists.expand_urls(urls))
    for name in names:
        if "://" not in name and not name.startswith("pipe:"):
            try:
                open(name, "rb").close()
            except OSError as error:
                raise UserError(f"{flag}: cannot read the shard {name}: {error.strerror}") from None
    return names


def read(names: list[str], flag: str = "--data") -> Iterator[Sample]:
    """The samples of shards in their order."""
    try:
        for sample in wds.DataPipeline(wds.SimpleShardList(names), wds.tarfile_to_samples()):
            key = f"{sample.get('__url__')}:{sample.get('__key__')}"
            image = next((sample[k] for k in IMAGE_KEYS if k in sample), None)
            caption = next((sample[k].decode().strip() for k in CAPTION_KEYS if k in sample), "")
            if image is None:
                raise UserError(f"{flag}: the sample {key} has no image; expected a member {', '.join(IMAGE_KEYS)}")
            if not caption:
                raise UserError(f"{flag}: the sample {key} has no caption; expected a member {', '.join(CAPTION_KEYS)}")
            yield image, caption, key
    except UserError:
        raise
    except Exception as error:  # tarfile, gzip, sockets and pipes each have their own
        raise UserError(
            f"{flag}: cannot read the shards: {(str(error) or type(error).__name__).splitlines()[0]}"
        ) from None


def decode(image: bytes, key: str, flag: str = "--data") -> Image.Image:
    try:
        return Image.open(io.BytesIO(image)).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        raise UserError(f"{flag}: cannot decode the image of the sample {key}") from None


def read_all(urls: str, size: int, flag: str = "--held-out-data") -> tuple[ImageTextPairs, Fingerprints]:
    """The pairs of held-out shards in memory, one for each caption and image, and what marks them."""
    images, captions, seen = [], [], Fingerprints()
    for image, caption, key in read(expand(urls, flag), flag):
        if not seen.match(caption, image):
            images.append(centre_crop(decode(image, key, flag), size))
            captions.append(caption)
        seen.add(caption, image)
    if not images:
        raise UserError(f"{flag}: {urls} holds no pairs")
    return ImageTextPairs(torch.stack(images), captions), seen


class ShardBatches(IterableDataset[Batch]):
    """Batches from shards: shards shuffled, then samples within a buffer, both by (seed, epoch, pass, worker).

    Worker w of W makes the batches w, w + W, ... of an epoch from its own share of the shards. To start in mid-epoch it
    reads past what it had delivered without decoding it. A stream that ends before the epoch does starts over in a new
    order. Samples that share a caption or an image with the held-out pairs are passed over.

    Each worker of several processes has shards of its own likewise, and makes its process's part of a batch. The parts
    know nothing of each other: instead of ids they have keys, from which `ids_of_keys` makes those of the whole.
    """

    def __init__(
        self, urls: str, tokenize: Tokenize, *, size: int, batch_size: int, seed: int, workers: int, augment: bool,
        epoch_pairs: int, held_out: Fingerprints, share: Share = ALONE,
    ) -> None:  # fmt: skip
        self.names, self.share = expand(urls), share
        if max(1, workers) * share.world > len(self.names):
            several = f" in each of {share.world} processes" if share.world > 1 else ""
            raise UserError(f"--workers: {workers}{several} is more than the {len(self.names)} shards of --data {urls}")
        self.tokenize, self.size, self.batch_size, self.seed = tokenize, size, batch_size, seed
        self.workers, self.augment, self.held_out = workers, augment, held_out
        self.epoch_pairs = epoch_pairs or sum(not held_out.match(c, image) for image, c, _ in read(self.names))
        if self.epoch_pairs < batch_size:
            raise UserError(
                f"--batch-size: {batch_size} is more than the {self.epoch_pairs} pairs of an epoch of {urls}"
            )
        self.epoch = self.start = 0

    @property
    def fingerprint(self) -> str:
        """What a resumed run must find again: the shards, and the processes' workers among which they are dealt."""
        several = f"{self.share.world} processes, " if self.share.world > 1 else ""
        return f"{several}{self.workers} workers: {' '.join(names_within(self.names))}"

    def __len__(self) -> int:
        return self.epoch_pairs // self.batch_size

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        self.epoch, self.start = epoch, start
        return iter(loader(self, self.workers))

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        # The loader asks its workers in turn from the first: renumbering them makes that the one whose turn it is.
        worker = ((info.id if info else 0) + self.start) % workers
        rank, world = self.share
        stream = self._stream(worker * world + rank, workers * world)
        for number in range(worker, len(self), workers):
            samples = list(itertools.islice(stream, self.batch_size // world))
            if number >= self.start:
                seeds = (self.seed, self.epoch, number + 1, *([rank] if rank else []))
                yield self._batch(samples, np.random.default_rng(seeds))

    def _stream(self, place: int, places: int) -> Iterator[Sample]:
        fruitless = 0
        for again in itertools.count():
            names = [
                self.names[i]
                for i in np.random.default_rng((self.seed, self.epoch, again)).permutation(len(self.names))
            ]
            chance = random.Random(f"{self.seed} {self.epoch} {again} {place}")
            fresh = (s for s in read(names[place::places]) if not self.held_out.match(s[1], s[0]))
            for sample in wds.filters.shuffle(_BUFFER, rng=chance)(fresh):
                fruitless = 0
                yield sample
            # A share may be held out whole; the next pass deals the shards anew.
            fruitless += 1
            if fruitless > 20 * places:
                raise UserError("--data: the shards hold no pair that is not held out")

    def _batch(self, samples: list[Sample], rng: np.random.Generator) -> Batch:
        pictures = [decode(image, key) for image, _, key in samples]
        images = [
            random_crop(picture, self.size, seed) if self.augment else centre_crop(picture, self.size)
            for picture, seed in zip(pictures, image_seeds(rng, len(pictures)), strict=True)
        ]
        captions, sources = [caption for _, caption, _ in samples], [image for image, _, _ in samples]
        batch = make_batch(torch.stack(images), captions, sources, self.tokenize)
        if self.share.world > 1:
            batch["ids"] = torch.tensor([[_key(caption.encode()), _key(image)] for image, caption, _ in samples])
        return batch


def _key(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def ids_of_keys(keys: Tensor) -> Tensor | None:
    """Of this process's part of a batch whose captions and images have these keys [n, 2]; None where nobody has any."""
    everyones = gather_rows(keys)
    ids = shared_ids(*everyones.t().tolist())
    return None if ids is None else ids[own_share().of(len(ids))].to(keys.device)
