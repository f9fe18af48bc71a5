"""Nearest neighbours, the linear probe, instance retrieval, the measures of collapse, and the report card."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from ssl_kernels.trainers.data.image_sets import Images
from ssl_kernels.trainers.data.views import DrawingView
from ssl_kernels.trainers.evaluation import classifiers, probes
from ssl_kernels.trainers.evaluation.figures import print_features
from ssl_kernels.trainers.spread import spread
from ssl_kernels.trainers.training import Result

VIEW = DrawingView(degrees=10, scale=1.1, shift=0.05, shear=0.05)


def by_hand(query: Tensor, gallery: Tensor, labels: Tensor, k: int, temperature: float | None) -> int:
    """The vote for one query, in float64 and one neighbour at a time."""
    cosines = [float(query @ row / query.norm() / row.norm()) for row in gallery]
    nearest = sorted(range(len(gallery)), key=lambda i: -cosines[i])[:k]
    votes, closeness = dict.fromkeys(labels.tolist(), 0.0), dict.fromkeys(labels.tolist(), 0.0)
    for i in nearest:
        votes[int(labels[i])] += 1 if temperature is None else math.exp(cosines[i] / temperature)
        closeness[int(labels[i])] += cosines[i]
    return max(votes, key=lambda c: (votes[c], closeness[c]))


@given(
    seed=st.integers(0, 99), n=st.integers(1, 30), k=st.integers(1, 12), temperature=st.sampled_from([None, 0.07, 0.5])
)
def test_neighbours_vote_as_they_do_by_hand(seed: int, n: int, k: int, temperature: float | None) -> None:
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = (torch.randn(rows, 4, generator=generator).double() for rows in (7, n))
    labels = torch.randint(0, 3, (n,), generator=generator)
    guess = classifiers.nearest_classes(queries, gallery, labels, k, temperature)
    assert guess.tolist() == [by_hand(query, gallery, labels, k, temperature) for query in queries]


def test_one_more_vote_beats_any_closeness() -> None:
    gallery = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.1], [-1.0, 0.1], [-1.0, 0.1]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    query = torch.tensor([[1.0, 0.0]])
    assert classifiers.nearest_classes(query, gallery, labels, 5).item() == 1
    assert classifiers.nearest_classes(query, gallery, labels, 4).item() == 0
    assert classifiers.nearest_classes(query, gallery, labels, 5, temperature=0.07).item() == 0


def test_the_linear_probe_is_logistic_regression() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    centres = torch.randn(3, 5, generator=generator)
    x = centres[labels] + torch.randn(300, 5, generator=generator)
    x = torch.cat([100 * x, torch.ones(300, 1)], 1)  # any units, and a feature that never changes
    std, mean = torch.std_mean(x[:200, :5], 0)
    standard = (x[:, :5] - mean) / std
    for weight_decay in (1e-3, 1.0):  # sklearn sums the loss over samples and has C on it
        peer = LogisticRegression(C=1 / (200 * weight_decay), tol=1e-6, max_iter=1000)
        expected = peer.fit(standard[:200].numpy(), labels[:200].numpy()).predict(standard[200:].numpy())
        ours = classifiers.linear_probe(x[200:], x[:200], labels[:200], weight_decay)
        assert (ours.numpy() == expected).all()
        assert 0.6 < (ours == labels[200:]).float().mean() < 1


def test_instance_recall() -> None:
    eye = torch.eye(5)
    assert classifiers.instance_recall(eye, eye) == 1
    assert classifiers.instance_recall(eye, eye.flip(0)) == pytest.approx(0.2)  # the middle one is its own mirror image
    assert classifiers.instance_recall(torch.ones(5, 3), torch.ones(5, 3)) == pytest.approx(0.2)
    assert classifiers.instance_recall(eye, eye * torch.nan) == 0
    # A second copy of the gallery finds what the first does not; all of an image's copies count as that image.
    assert classifiers.instance_recall(eye, torch.cat([eye.flip(0), eye]), copies=2) == pytest.approx(3 / 5)
    assert classifiers.instance_recall(eye, torch.cat([0 * eye, eye]), copies=2) == 1


def test_spread_tells_full_from_collapsed() -> None:
    torch.manual_seed(0)
    full = spread(torch.randn(4096, 16))
    assert full["embedding_std"].item() == pytest.approx(1, abs=0.01)
    assert full["embedding_rank"].item() == pytest.approx(16, abs=0.1)
    plane = spread(torch.randn(4096, 2) @ torch.eye(2, 16))
    assert plane["embedding_rank"].item() == pytest.approx(2, abs=0.01)
    for collapsed in (torch.ones(64, 16), torch.randn(1, 16).expand(64, 16), torch.randn(1, 16)):
        metrics = spread(collapsed)
        assert metrics["embedding_std"].item() < 1e-4
        assert metrics["embedding_rank"].item() == 0
    near = spread(torch.ones(64, 16) + 1e-2 * torch.randn(64, 16))
    assert 0 < near["embedding_std"].item() < 0.05


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 20))
def test_spread_is_that_of_the_normalised_embeddings(scale: float, seed: int) -> None:
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed))
    centred = F.normalize(z.double(), dim=1) - F.normalize(z.double(), dim=1).mean(0)
    values = torch.linalg.svdvals(centred)
    shares = values / values.sum()
    metrics = spread(scale * z)
    assert metrics["embedding_rank"].item() == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-4)
    assert metrics["embedding_std"].item() == pytest.approx(math.sqrt(5 * float(centred.square().mean())), rel=1e-5)


def test_spread_passes_on_what_is_not_finite() -> None:
    assert all(bool(value.isnan()) for value in spread(torch.full((4, 3), torch.nan)).values())


def stripes(n: int, seed: int, labelled: bool = True) -> Images:
    """Class c of four: a bar whose place tells the class, under noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    pixels = rng.integers(0, 60, (n, 3, 16, 16))
    for row, label in enumerate(labels):
        pixels[row, :, 4 * label : 4 * label + 3, 2:14] += 150
    return Images(torch.from_numpy(pixels.astype(np.uint8)), torch.from_numpy(labels) if labelled else None)


def know(images: Tensor) -> Tensor:
    """Features that tell the class, whatever the noise: how bright each of four bands is."""
    return images.float().view(len(images), 3, 4, 4, 16).mean((1, 3, 4)).softmax(1)


def ignore(images: Tensor) -> Tensor:
    return torch.ones(len(images), 4)


def test_labelled_images_are_classified() -> None:
    def card(seed: int) -> list[probes.FeatureFigure]:
        return probes.report_card(know, ignore, stripes(120, 0), stripes(60, 1), VIEW, 16, seed)

    figures = card(0)
    names = [figure.name for figure in figures]
    assert names == [
        "10 labels a class, 1-NN", "distorted query, 5-NN", "clean query, 5-NN", "clean query, weighted 20-NN",
        "clean query, linear probe",
    ]  # fmt: skip
    for figure in figures:
        assert figure.model > 0.95, figure
        assert figure.initial == pytest.approx(0.25, abs=0.1), figure  # features that say nothing
        assert figure.chance == 0.25
        assert 0.25 < figure.raw <= 1


def test_a_gallery_with_distorted_copies_helps_raw_pixels_with_distorted_queries() -> None:
    strong = DrawingView(degrees=40, scale=1.3, shift=0.15, shear=0.3)

    def distorted(seed: int) -> probes.FeatureFigure:
        card = probes.report_card(know, ignore, stripes(120, 0), stripes(100, 1), strong, 16, seed)
        return next(figure for figure in card if figure.name.startswith("distorted"))

    figure = distorted(0)
    assert figure.raw_augmented > figure.raw + 0.05
    assert figure == distorted(0)
    assert figure != distorted(1)


def test_unlabelled_images_are_retrieved() -> None:
    held_out = stripes(32, 1, labelled=False)
    (figure,) = probes.report_card(
        lambda images: images.flatten(1).float(), ignore, stripes(64, 0, labelled=False), held_out,
        DrawingView(degrees=0, scale=1, shift=0, shear=0, brightness=0.1), 16, 0,
    )  # fmt: skip
    assert figure.name == "instance retrieval R@1"
    assert figure.model == figure.raw == figure.raw_augmented == 1
    assert figure.initial == pytest.approx(figure.chance) == 1 / 32


def test_without_held_out_images_there_is_nothing_to_report() -> None:
    assert probes.report_card(know, ignore, stripes(8, 0), stripes(8, 1).select([]), VIEW, 16, 0) == []


def test_the_table_has_every_figure_beside_its_baselines() -> None:
    console = Console(width=150, record=True, quiet=False)
    first = {"step": 1, "loss": 4.5, "embedding_std": 0.25, "embedding_rank": 3.0}
    last = {"step": 9, "loss": 1.25, "embedding_std": 0.875, "embedding_rank": 40.0}
    figure = probes.FeatureFigure("clean query, 5-NN", 0.911, 0.822, 0.733, 0.744, 0.155, "a note")
    print_features(console, "MoCo on mnist, seed 7", Result([first, last], 9, 3.0, 100.0), [figure], 5.0)
    text = console.export_text()
    for phrase in ("seed 7", "0.911", "0.822", "0.733", "0.744", "0.155", "a note", "1.250", "4.500", "0.875", "40",
                   "collapsed", "raw + aug", "3 / 5"):  # fmt: skip
        assert phrase in text, phrase
