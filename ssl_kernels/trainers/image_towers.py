"""Image towers: a trunk that makes features of images, and a head that makes embeddings of these."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssl_kernels.trainers.errors import UserError, first_line
from ssl_kernels.trainers.trunks import has_drop_path, make_trunk


class DinoTxtHead(nn.Module):
    """dino.txt's head (Jose 2024, arXiv 2412.16334): two transformer blocks over the tokens of a ViT, then a
    projection of [CLS; mean of the patches].

    The blocks also read registers, which the embedding leaves out; without a class token it is that of the patches
    alone. In the paper the concatenation is the embedding, and one linear map takes the text to its width; here either
    side is projected to the size that both share.
    """

    def __init__(self, trunk: nn.Module, dim: int, blocks: int = 2) -> None:
        from timm.models.vision_transformer import Block, init_weights_vit_timm

        super().__init__()
        width = cast(int, trunk.num_features)
        self.prefix = cast(int, trunk.num_prefix_tokens)
        self.has_class = getattr(trunk, "cls_token", None) is not None
        heads = width // math.gcd(width, 64)  # of 64, in all usual widths
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True) for _ in range(blocks)))
        self.blocks.apply(init_weights_vit_timm)
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear((1 + self.has_class) * width, dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.norm(self.blocks(tokens))  # [B, prefix + patches, W]
        features = tokens[:, self.prefix :].mean(1)
        if self.has_class:
            features = torch.cat([tokens[:, 0], features], dim=-1)
        return cast(Tensor, self.projection(features))


class ImageTower(nn.Module):
    """uint8 images [B, 3, H, W] to embeddings [B, D]: normalise, run the trunk, then the head.

    The `linear` head projects the trunk's pooled features, `dinotxt` is `DinoTxtHead` over its tokens. A locked tower
    keeps its trunk as it is and trains only the head (LiT, Zhai 2021, arXiv 2111.07991). With `any_size` a vision
    transformer also takes images of other sizes, its position embeddings interpolated. In training, residual blocks are
    skipped with probabilities that rise to `drop_path` at the last (stochastic depth, Huang 2016, arXiv 1603.09382).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, size: int, dim: int, *, pretrained: bool = False, inverted: bool = False,
        locked: bool = False, head: str = "linear", any_size: bool = False, drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.locked, self.reads_tokens = locked, head == "dinotxt"
        self.trunk, config, self.options = make_trunk(name, size, pretrained, any_size, drop_path)
        if drop_path and not has_drop_path(self.trunk):
            raise UserError(f"--drop-path: {name} has no residual blocks that could be skipped; expected 0")
        # Inverted images are fed as 1 - x, so that a white ground is zero.
        mean, std = ([1.0] * 3, [-1.0] * 3) if inverted else (config["mean"], config["std"])
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        if self.reads_tokens and not hasattr(self.trunk, "num_prefix_tokens"):
            raise UserError(
                f"--image-head: dinotxt reads the patch tokens of a vision transformer, which {name} lacks; name one in"
                " --image-model, for example vit_small_patch14_dinov2"
            )
        self.name, self.size, self.any_size, self.head_kind = name, size, any_size, head
        self.width = self.probe(size, "--image-size")
        self.head = DinoTxtHead(self.trunk, dim) if self.reads_tokens else nn.Linear(self.width, dim, bias=False)
        if locked:
            self.trunk.requires_grad_(False)

    def train(self, mode: bool = True) -> ImageTower:
        super().train(mode)
        if self.locked:  # batch statistics would move with the data otherwise
            self.trunk.eval()
        return self

    def probe(self, size: int, flag: str) -> int:
        """The width of the features of images of a size; an error names the flag that set it."""
        if any(size % p for p in self.patch):
            raise UserError(f"{flag}: {self.name} cuts patches of {self.patch[0]} pixels, which do not divide {size}")
        self.trunk.eval()
        try:
            with torch.no_grad():
                return self.features(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[-1]
        except Exception as error:  # a model's own check of its input size may be an assert or any error of torch
            raise UserError(f"{flag}: {self.name} does not take {size} x {size} images ({first_line(error)})") from None
        finally:
            self.train()

    @property
    def patch(self) -> tuple[int, int]:
        """Height and width of the patches that images are cut into; 1 where they are not, or overlap."""
        from timm.layers import PatchEmbed

        embed = getattr(self.trunk, "patch_embed", None)
        return cast("tuple[int, int]", embed.patch_size) if isinstance(embed, PatchEmbed) else (1, 1)

    def features(self, images: Tensor) -> Tensor:
        """What the head reads of uint8 images: all tokens [B, N, W] of the trunk, or pooled features [B, W]."""
        x = self.normalised(images)
        return cast(Tensor, cast(Any, self.trunk).forward_features(x) if self.reads_tokens else self.trunk(x))

    def normalised(self, images: Tensor) -> Tensor:
        if images.device.type == "cpu":  # whose convolutions are faster so
            images = images.contiguous(memory_format=torch.channels_last)
        return (images.to(self.mean.dtype) / 255 - self.mean) / self.std

    def feature_map(self, images: Tensor) -> Tensor | None:
        """What the trunk makes of each place of uint8 images: [B, W, h, w], of patches for a vision transformer; None
        where a trunk of several branches, or one with tokens of unknown places, has no such map."""
        x = cast(Any, self.trunk).forward_features(self.normalised(images))
        if not isinstance(x, Tensor):
            return None
        if x.ndim == 3:
            patches = x[:, getattr(self.trunk, "num_prefix_tokens", 0) :]
            side = math.isqrt(patches.shape[1])  # images are square
            return patches.mT.unflatten(2, (side, side)) if side**2 == patches.shape[1] else None
        return x.permute(0, 3, 1, 2) if x.shape[-1] == getattr(self.trunk, "num_features", None) else x

    def class_attention(self, images: Tensor) -> Tensor | None:
        """The attention [B, 1, h, w] of the class token to each patch in a vision transformer's last block, the mean
        over its heads; None where there is no class token, or another kind of attention."""
        from timm.layers import Attention
        from timm.models.vision_transformer import VisionTransformer

        if not isinstance(self.trunk, VisionTransformer) or self.trunk.cls_token is None:
            return None
        attention = cast(Any, self.trunk.blocks[-1]).attn
        if not isinstance(attention, Attention):
            return None
        read: list[Tensor] = []
        hook = attention.qkv.register_forward_hook(lambda _module, _inputs, output: read.append(output))
        self.trunk.forward_features(self.normalised(images))
        hook.remove()
        q, k, _ = read[0].unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, N, d]
        weights = (attention.q_norm(q[:, :, :1]) @ attention.k_norm(k).mT * attention.scale).softmax(-1).mean(1)
        weights = weights[:, :, self.trunk.num_prefix_tokens :]
        return weights.unflatten(2, (math.isqrt(weights.shape[2]), -1))

    def forward(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.locked):  # a locked trunk keeps no activations
            features = self.features(images)
        return cast(Tensor, self.head(features))
