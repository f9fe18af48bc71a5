"""Masked patches: which patches of an image a vision transformer does not see, and what it sees instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


def block_masks(n: int, grid: tuple[int, int], share: tuple[float, float], probability: float) -> Tensor:
    """Masks [n, h, w] with a block of patches in a `probability` of them, in two at least; the others are empty.

    A block covers a random `share` of the grid, with sides between 3 : 10 and 10 : 3 as far as the grid lets it; as
    in BEiT (Bao 2021, arXiv 2106.08254), of one block to an image. Drawn from torch's generator on the CPU.
    """
    area = grid[0] * grid[1] * torch.empty(n).uniform_(*share)
    ratio = torch.empty(n).uniform_(math.log(0.3), -math.log(0.3)).exp()
    inside = []
    for side, length in zip(grid, ((area * ratio).sqrt(), (area / ratio).sqrt()), strict=True):
        length = length.round().clamp(1, side)
        start = (torch.rand(n) * (side - length + 1)).floor()
        places = torch.arange(side) - start[:, None]
        inside.append((places >= 0) & (places < length[:, None]))
    masked = torch.randperm(n) < max(2, round(probability * n))
    return inside[0][:, :, None] & inside[1][:, None] & masked[:, None, None]


def mask_weights(masks: Tensor, masked: float | None = None) -> Tensor:
    """Of each patch in `masks` [n, h, w], so that every masked image counts as much, and all together 1.

    Of the masked images of several processes, that have as many images each, `masked` is the mean number.
    """
    counts = masks.sum((1, 2))
    return (1 / counts / ((counts > 0).sum() if masked is None else masked)).repeat_interleave(counts)


class PatchMask(nn.Module):
    """A learned token in the place of the patches that a vision transformer is not to see."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.token = nn.Parameter(0.02 * torch.randn(cast(int, trunk.embed_dim)))
        self.hidden: Tensor | None = None
        cast(nn.Module, trunk.patch_embed).register_forward_hook(self._replace)

    @contextmanager
    def over(self, masks: Tensor | None) -> Iterator[None]:
        """Hide the patches of `masks` [n, h, w] from passes of n images; None hides nothing."""
        self.hidden = masks
        try:
            yield
        finally:
            self.hidden = None

    def _replace(self, _module: nn.Module, _images: Any, patches: Tensor) -> Tensor:
        if self.hidden is None:
            return patches
        # [n, h, w, W] of a net for images of any size, [n, h w, W] of others
        return torch.where(self.hidden.view(*patches.shape[:-1], 1), self.token.to(patches.dtype), patches)
