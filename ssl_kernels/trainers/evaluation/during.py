"""A figure or two while training, for --eval-every: the first is the score by which the best checkpoint is chosen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ssl_kernels.trainers.data.pairs import ImageTextPairs
from ssl_kernels.trainers.data.views import Images, View
from ssl_kernels.trainers.evaluation.image_text import Embedder, recall
from ssl_kernels.trainers.evaluation.probes import Encode, instance_recall, nearest_classes

MOST_TRAIN, MOST_HELD_OUT = 5000, 1000  # images
_BATCH = 256


def of_features(encode: Encode, train: Images, held_out: Images, view: View, size: int, seed: int) -> dict[str, float]:
    """The accuracy of the 20 nearest of the training images on held-out images, weighted as in the closing table; or
    without labels, how often a distorted view of a held-out image finds it among them. Every time the same images are
    asked for, which are drawn from `seed`."""
    rng = np.random.default_rng((seed, 3))
    train, held_out = (
        part.select(np.sort(rng.permutation(len(part))[:most]).tolist())
        for part, most in ((train, MOST_TRAIN), (held_out, MOST_HELD_OUT))
    )

    def features(n: int, load: Callable[[range], Tensor]) -> Tensor:
        return torch.cat([encode(load(range(start, min(start + _BATCH, n)))) for start in range(0, n, _BATCH)])

    clean = features(len(held_out), lambda part: held_out.load(part, size))
    if train.labels is None or held_out.labels is None:
        distorted = features(len(held_out), lambda part: view(held_out, part, size, rng))
        return {"instance_r1": instance_recall(distorted, clean)}
    gallery = features(len(train), lambda part: train.load(part, size))
    guess = nearest_classes(clean, gallery, train.labels, 20, 0.07)
    return {"knn_accuracy": float((guess == held_out.labels).float().mean())}


def of_pairs(embedder: Embedder, held_out: ImageTextPairs) -> dict[str, float]:
    """R@1 of held-out captions and images: the mean of both ways, and each."""
    images, texts = embedder.images(held_out), embedder.texts(held_out.captions)
    found_images, found_texts = recall(texts @ images.T, 1), recall(images @ texts.T, 1)
    mean = (found_images + found_texts) / 2
    return {"retrieval_r1": mean, "text_to_image_r1": found_images, "image_to_text_r1": found_texts}
