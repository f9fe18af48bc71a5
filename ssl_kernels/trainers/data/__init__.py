"""Image-text pairs: where they come from, how they are split, in which order and form they are fed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ssl_kernels.trainers.data import files, openmoji, shards, tars
from ssl_kernels.trainers.data.batches import Batch
from ssl_kernels.trainers.data.faults import EVALUATION, TRAINING, Faults, ReadingConfig
from ssl_kernels.trainers.data.images import try_some
from ssl_kernels.trainers.data.pairs import Batches, Fingerprints, ImageTextPairs, Tokenize
from ssl_kernels.trainers.data.pixels import parse_colour
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.processes import ALONE, Share
from ssl_kernels.trainers.ranges import SHARE, at_least, require

__all__ = ["Batch", "Batches", "Data", "DataConfig", "ImageTextPairs", "load"]


@dataclass
class DataConfig(ReadingConfig):
    """Which pairs to train and to evaluate on."""

    data: str = "openmoji"
    """`openmoji`; a .csv, .tsv or .jsonl file of image paths and captions; or WebDataset shards:
    a folder of them, a glob, or a pattern such as "shards-{000..099}.tar"."""
    held_out_data: str = ""
    """Pairs to evaluate on, as a table or as shards; training pairs with the same caption or image are dropped."""
    held_out: float = 0.1
    """Share of a table that is held out when --held-out-data is not given; at most 5,000 pairs."""
    split_seed: int = 0
    """Seed of the held-out split; independent of --seed."""
    evaluate_on: Literal["held-out", "validation"] = "held-out"
    """`validation` holds a second split out of the training pairs and evaluates on that: use it to choose settings."""
    image_column: str = "image"
    """Column of a table that holds the image's path, relative to the table."""
    caption_column: str = "caption"
    """Column of a table that holds the caption."""
    epoch_pairs: int = 0
    """Pairs per epoch of WebDataset shards; 0 reads the shards once to count them."""
    label_captions: float = 0.2
    """Probability with which the words of an image's category (if the data has any) join or replace its caption.
    This is label supervision, and the report says so."""
    augment: bool = True
    """Rotate, scale and shift (OpenMoji) or crop (files) the training images."""
    image_size: int = 40
    """Height and width of the images in pixels."""

    def check_data(self) -> None:
        """Refuse values that cannot work."""
        require(self, SHARE, "label_captions", "held_out")
        require(self, at_least(8), "image_size")
        require(self, at_least(0), "split_seed", "epoch_pairs")
        self.check_reading()
        if self.evaluate_on == "validation" and _is_shards(self.data):
            raise UserError("--evaluate-on validation: shards are not split; give --held-out-data")

    def find_data(self) -> None:
        """Refuse files that are not there, before anything that takes long."""
        for flag, name in (("--data", self.data), ("--held-out-data", self.held_out_data)):
            if _is_shards(name):
                tars.expand(name, flag)
            elif name not in ("openmoji", ""):
                _table(name, flag)


@dataclass
class Data:
    """Batches to train on, the pairs they come from (None for shards), the pairs held out (None without any), and what
    of the data cannot be used."""

    batches: Batches | shards.ShardBatches
    train: ImageTextPairs | None
    held_out: ImageTextPairs | None
    faults: Faults = field(default_factory=Faults)


def load(
    config: DataConfig, tokenize: Tokenize, *, batch_size: int, seed: int, workers: int, share: Share = ALONE
) -> Data:
    """The data that a configuration names, split into what is trained on and what is held out."""
    size, faults, background = config.image_size, config.faults(), parse_colour(config.background)
    held_out, marks = _read_held_out(config, faults)
    if _is_shards(config.data):
        stream = shards.ShardBatches(
            config.data, tokenize, size=size, batch_size=batch_size, seed=seed, workers=workers,
            augment=config.augment, epoch_pairs=config.epoch_pairs, held_out=marks, share=share, faults=faults,
            background=background,
        )  # fmt: skip
        _try_some(None, held_out, faults)
        return Data(stream, None, held_out, faults)
    if config.data == "openmoji":
        if config.held_out_data:
            raise UserError("--held-out-data: openmoji brings its own held-out pairs")
        # Half as large again as the model sees: rotating and scaling then costs no sharpness.
        pairs = openmoji.load(size * 3 // 2, size)
        train, held_out = openmoji.hold_out(pairs, config.split_seed)
        if config.evaluate_on == "validation":
            train, held_out = openmoji.hold_out(train, config.split_seed + 1)
    else:
        pairs = files.read_table(_table(config.data, "--data"), config.image_column, config.caption_column)
        pairs = replace(pairs, background=background)
        if held_out is not None:
            train = files.without(pairs, marks)
        else:
            train, held_out = files.split(pairs, config.held_out, config.split_seed)
        if config.evaluate_on == "validation":
            train, held_out = files.split(train, max(config.held_out, 0.1), config.split_seed + 1)
    if len(train) < batch_size:
        raise UserError(
            f"--batch-size: {batch_size} is more than the {len(train)} training pairs of --data {config.data}"
        )
    _try_some(train, held_out, faults)
    batches = Batches(
        train, tokenize, size=size, batch_size=batch_size, seed=seed,
        augment=config.augment, label_captions=config.label_captions, workers=workers, share=share,
        faults=faults,
    )  # fmt: skip
    return Data(batches, train, held_out if held_out else None, faults)


def _try_some(train: ImageTextPairs | None, held_out: ImageTextPairs | None, faults: Faults) -> None:
    """Read some of the files before anything that takes long."""
    for pairs, use in ((train, TRAINING), (held_out, EVALUATION)):
        if pairs is not None and isinstance(pairs.images, list):
            try_some(pairs.images, faults, use)


def _is_shards(name: str) -> bool:
    return tars.is_shards(name)


def _table(name: str, flag: str) -> Path:
    path = Path(name)
    if path.suffix not in files.SUFFIXES:
        raise UserError(f"{flag}: expected openmoji, a {', '.join(files.SUFFIXES)} file or .tar shards, got {name!r}")
    if not path.is_file():
        raise UserError(f"{flag}: no such file: {path}")
    return path


def _read_held_out(config: DataConfig, faults: Faults) -> tuple[ImageTextPairs | None, Fingerprints]:
    if not config.held_out_data:
        return None, Fingerprints()
    if _is_shards(config.held_out_data):
        background = parse_colour(config.background)
        return shards.read_all(config.held_out_data, config.image_size, faults=faults, background=background)
    flag = "--held-out-data"
    pairs = files.read_table(_table(config.held_out_data, flag), config.image_column, config.caption_column, flag)
    pairs = replace(pairs, background=parse_colour(config.background))
    return files.one_per_group(pairs), files.fingerprints(pairs)
