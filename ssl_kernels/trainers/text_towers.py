"""Text towers and their tokenizers: hashed n-grams, and open_clip's byte pairs."""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class NGramTokenizer:
    """Hash a caption's words, pairs of words, words with their place and character 3- and 4-grams into buckets."""

    def __init__(self, buckets: int = 16_384) -> None:
        self.buckets = buckets

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        bags = [_bag(caption, self.buckets) for caption in captions]
        offsets = torch.tensor([0, *map(len, bags)]).cumsum(0)[:-1]
        return {"tokens": torch.tensor([token for bag in bags for token in bag]), "offsets": offsets}


@functools.lru_cache(maxsize=1 << 18)
def _bag(caption: str, buckets: int) -> tuple[int, ...]:
    words = caption.lower().split() or [""]
    grams = [f"w {word}" for word in words]
    grams += [f"b {a} {b}" for a, b in itertools.pairwise(words)]
    grams += [f"p {place} {word}" for place, word in enumerate(words)]
    grams += [f"c {f'<{word}>'[i : i + n]}" for word in words for n in (3, 4) for i in range(len(word) + 3 - n)]
    return tuple(zlib.crc32(gram.encode()) % buckets for gram in grams)


class NGramTower(nn.Module):
    """The mean of the n-grams' embeddings, then a small MLP: on short names as good as a transformer, and fast."""

    def __init__(self, dim: int, buckets: int = 16_384, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(buckets, width, mode="mean")
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, dim, bias=False)
        )

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return cast(Tensor, self.mlp(self.embedding(tokens, offsets)))


class BpeTokenizer:
    """open_clip's byte-pair tokenizer; its vocabulary ships in the package."""

    def __init__(self, context_length: int) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        self.tokenizer = SimpleTokenizer(context_length=context_length)

    def __call__(self, captions: Sequence[str]) -> dict[str, Tensor]:
        return {"text": self.tokenizer(list(captions))}


def some_captions(text: dict[str, Tensor], part: slice) -> dict[str, Tensor]:
    """What a tokenizer made of so many captions, of those that are in a part of them."""
    if "offsets" not in text:
        return {name: values[part] for name, values in text.items()}
    tokens, offsets = text["tokens"], text["offsets"]
    bounds = torch.cat([offsets, offsets.new_tensor([len(tokens)])])
    first, end = bounds[part.start], bounds[part.stop]
    return {"tokens": tokens[first:end], "offsets": offsets[part] - first}
