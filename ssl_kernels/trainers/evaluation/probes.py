"""What features are worth without training them further: nearest neighbours, a linear probe, instance retrieval.

Every figure stands beside what it takes no self-supervision to reach: the same net at its initialisation, raw pixels,
and raw pixels with a gallery that holds distorted copies of its images as well. The last knows the same
augmentation as the trained net, so what it reaches is owed to knowing the augmentation, not to learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from ssl_kernels.ops.unit_rows import unit_rows
from ssl_kernels.trainers.data.faults import Faults
from ssl_kernels.trainers.data.images import image_seeds, open_image, resize
from ssl_kernels.trainers.data.views import Images, PhotoView, View
from ssl_kernels.trainers.evaluation import report
from ssl_kernels.trainers.evaluation.progress import Stages
from ssl_kernels.trainers.loop import Result

Encode = Callable[[Tensor], Tensor]  # uint8 images [n, 3, S, S] to features [n, D]

LABELLED, DRAWS, COPIES = 10, 10, 10  # labels a class; random choices of them; distorted copies in a gallery
_SPACES, STAGES = ("trained net", "untrained net", "raw pixels", "raw pixels and copies"), 3  # in each of them
_BATCH, _FILES = 256, 25  # images in memory, and in files, of a stage
_RAW_SIZE, _MOST_TRAIN, _MOST_HELD_OUT = 32, 5000, 1000  # pixels a side, and images, of the largest comparison
_CAPTION = (
    "initial: the same net before training; raw: centred pixels; raw + aug: with distorted copies in the gallery too;"
    " chance: always the largest class, or any image"
)
_WATCHED = (
    ("embedding_std", "1: spread evenly, 0: collapsed"),
    ("embedding_rank", "directions in use"),
    ("teacher_entropy_share", "of ln K, of an image; 1: teaches nothing, 0: one-hot"),
    ("marginal_entropy_share", "of ln K, of the batch's mean; 0: all images alike"),
    ("center_norm", "of the teacher's centre"),
    ("kl", "from the teacher to the student"),
)


def nearest_classes(
    queries: Tensor, gallery: Tensor, labels: Tensor, k: int, temperature: float | None = None
) -> Tensor:
    """The class [n] that the k nearest of the gallery vote for; rows are compared by their cosine.

    Without `temperature` each has one vote, and of classes with as many the one whose voters are nearer wins; with it
    a neighbour of similarity s votes with exp(s / temperature), as in Wu 2018, arXiv 1805.01978.
    """
    return vote(cosines(queries, gallery), labels, k, temperature)


def cosines(queries: Tensor, gallery: Tensor) -> Tensor:
    """The cosine [n, N] of each query [n, D] and each of the gallery [N, D]."""
    return unit_rows(queries) @ unit_rows(gallery).T


def vote(similarity: Tensor, labels: Tensor, k: int, temperature: float | None = None) -> Tensor:
    """`nearest_classes` of queries whose cosines [n, N] with the gallery are known."""
    nearest, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
    # k cosines lie between -k and k: divided by 3 k they decide between equal votes, and never against one vote more.
    weight = 1 + nearest / (3 * k) if temperature is None else ((nearest - 1) / temperature).exp()
    votes = similarity.new_zeros(len(similarity), int(labels.max()) + 1)
    return votes.scatter_add_(1, labels[index], weight.to(votes.dtype)).argmax(1)


def linear_probe(
    queries: Tensor, gallery: Tensor, labels: Tensor, weight_decay: float = 1e-4, iterations: int = 100
) -> Tensor:
    """The class [n] that multinomial logistic regression on the standardised features predicts."""
    std, mean = torch.std_mean(gallery, 0)
    queries, gallery = ((x - mean) / std.clamp(min=1e-3 * float(std.max()) + 1e-12) for x in (queries, gallery))
    weight = gallery.new_zeros(int(labels.max()) + 1, gallery.shape[1], requires_grad=True)
    bias = gallery.new_zeros(len(weight), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(gallery, weight, bias), labels) + weight_decay * weight.square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(queries, weight, bias).argmax(1).detach()


def instance_recall(queries: Tensor, gallery: Tensor, copies: int = 1) -> float:
    """How often the nearest of the gallery, by cosine, is the query's own image; row i of `copies` x [n, D] shows
    image i modulo n. Ties are broken at random, and the expected value is returned."""
    n = len(queries)
    similarity = unit_rows(queries) @ unit_rows(gallery).T
    best = similarity.view(n, copies, n).amax(1)  # of every image's copies
    right = best.diagonal()[:, None]
    ahead, tied = (best > right).any(1), (best == right).sum(1)
    return float((~ahead / tied.clamp(min=1) * (tied > 0)).mean())  # NaN equals nothing, itself included


@torch.no_grad()
def spread(z: Tensor) -> dict[str, Tensor]:
    """How far embeddings [B, D] are from having collapsed, as metrics to log.

    `embedding_std`: the standard deviation of the normalised embeddings times sqrt(D); 1 where they fill the sphere
    evenly, 0 where all are equal. `embedding_rank`: their effective rank, the exponential of the entropy of the centred
    singular values (Roy & Vetterli 2007; as RankMe, Garrido 2022, arXiv 2210.02885); at most min(B - 1, D).
    """
    z = unit_rows(z.float())
    centred = z - z.mean(0)
    std = centred.square().mean().sqrt() * z.shape[1] ** 0.5
    if not bool(torch.isfinite(std)):  # the loop reports it; an SVD would only raise
        return {"embedding_std": std, "embedding_rank": std}
    # A collapsed batch has rounding errors for singular values: they are no directions.
    values = torch.linalg.svdvals(centred) if len(z) > 1 else z.new_zeros(1)
    values = values * (values > 1e-5)
    shares = values / values.sum().clamp(min=1e-12)
    return {"embedding_std": std, "embedding_rank": torch.special.entr(shares).sum().exp() * (values.sum() > 0)}


@dataclass
class FeatureFigure:
    """One line of the closing table; the baselines are those of the module's docstring."""

    name: str
    model: float
    initial: float
    raw: float
    raw_augmented: float | None
    chance: float
    note: str = ""


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


def print_table(console: Console, title: str, result: Result, figures: Sequence[FeatureFigure], total_s: float) -> None:
    """What the run reached, each figure beside its baselines."""
    columns = ("model", "initial", "raw", "raw + aug", "chance")
    rows = [
        (figure.name, ["" if score is None else f"{score:.3f}" for score in
                       (figure.model, figure.initial, figure.raw, figure.raw_augmented, figure.chance)], figure.note)
        for figure in figures
    ]  # fmt: skip
    training: list[report.Row] = []
    if result.records:
        first, last = result.records[0], result.records[-1]
        training.append(("training loss", [f"{last['loss']:.3f}", f"{first['loss']:.3f}"], "last, first step"))
        for name, note in _WATCHED:
            if name in last:
                training.append((name.replace("_", " "), [f"{last[name]:.3g}", f"{first[name]:.3g}"], note))
    report.closing_table(console, title, _CAPTION, columns, rows, training, result, total_s)
