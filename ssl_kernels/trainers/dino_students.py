"""What DINO trains: a network with a head over prototypes, which in version 2 also tells of patches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ssl_kernels import DINOHead
from ssl_kernels.trainers.dino_config import DINOConfig
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.masking import PatchMask
from ssl_kernels.trainers.self_supervised import Encoder

LOCAL_CROPS, SMALLEST_PHOTO = 8, 64  # crops, and pixels of the images that have them by default


class Student(Encoder):
    """Views of images to their features and logits of prototypes."""

    def __init__(self, config: DINOConfig) -> None:
        def make_head(width: int) -> DINOHead:
            return DINOHead(
                width, config.prototypes, hidden_dim=config.hidden, bottleneck_dim=config.dim, batch_norm=config.norm
            )

        super().__init__(config, make_head=make_head, any_size=True)
        self.crops = self._crops(config)

    def _crops(self, config: DINOConfig) -> tuple[int, int]:
        """Number and size of the local crops, by default those of the paper where image and network allow them."""
        is_photo = config.data not in ("mnist", "openmoji")
        number, size = config.local_crops, config.local_size
        if number is None:
            number = LOCAL_CROPS if is_photo and config.image_size >= SMALLEST_PHOTO else 0
        if number and size is None and is_photo:
            unit = max(self.patch) if max(self.patch) > 1 else 8
            size = max(1, round(config.image_size * 96 / 224 / unit)) * unit
        if number:
            try:
                self.probe(size or 16, "--local-size")
            except UserError:
                if config.local_crops is not None:
                    raise
                number = 0
        return (number, size or 16) if number else (0, 0)

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Views, of which the first two are large, to features [V B, W] and logits [V, B, K]."""
        features = torch.cat([self.features(torch.cat(tuple(same))) for same in (views[:2], views[2:]) if same])
        return features, self.head(features).unflatten(0, (len(views), -1))


class MaskedStudent(Student):
    """A student that also tells of patches, some of which can be hidden from it."""

    def __init__(self, config: DINOConfig) -> None:
        from timm.layers import HybridEmbed, PatchEmbed

        super().__init__(config)
        patch_embed = getattr(self.trunk, "patch_embed", None)
        if not hasattr(self.trunk, "num_prefix_tokens") or not isinstance(patch_embed, PatchEmbed | HybridEmbed):
            raise UserError(
                f"--version 2 hides patches of a vision transformer, which {config.image_model} is not; name one in"
                " --image-model, for example tiny-vit or vit_small_patch16_224"
            )
        self.patch_head = copy.deepcopy(self.head) if config.separate_heads else self.head
        self.mask = PatchMask(self.trunk)

    def forward(  # type: ignore[override]
        self, views: Sequence[Tensor], masks: Tensor, hide: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Student`, and the logits [n, K] of the large views' patches in `masks` [2 B, h, w]."""
        trunk = cast(Any, self.trunk)
        with self.mask.over(masks if hide else None):
            tokens = trunk.forward_features(self.normalised(torch.cat(tuple(views[:2]))))  # [2 B, prefix + N, W]
        patches = tokens[:, trunk.num_prefix_tokens :][masks.flatten(1)]
        features = trunk.forward_head(tokens, pre_logits=True)
        if views[2:]:
            features = torch.cat([features, self.features(torch.cat(tuple(views[2:])))])
        return features, self.head(features).unflatten(0, (len(views), -1)), self.patch_head(patches)
