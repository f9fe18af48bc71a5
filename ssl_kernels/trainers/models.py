"""Image towers, text towers and tokenizers, all small enough to read."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.ranges import LAYER_DECAY, SHARE, SHARE_BELOW_ONE, Range, at_least, require

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
        self.trunk, config, self.options = _trunk(name, size, pretrained, any_size, drop_path)
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
            raise UserError(f"{flag}: {self.name} does not take {size} x {size} images ({_first(error)})") from None
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


def _trunk(
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
        raise UserError(f"{what} {name} at {size} pixels ({_first(error)})") from None
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


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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


@dataclass
class TowerConfig:
    """Which image tower meets which text tower."""

    image_model: str = TINY
    """Image tower: the built-in `tiny-resnet`, or any timm model by name."""
    pretrained: bool = False
    """Load timm's pretrained weights."""
    image_head: Literal["linear", "dinotxt"] = "linear"
    """Head of the image tower: a linear projection of the pooled features; or two transformer blocks over the tokens
    of a ViT, then a projection of [CLS; mean of the patches], as dino.txt has above a locked trunk."""
    lock_image: bool = False
    """Keep the image tower's trunk as it is and train its head and the text tower only, as LiT does."""
    image_lr_factor: float = 1.0
    """Factor on the learning rate of the image tower's trunk; below 1 its weight decay is off, at 0 it is locked."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each layer of the image tower's trunk to the layer below it, such as 0.75 for a
    pretrained vision transformer; 1 trains all layers alike."""
    drop_path: float = 0.0
    """Largest probability with which a residual block of the image tower is skipped for an image in training, which
    keeps deep networks from overfitting; it rises along the blocks. Each of several processes draws on its own."""
    text_model: Literal["ngrams", "transformer"] = "ngrams"
    """Text tower: hashed n-grams, for short names; or a transformer over open_clip's tokens, for sentences."""
    text_width: int = 256
    """Width of the text transformer."""
    text_layers: int = 4
    """Layers of the text transformer."""
    context_length: int = 64
    """Tokens of a caption that the transformer reads."""
    dim: int = 128
    """Size of the shared embedding."""

    @property
    def image_locked(self) -> bool:
        return self.lock_image or self.image_lr_factor == 0

    def check_towers(self) -> None:
        """Refuse values that cannot work."""
        require(self, at_least(1), "dim", "text_layers")
        require(self, at_least(2), "context_length")
        require(self, Range("a multiple of 64", lambda width: width >= 64 and width % 64 == 0), "text_width")
        require(self, SHARE, "image_lr_factor")
        require(self, SHARE_BELOW_ONE, "drop_path")
        require(self, LAYER_DECAY, "layer_decay")
        if self.image_locked and (self.drop_path or self.layer_decay < 1):
            flag = "--drop-path" if self.drop_path else "--layer-decay"
            raise UserError(f"{flag}: the image tower is locked (--lock-image), and its trunk is not trained")


def image_tower(config: TowerConfig, size: int, *, inverted: bool = False) -> ImageTower:
    """The image tower that a configuration names."""
    return ImageTower(
        config.image_model, size, config.dim, pretrained=config.pretrained, inverted=inverted,
        locked=config.image_locked, head=config.image_head, drop_path=config.drop_path,
    )  # fmt: skip


def text_tower(config: TowerConfig) -> nn.Module:
    """The text tower that a configuration names."""
    if config.text_model == "ngrams":
        return NGramTower(config.dim)
    from open_clip.transformer import TextTransformer

    return TextTransformer(
        context_length=config.context_length, width=config.text_width, heads=config.text_width // 64,
        layers=config.text_layers, output_dim=config.dim,
    )  # fmt: skip


def tokenizer(config: TowerConfig) -> NGramTokenizer | BpeTokenizer:
    """The tokenizer that goes with `text_tower`."""
    return NGramTokenizer() if config.text_model == "ngrams" else BpeTokenizer(config.context_length)
