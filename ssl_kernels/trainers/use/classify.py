"""`ssl-kernels classify RUN PHOTOS --labels labels.txt`: which of some labels fits each image, without any training.

A label is put into templates, such as "a picture of {}", whose embeddings are averaged (Radford 2021, arXiv
2103.00020). A fine-tuned run has classes of its own and takes no labels.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from tyro.conf import Positional

from ssl_kernels.trainers.checkpoints import write_atomically
from ssl_kernels.trainers.data.pairs import TEMPLATES
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation.image_text import zero_shot
from ssl_kernels.trainers.use import command
from ssl_kernels.trainers.use.command import ReadConfig
from ssl_kernels.trainers.use.embedding import Vectors, all_images
from ssl_kernels.trainers.use.items import Items, images_of
from ssl_kernels.trainers.use.loading import device_of, load_run
from ssl_kernels.trainers.use.trained import Trained

_SHOWN = 20  # lines


@dataclass(kw_only=True)
class ClassifyConfig(ReadConfig):
    """Say which of some labels fits each image. Where the images lie in folders with the labels' names, say how often
    that is right."""

    data: Positional[str]
    """The images: a folder, a .txt list of files, a table, shards, `openmoji` or `mnist`."""
    labels: Path | None = None
    """A text file with a label on each line. A fine-tuned run needs none, because it has classes."""
    templates: tuple[str, ...] = TEMPLATES
    """Texts that a label is put into, in the place of {}; their embeddings are averaged."""
    out: Path | None = None
    """Table to write, .csv: a line to each image, with the probability of every label."""

    def check(self) -> None:
        super().check()
        bad = [text for text in self.templates if text.count("{}") != 1 or {*"{}"} & {*text.replace("{}", "")}]
        if bad or not self.templates:
            raise UserError(
                f"--templates: expected texts with one {{}} for the label, got {bad[0] if bad else 'none'!r}"
            )
        if self.out is not None and self.out.suffix != ".csv":
            raise UserError(f"--out: expected a .csv file, got {self.out}")


def labels_of(path: Path | None, model: Trained) -> list[str]:
    """The labels of a file, or the classes of a fine-tuned run."""
    if path is None:
        if model.classes:
            return model.classes
        raise UserError(f"--labels: expected a text file of labels, for {model.name} has no classes of its own")
    if model.classes:
        raise UserError(f"--labels: {model.name} has classes of its own; leave it out")
    try:
        labels = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels: cannot read {path}: {error}") from None
    twice = [label for label, n in Counter(labels).items() if n > 1]
    if len(labels) < 2 or twice:
        raise UserError(
            f"--labels: expected two labels or more, each once, got {twice[0] + ' twice' if twice else labels}"
        )
    return labels


def probabilities(
    model: Trained, items: Items, labels: Sequence[str], options: ClassifyConfig, console: Console
) -> tuple[Vectors, Tensor]:
    """Of every image that can be read, the probability [N, C] of each label."""
    if model.classes:
        found = all_images(model, items, model.classify, options, console, "classifying")
        return found, found.vectors
    model.tokenize("")  # or say that there is no text tower, before images are read
    found = all_images(model, items, model.encode_image, options, console, "embedding")
    return found, model.probabilities(zero_shot(found.vectors, model.encode_text, labels, options.templates))


def accuracy(items: Items, kept: Tensor, guess: Tensor, labels: Sequence[str]) -> tuple[float, float, int] | None:
    """How often the guess is the folder's name, always the largest class, and of how many; None without labels."""
    if items.labels is None or not set(items.classes) <= set(labels):
        return None
    place = torch.tensor([list(labels).index(name) for name in items.classes])
    known = items.labels[kept] >= 0
    truth, guess = place[items.labels[kept][known]], guess[known]
    majority = float((truth == truth.mode().values).float().mean())
    return float((truth == guess).float().mean()), majority, len(truth)


def work(options: ClassifyConfig, console: Console) -> None:
    model = load_run(options.run, device_of(options.device))
    labels = labels_of(options.labels, model)
    items = images_of(options.data, model.size, options)
    items.tell(console)
    found, chances = probabilities(model, items, labels, options, console)
    best, guess = chances.max(1)
    for name, label, chance in list(zip(found.names, guess.tolist(), best.tolist(), strict=True))[:_SHOWN]:
        console.print(f"{chance:.3f}  {labels[label]}  {name}", highlight=False, markup=False, soft_wrap=True)
    if len(guess) > _SHOWN:
        console.print(f"and {len(guess) - _SHOWN} more; --out writes all of them", highlight=False)
    counts = Counter(labels[label] for label in guess.tolist()).most_common()
    console.print(
        "images:", ", ".join(f"{n} {label}" for label, n in counts), highlight=False, markup=False, soft_wrap=True
    )
    figures = accuracy(items, found.kept, guess, labels)
    if figures is not None:
        right, majority, n = figures
        console.print(
            f"accuracy {right:.3f} of {n} images in labelled folders; always the largest class {majority:.3f}"
        )
    if options.out is not None:
        _write(options.out, found.names, labels, guess, chances)
        console.print(f"written: {options.out}", highlight=False, markup=False, soft_wrap=True)


def _write(path: Path, names: Sequence[str], labels: Sequence[str], guess: Tensor, chances: Tensor) -> None:
    def save(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["path", "label", *labels])
            for name, label, row in zip(names, guess.tolist(), chances.tolist(), strict=True):
                table.writerow([name, labels[label], *(f"{chance:.6f}" for chance in row)])

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save)


def main(argv: Sequence[str] | None = None, prog: str = "ssl-kernels classify") -> int:
    return command.run(ClassifyConfig, work, argv, prog)
