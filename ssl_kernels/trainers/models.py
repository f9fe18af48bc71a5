"""Image towers, text towers and tokenizers, all small enough to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.image_towers import ImageTower
from ssl_kernels.trainers.ranges import LAYER_DECAY, SHARE, SHARE_BELOW_ONE, Range, at_least, require
from ssl_kernels.trainers.text_towers import BpeTokenizer, NGramTokenizer, NGramTower
from ssl_kernels.trainers.trunks import TINY


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
