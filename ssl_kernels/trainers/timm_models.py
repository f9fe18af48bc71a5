"""The built-in `tiny-resnet` by a name that timm knows: after an import of this module, `timm.create_model` builds one.

    import timm
    import ssl_kernels.trainers.timm_models
    trunk = timm.create_model("tiny_resnet", img_size=40, checkpoint_path="exported/model.safetensors")

The built-in `tiny-vit` needs no such name: it is timm's `vit_tiny_patch16_224` with other sizes.
"""

from __future__ import annotations

from typing import Any, cast

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from ssl_kernels.trainers.trunks import TinyResNet

NAME = "tiny_resnet"

default_cfgs = generate_default_cfgs({
    f"{NAME}.untrained": {
        "num_classes": 0, "input_size": (3, 40, 40), "crop_pct": 1.0, "interpolation": "bilinear",
        "mean": (0.5,) * 3, "std": (0.25,) * 3, "first_conv": "stem.0", "classifier": "head",
    },
})  # fmt: skip


class TinyResNetOfTimm(TinyResNet):
    """`TinyResNet` with timm's arguments, and a classifier where there are classes."""

    def __init__(self, img_size: int | tuple[int, int] = 40, num_classes: int = 0, **_: Any) -> None:
        super().__init__(img_size if isinstance(img_size, int) else img_size[0])
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.head(super().forward(x)))


@register_model
def tiny_resnet(pretrained: bool = False, **options: Any) -> TinyResNetOfTimm:
    """Three residual stages over small drawings; untrained unless a checkpoint or a folder is named."""
    return build_model_with_cfg(TinyResNetOfTimm, NAME, pretrained, **options)
