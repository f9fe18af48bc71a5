"""What features are worth without training them further: nearest neighbours, a linear probe, instance retrieval.

Every figure stands beside what it takes no self-supervision to reach: the same net at its initialisation, raw pixels,
and raw pixels with a gallery that holds distorted copies of its images as well. The last knows the same
augmentation as the trained net, so what it reaches is owed to knowing the augmentation, not to learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ssl_kernels.trainers.data.faults import Faults
from ssl_kernels.trainers.data.image_sets import Images
from ssl_kernels.trainers.data.images import image_seeds, open_image, resize
from ssl_kernels.trainers.data.views import PhotoView, View
from ssl_kernels.trainers.evaluation.classifiers import cosines, instance_recall, linear_probe, nearest_classes, vote
from ssl_kernels.trainers.evaluation.figures import FeatureFigure
from ssl_kernels.trainers.evaluation.progress import Stages

Encode = Callable[[Tensor], Tensor]  # uint8 images [n, 3, S, S] to features [n, D]

LABELLED, DRAWS, COPIES = 10, 10, 10  # labels a class; random choices of them; distorted copies in a gallery
_SPACES, STAGES = ("trained net", "untrained net", "raw pixels", "raw pixels and copies"), 3  # in each of them
_BATCH, _FILES = 256, 25  # images in memory, and in files, of a stage
_RAW_SIZE, _MOST_TRAIN, _MOST_HELD_OUT = 32, 5000, 1000  # pixels a side, and images, of the largest comparison


@dataclass
class Space:
    """One way to turn images into features, and the features of what is compared."""

    gallery: Tensor
    clean: Tensor
    distorted: Tensor = field(default_factory=lambda: torch.empty(0))  # or none
    copies: int = 1  # of every image in the gallery, one set after the other


def report_card(
    model: Encode, initial: Encode, train: Images, held_out: Images, view: View, size: int, seed: int,
    faults: Faults | None = None, stages: Stages | None = None,
) -> list[FeatureFigure]:  # fmt: skip
    """Classification of held-out images by training images, where there are labels; else instance retrieval.

    What is random, the distortion of queries and gallery and the choice of the labelled, is drawn from `seed`. At most
    5,000 training and 1,000 held-out images are used, and raw pixels are compared at 32 pixels a side or less. Of these
    images, those that cannot be read are left out, and `faults` is told of them. `stages` is told how far it has come.
    """
    rng, faults = np.random.default_rng((seed, 1)), Faults() if faults is None else faults
    stages = stages or Stages()
    train, held_out = (
        part.select(np.sort(rng.permutation(len(part))[:most]).tolist()).readable(faults)
        for part, most in ((train.labelled(), _MOST_TRAIN), (held_out.labelled(), _MOST_HELD_OUT))
    )
    if len(held_out) == 0:
        return []
    gallery = held_out if held_out.labels is None else train  # an image is retrieved among those held out
    pixels = _pixels(min(size, _RAW_SIZE), grey=_is_grey(held_out.load(range(min(64, len(held_out))), size)))

    every = (model, initial, pixels)
    batches = -(-len(gallery) // _BATCH), -(-len(held_out) // _BATCH)
    copied = -(-len(gallery) // _FILES) if isinstance(view, PhotoView) else COPIES * batches[0]
    compared = len(_SPACES) * (1 if held_out.labels is None else STAGES)
    stages.plan(batches[0] + 2 * batches[1] + copied + compared)

    def encode(what: str, images: Images, load: Callable[[range], Tensor], *encoders: Encode) -> list[Tensor]:
        return _encode(len(images), load, *encoders, stages=stages, what=what)

    galleries = encode("features", gallery, lambda part: gallery.load(part, size), *every)
    clean = encode("features of held-out images", held_out, lambda part: held_out.load(part, size), *every)
    distorted = encode("features of distorted images", held_out, lambda part: view(held_out, part, size, rng), *every)
    if isinstance(view, PhotoView):
        copies = _copies_of_files(view, gallery, size, rng, pixels, stages)
    else:
        copies = [
            encode("distorted copies", gallery, lambda part: view(gallery, part, size, rng), pixels)[0]
            for _ in range(COPIES)
        ]

    spaces = [Space(*features) for features in zip(galleries, clean, distorted, strict=True)]
    raw = spaces[-1]
    spaces.append(Space(torch.cat([raw.gallery, *copies]), raw.clean, raw.distorted, 1 + COPIES))
    for space in spaces[-2:]:  # most of what pixels share is the ground
        mean = space.gallery.mean(0)
        space.gallery, space.clean, space.distorted = (x - mean for x in (space.gallery, space.clean, space.distorted))
    if gallery.labels is None or held_out.labels is None:
        scores = [_retrieve(space, name, stages) for space, name in zip(spaces, _SPACES, strict=True)]
        note = f"a distorted view of each of {len(held_out)} held-out images finds it among them"
        return [_figure("instance retrieval R@1", scores, 1 / len(held_out), note)]
    return classification(spaces, gallery.labels, held_out.labels, np.random.default_rng((seed, 2)), stages)


def _copies_of_files(
    view: PhotoView, images: Images, size: int, rng: np.random.Generator, pixels: Encode, stages: Stages
) -> list[Tensor]:
    """Distorted copies of photographs as raw pixels, each copy [n, D]; a file is opened once for all of its copies."""
    assert isinstance(images.images, list)
    seeds = [image_seeds(rng, len(images)) for _ in range(COPIES)]
    rows = []
    for number, path in enumerate(images.images):
        if number % _FILES == 0:
            stages.begin("distorted copies")
        picture = open_image(path, images.background)
        rows.append(pixels(torch.stack([view.show(picture, size, own[number]) for own in seeds])))
    return list(torch.stack(rows, 1))


def _retrieve(space: Space, name: str, stages: Stages) -> float:
    stages.begin(f"retrieval by {name}")
    return instance_recall(space.distorted, space.gallery, space.copies)


def classification(
    spaces: list[Space], labels: Tensor, truth: Tensor, rng: np.random.Generator, stages: Stages
) -> list[FeatureFigure]:
    """How well the labels of the galleries tell the classes `truth` of the queries, in each of the spaces."""
    draws = []
    for _ in range(DRAWS):  # one choice of the labelled images is worth several points more than another
        shuffled = torch.from_numpy(rng.permutation(len(labels)))
        draws.append(torch.cat([shuffled[labels[shuffled] == c][:LABELLED] for c in labels.unique()]))

    def accuracy(guess: Tensor) -> float:
        return float((guess == truth).float().mean())

    def of_few(space: Space, chosen: Tensor) -> float:
        rows = torch.cat([chosen + copy * len(labels) for copy in range(space.copies)])
        voters = labels[chosen].repeat(space.copies)
        return accuracy(nearest_classes(space.clean, space.gallery[rows], voters, 1))

    def scores(space: Space, name: str) -> list[float]:
        voters = labels.repeat(space.copies)
        stages.begin(f"{LABELLED} labels a class, {name}")
        found = [float(np.mean([of_few(space, chosen) for chosen in draws]))]
        stages.begin(f"nearest neighbours, {name}")
        if len(space.distorted):
            found.append(accuracy(nearest_classes(space.distorted, space.gallery, voters, 5)))
        similarity = cosines(space.clean, space.gallery)
        found += [accuracy(vote(similarity, voters, 5)), accuracy(vote(similarity, voters, 20, 0.07))]
        stages.begin(f"linear probe, {name}")
        return [*found, accuracy(linear_probe(space.clean, space.gallery, voters))]

    majority = float((truth == labels.mode().values).float().mean())
    rows = [
        (f"{LABELLED} labels a class, 1-NN", f"mean of {DRAWS} draws of the labelled images"),
        ("distorted query, 5-NN", "much of the gain is the augmentation's"),
        ("clean query, 5-NN", f"{len(labels)} labelled, {len(truth)} held out"),
        ("clean query, weighted 20-NN", "temperature 0.07"),
        ("clean query, linear probe", "logistic regression"),
    ]
    if not len(spaces[0].distorted):
        del rows[1]
    columns = zip(*(scores(space, name) for space, name in zip(spaces, _SPACES, strict=False)), strict=True)
    return [_figure(name, column, majority, note) for (name, note), column in zip(rows, columns, strict=True)]


def _figure(name: str, scores: Iterable[float], chance: float, note: str) -> FeatureFigure:
    model, initial, raw, *others = scores
    return FeatureFigure(name, model, initial, raw, others[0] if others else None, chance, note)


def _encode(
    n: int, load: Callable[[range], Tensor], *encoders: Encode, stages: Stages, what: str
) -> list[Tensor]:  # fmt: skip
    """Features [n, D] of the same images by each of the encoders."""
    parts = []
    for start in range(0, n, _BATCH):
        stages.begin(what)
        images = load(range(start, min(start + _BATCH, n)))
        parts.append([encode(images) for encode in encoders])
    return [torch.cat(features) for features in zip(*parts, strict=True)]


def _is_grey(images: Tensor) -> bool:
    return bool((images == images[:, :1]).all())


def _pixels(size: int, *, grey: bool) -> Encode:
    return lambda images: resize(images[:, :1] if grey else images, size).flatten(1).float() / 255
