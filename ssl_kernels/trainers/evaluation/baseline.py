"""What retrieval reaches without learning: captions matched by TF-IDF, images by pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_kernels.ops.unit_rows import unit_rows
from ssl_kernels.trainers.data import openmoji
from ssl_kernels.trainers.data.pairs import ImageTextPairs


def colour_histograms(images: Tensor) -> Tensor:
    """Square roots of 8 x 8 x 8 colour counts [N, 512] of uint8 images, normalised: their products compare colours."""
    bins = (images.long() // 32).flatten(2)
    index = (bins[:, 0] * 8 + bins[:, 1]) * 8 + bins[:, 2]
    counts = torch.zeros(len(images), 512).scatter_add_(1, index, torch.ones(index.shape))
    return unit_rows(counts.sqrt())


class TfidfPixels:
    """The trivial baseline between the training pairs and the held-out pairs."""

    def __init__(self, train: ImageTextPairs, held_out: ImageTextPairs, size: int) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.train, self.held_out, self.size = train, held_out, size
        vectorizer = TfidfVectorizer()  # bigrams and character n-grams are weaker
        train_texts = vectorizer.fit_transform(train.captions)
        held_out_texts = vectorizer.transform(held_out.captions)
        self.texts = torch.from_numpy((held_out_texts @ train_texts.T).toarray()).float()  # [held out, train]

        train_pixels, pixels = (p.load(range(len(p)), size).flatten(1).float() / 255 for p in (train, held_out))
        mean = train_pixels.mean(0)
        train_pixels, pixels = (unit_rows(p - mean) for p in (train_pixels, pixels))
        self.pixels = pixels @ train_pixels.T  # [held out, train]
        self.nearest = self.pixels.argmax(1)

    def text_to_image(self) -> Tensor:
        return self.pixels[:, self.texts.argmax(1)].T

    def image_to_text(self) -> Tensor:
        return self.texts[:, self.nearest].T

    def tones_by_colour(self, indices: Sequence[int]) -> Tensor:
        """The tone of the training image with the nearest histogram of colours, for each held-out image."""
        named = [(i, tone) for i, c in enumerate(self.train.captions) if (tone := openmoji.tone_of(c)) is not None]
        known = colour_histograms(self.train.load([i for i, _ in named], self.size))
        nearest = (colour_histograms(self.held_out.load(indices, self.size)) @ known.T).argmax(1)
        return torch.tensor([tone for _, tone in named])[nearest]
