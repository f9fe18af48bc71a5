"""A figure or two while training, for --eval-every: the first is the score by which the best checkpoint is chosen."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ssl_kernels.trainers.data.faults import Faults
from ssl_kernels.trainers.data.image_sets import Images
from ssl_kernels.trainers.data.pairs import ImageTextPairs
from ssl_kernels.trainers.data.views import View
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation.classifiers import instance_recall, nearest_classes
from ssl_kernels.trainers.evaluation.embedder import Embedder
from ssl_kernels.trainers.evaluation.image_text import recall
from ssl_kernels.trainers.evaluation.probes import Encode

MOST_TRAIN, MOST_HELD_OUT = 5000, 1000  # images
_BATCH = 256


def of_features(
    encode: Encode, train: Images, held_out: Images, view: View, size: int, seed: int, faults: Faults
) -> dict[str, float]:
    """The accuracy of the 20 nearest of the training images on held-out images, weighted as in the closing table; or
    without labels, how often a distorted view of a held-out image finds it among them. Every time the same images are
    asked for, which are drawn from `seed`; `faults` is told of those that cannot be read."""
    rng = np.random.default_rng((seed, 3))
    train, held_out = (
        part.select(np.sort(rng.permutation(len(part))[:most]).tolist())
        for part, most in ((train, MOST_TRAIN), (held_out, MOST_HELD_OUT))
    )

    def features(images: Images) -> tuple[Tensor, Images]:
        """Of those that can be read."""
        parts, kept = [], list[int]()
        for start in range(0, len(images), _BATCH):
            shown, own = images.load_readable(range(start, min(start + _BATCH, len(images))), size, faults)
            parts += [encode(shown)] if own else []
            kept += own
        return torch.cat(parts) if parts else torch.empty(0, 1), images.select(kept)

    clean, held_out = features(held_out)
    if not len(held_out):
        raise UserError("--eval-every: none of the held-out images can be read")
    if train.labels is None or held_out.labels is None:
        places = range(0, len(held_out), _BATCH)
        views = (view(held_out, range(start, min(start + _BATCH, len(held_out))), size, rng) for start in places)
        return {"instance_r1": instance_recall(torch.cat([encode(shown) for shown in views]), clean)}
    gallery, train = features(train)
    assert train.labels is not None
    guess = nearest_classes(clean, gallery, train.labels, 20, 0.07)
    return {"knn_accuracy": float((guess == held_out.labels).float().mean())}


def of_pairs(embedder: Embedder, held_out: ImageTextPairs, faults: Faults) -> dict[str, float]:
    """R@1 of held-out captions and images: the mean of both ways, and each."""
    images, held_out = embedder.images(held_out, faults)
    if not len(held_out):
        raise UserError("--eval-every: none of the held-out images can be read")
    texts = embedder.texts(held_out.captions)
    found_images, found_texts = recall(texts @ images.T, 1), recall(images @ texts.T, 1)
    mean = (found_images + found_texts) / 2
    return {"retrieval_r1": mean, "text_to_image_r1": found_images, "image_to_text_r1": found_texts}
