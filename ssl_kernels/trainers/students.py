"""The nets of DINO: a backbone with a head for images, and one that also tells of patches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from timm.layers import HybridEmbed, PatchEmbed
from torch import Tensor

from ssl_kernels import DINOHead
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.masking import PatchMask
from ssl_kernels.trainers.self_supervised import Encoder

if TYPE_CHECKING:
    from ssl_kernels.trainers.dino import DINOConfig


class Student(Encoder):
    """Views of images to their features and logits of prototypes."""

    def __init__(self, config: DINOConfig) -> None:
        def make_head(width: int) -> DINOHead:
            return DINOHead(
                width, config.prototypes, hidden_dim=config.hidden, bottleneck_dim=config.dim, batch_norm=config.norm
            )

        super().__init__(config, make_head=make_head, any_size=True)
        if config.local_crops:
            self.probe(config.local_size, "--local-size")

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Views, of which the first two are large, to features [V B, W] and logits [V, B, K]."""
        features = torch.cat([self.features(torch.cat(tuple(same))) for same in (views[:2], views[2:]) if same])
        return features, self.head(features).unflatten(0, (len(views), -1))


class MaskedStudent(Student):
    """A student that also tells of patches, some of which can be hidden from it."""

    def __init__(self, config: DINOConfig) -> None:
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
