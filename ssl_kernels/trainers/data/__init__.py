"""Image-text pairs: where they come from, how they are split, in which order and form they are fed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from ssl_kernels.trainers.data import files, openmoji, shard_names, shard_pairs, shards, splits
from ssl_kernels.trainers.data.batches import Batch
from ssl_kernels.trainers.data.faults import EVALUATION, TRAINING, Faults, ReadingConfig, place
from ssl_kernels.trainers.data.found import Found
from ssl_kernels.trainers.data.identity import Fingerprints
from ssl_kernels.trainers.data.images import try_some
from ssl_kernels.trainers.data.pairs import Batches, ImageTextPairs, Tokenize
from ssl_kernels.trainers.data.pixels import parse_colour
from ssl_kernels.trainers.data.text_files import check_encoding
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.processes import ALONE, Share
from ssl_kernels.trainers.ranges import SHARE, at_least, require

__all__ = ["Batch", "Batches", "Data", "DataConfig", "ImageTextPairs", "load"]


@dataclass
class DataConfig(ReadingConfig):
    """Which pairs to train and to evaluate on."""

    data: str = "openmoji"
    """`openmoji`; a table of image paths and captions (CSV, TSV, JSON lines, JSON or Parquet), or a folder with such
    a metadata.csv; or WebDataset shards: a folder of them, a glob, or a pattern such as "shards-{000..099}.tar"."""
    held_out_data: str = ""
    """Pairs to evaluate on, as a table or as shards; training pairs with the same caption or image are dropped."""
    held_out: float = 0.1
    """Share of a table that is held out when --held-out-data is not given; at most 5,000 pairs."""
    split_seed: int = 0
    """Seed of the held-out split; independent of --seed."""
    evaluate_on: Literal["held-out", "validation"] = "held-out"
    """`validation` holds a second split out of the training pairs and evaluates on that: use it to choose settings."""
    image_column: str = ""
    """Column of a table that holds the image's path, relative to the table. By default the first that is called image,
    filepath, file_name, path or alike."""
    caption_column: str = ""
    """Column of a table that holds the caption, or a list of captions, of which each epoch draws one. By default the
    first that is called caption, title, text, description or alike."""
    encoding: str = "utf-8"
    """Encoding of a table that does not begin with a mark of its own, or of captions in shards, such as latin-1."""
    allow_suspicious: bool = False
    """Train on a table even if its captions look wrong, as where most images have the same."""
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
        check_encoding(self.encoding)
        if self.evaluate_on == "validation" and _is_shards(self.data):
            raise UserError("--evaluate-on validation: shards are not split; give --held-out-data")

    def find_data(self) -> None:
        """Refuse files that are not there, before anything that takes long."""
        for flag, name in (("--data", self.data), ("--held-out-data", self.held_out_data)):
            if _is_shards(name):
                shard_names.expand(name, flag)
            elif name not in ("openmoji", ""):
                files.table_path(name, flag)


@dataclass
class Data:
    """Batches to train on, the pairs they come from (None for shards), the pairs held out (None without any), what of
    the data cannot be used, and what there is."""

    batches: Batches | shards.ShardBatches
    train: ImageTextPairs | None
    held_out: ImageTextPairs | None
    faults: Faults = field(default_factory=Faults)
    found: Found = field(default_factory=lambda: Found(""))


def load(
    config: DataConfig, tokenize: Tokenize, *, batch_size: int, seed: int, workers: int, share: Share = ALONE
) -> Data:
    """The data that a configuration names, split into what is trained on and what is held out."""
    size, faults, found = config.image_size, config.faults(config.data, config.held_out_data), Found(place(config.data))
    if _is_shards(config.data):
        held_out, marks = _read_held_out(config, faults, found)
        stream = shards.ShardBatches(
            config.data, tokenize, size=size, batch_size=batch_size, seed=seed, workers=workers,
            augment=config.augment, epoch_pairs=config.epoch_pairs, held_out=marks, share=share, faults=faults,
            background=parse_colour(config.background), encoding=config.encoding,
        )  # fmt: skip
        found.holds = {"shards": len(stream.names), "pairs an epoch": stream.epoch_pairs}
        found.tell_of_several_captions(stream.several)
        splits.tell_of_leaks(stream.leaking, stream.epoch_pairs, len(held_out or ()), found)
        found.check("--data", allow=config.allow_suspicious)
        found.uses = {"held out": len(held_out or ())}
        _try_some(None, held_out, faults)
        return Data(stream, None, held_out, faults, found)
    if config.data == "openmoji":
        if config.held_out_data:
            raise UserError("--held-out-data: openmoji brings its own held-out pairs")
        # Half as large again as the model sees: rotating and scaling then costs no sharpness.
        pairs = openmoji.load(size * 3 // 2, size)
        found.holds = {"pairs": len(pairs)}
        train, held_out = openmoji.hold_out(pairs, config.split_seed)
        if config.evaluate_on == "validation":
            train, held_out = openmoji.hold_out(train, config.split_seed + 1)
    else:
        train, held_out = _read_tables(config, faults, found)
    found.uses = {"training pairs": len(train), "held out": len(held_out)}
    found.check_size(len(train), "training pairs", batch_size, faults)
    _try_some(train, held_out, faults)
    batches = Batches(
        train, tokenize, size=size, batch_size=batch_size, seed=seed,
        augment=config.augment, label_captions=config.label_captions, workers=workers, share=share,
        faults=faults,
    )  # fmt: skip
    return Data(batches, train, held_out if held_out else None, faults, found)


def _try_some(train: ImageTextPairs | None, held_out: ImageTextPairs | None, faults: Faults) -> None:
    """Read some of the files before anything that takes long."""
    for pairs, use in ((train, TRAINING), (held_out, EVALUATION)):
        if pairs is not None and isinstance(pairs.images, list):
            try_some(pairs.images, faults, use)


def _is_shards(name: str) -> bool:
    return shard_names.is_shards(name)


def _read_tables(config: DataConfig, faults: Faults, found: Found) -> tuple[ImageTextPairs, ImageTextPairs]:
    """The pairs of a table to train on and to evaluate with."""
    pairs = _read_table(config, "--data", faults, found)
    splits.suspect(pairs, found)
    if config.held_out_data:
        given, marks = _read_held_out(config, faults, found, by_class=splits.has_class_names(pairs))
        assert given is not None
        train, held_out = splits.without(pairs, marks, found), given
    else:
        train, held_out = splits.split(pairs, config.held_out, config.split_seed, found)
    found.check("--data", allow=config.allow_suspicious)
    if config.evaluate_on == "validation":
        train, held_out = splits.split(train, max(config.held_out, 0.1), config.split_seed + 1, found)
    return train, held_out


def _read_table(config: DataConfig, flag: str, faults: Faults, found: Found) -> ImageTextPairs:
    name, of = (config.data, TRAINING) if flag == "--data" else (config.held_out_data, EVALUATION)
    pairs = files.read_table(
        files.table_path(name, flag), config.image_column, config.caption_column, flag, encoding=config.encoding,
        faults=faults, of=of, found=found,
    )  # fmt: skip
    return replace(pairs, background=parse_colour(config.background))


def _read_held_out(
    config: DataConfig, faults: Faults, found: Found, by_class: bool | None = None
) -> tuple[ImageTextPairs | None, Fingerprints]:
    """The pairs of --held-out-data, and what marks them; `by_class` is whether their captions are names of classes."""
    if not config.held_out_data:
        return None, Fingerprints()
    found.held_out = Found(place(config.held_out_data))
    if _is_shards(config.held_out_data):
        background = parse_colour(config.background)
        pairs, marks = shard_pairs.read_all(
            config.held_out_data, config.image_size, faults=faults, background=background, encoding=config.encoding
        )  # fmt: skip
        found.held_out.holds = {"pairs": len(pairs)}
        return pairs, marks
    pairs = _read_table(config, "--held-out-data", faults, found.held_out)
    by_class = splits.has_class_names(pairs) if by_class is None else by_class
    return splits.gallery(pairs, by_class=by_class), splits.fingerprints(pairs, by_class=by_class)
