"""Networks that make features of images: two small ones of our own, and all of timm."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kernels.trainers.errors import UserError, first_line

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

TINY = "tiny-resnet"
TINY_VIT = "tiny-vit"
BUILT_IN = (TINY, TINY_VIT)
TINY_VIT_SIZES: dict[str, Any] = {"patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}


class TinyResNet(nn.Module):
    """Three residual stages at 1/2, 1/4 and 1/8 of the resolution, flattened: it learns small drawings fastest.

    Flattening keeps where things are, which averaging throws away; it also ties the net to one image size.
    """

    def __init__(self, size: int, widths: Sequence[int] = (32, 64, 128), drop_path: float = 0.0) -> None:
        super().__init__()
        if size % 8:
            raise UserError(f"--image-size: {TINY} needs a multiple of 8, got {size}")
        from timm.layers import DropPath
        from timm.models.resnet import BasicBlock, downsample_conv

        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise((widths[0], *widths)):
            stride = 1 if not blocks else 2
            shortcut = downsample_conv(before, after, kernel_size=1, stride=stride) if stride > 1 else None
            rate = drop_path * len(blocks) / (len(widths) - 1)
            dropped = DropPath(rate) if rate else None
            blocks.append(BasicBlock(before, after, stride=stride, downsample=shortcut, drop_path=dropped))
        self.blocks = nn.Sequential(*blocks)
        self.grid = size // 8
        self.num_features = widths[-1] * self.grid**2

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Which parameters are of one layer, in the words of timm."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)"}

    def forward_features(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.blocks(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.forward_features(x)
        if x.shape[-1] != self.grid:  # a smaller crop is spread over the places of the whole image
            x = F.interpolate(x, (self.grid, self.grid))
        return x.flatten(1)


def make_trunk(
    name: str, size: int, pretrained: bool, any_size: bool, drop_path: float
) -> tuple[nn.Module, dict[str, Sequence[float]], dict[str, Any]]:
    """A trunk, how its images are normalised, and with which arguments it was built."""
    if name in BUILT_IN:
        if pretrained:
            raise UserError(f"--pretrained: {name} has no pretrained weights; name a timm model in --image-model")
        trunk = TinyResNet(size, drop_path=drop_path) if name == TINY else tiny_vit(size, any_size, drop_path)
        return trunk, {"mean": (0.5,) * 3, "std": (0.25,) * 3}, {"img_size": size}
    import timm

    if not timm.is_model(name):
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:6]}*")[:3]) or "resnet18, vit_tiny_patch16_224"
        raise UserError(
            f"--image-model: timm has no model {name!r}; it has for example {near} ({TINY} and {TINY_VIT} are ours)"
        )
    try:
        model, options = _of_timm(name, size, pretrained, any_size, drop_path)
    except Exception as error:  # the hub's errors share no base class
        if "drop_path_rate" in str(error):
            raise UserError(f"--drop-path: {name} has no residual blocks that could be skipped; expected 0") from None
        what = "--pretrained: cannot get the weights of" if pretrained else "--image-model: cannot build"
        raise UserError(f"{what} {name} at {size} pixels ({first_line(error)})") from None
    return model, timm.data.resolve_model_data_config(model), options


def _of_timm(
    name: str, size: int, pretrained: bool, any_size: bool, drop_path: float
) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and the arguments that it took: a ViT is built for its image size, a convolutional net knows none."""
    import timm

    create = functools.partial(timm.create_model, name, pretrained=pretrained, num_classes=0)
    if drop_path:
        create = functools.partial(create, drop_path_rate=drop_path)
    options: list[dict[str, Any]] = [{"img_size": size, "dynamic_img_size": True}] * any_size + [{"img_size": size}, {}]
    for option in options[:-1]:
        with contextlib.suppress(TypeError):
            return create(**option), option
    return create(), {}


def tiny_vit(size: int, any_size: bool, drop_path: float = 0.0) -> VisionTransformer:
    """Four blocks over patches of 4 pixels: the smallest transformer that learns small drawings."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=size, num_classes=0, dynamic_img_size=any_size, drop_path_rate=drop_path, **TINY_VIT_SIZES
    )


def has_drop_path(trunk: nn.Module) -> bool:
    """Whether a trunk skips blocks in training."""
    from timm.layers import DropPath

    return any(isinstance(part, DropPath) for part in trunk.modules())


def keep_all_paths(module: nn.Module) -> None:
    """Let a network skip no block, also in training: a teacher is to be the whole network."""
    from timm.layers import DropPath

    for part in module.modules():
        if isinstance(part, DropPath):
            part.drop_prob = 0.0
