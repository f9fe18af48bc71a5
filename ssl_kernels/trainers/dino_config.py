"""The settings of the DINO trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.ranges import LAYER_DECAY, NOT_NEGATIVE, POSITIVE, SHARE, Range, at_least, require
from ssl_kernels.trainers.self_supervised import SelfSupervisedConfig


@dataclass
class DINOConfig(SelfSupervisedConfig):
    """Train an encoder by self-distillation. The defaults learn 4,000 digits in a few minutes.

    ssl-kernels train dino --data photos/ --image-model vit_small_patch16_224 --image-size 224 --output-dir runs/photos
    """

    output_dir: Path = Path("runs/dino")
    """Folder for logs, checkpoints and pictures."""
    epochs: int = 12
    """Passes over the training images."""
    hidden: int = 512
    """Width of the head's hidden layers; 2,048 on ImageNet."""
    dim: int = 128
    """Width of the head's bottleneck, which meets the prototypes; 256 on ImageNet."""
    temperature: float = 0.1
    """Divides the student's logits."""

    version: Literal[1, 2] = 1
    """1: DINO; 2: DINOv2, with masked patches, Sinkhorn-Knopp and KoLeo, for vision transformers such as tiny-vit."""
    prototypes: int = 128
    """Number of prototypes K. It is 65,536 on ImageNet; use few of them for little data."""
    norm: bool = True
    """Use BatchNorm in the head, which helps small and convolutional networks."""
    local_crops: int | None = None
    """Number of small crops of each image, which only the student sees, besides the two large views. By default there
    are 8 of photographs of 64 pixels or more, if the network takes them, and none of drawings and digits: half of a
    digit says little about it."""
    local_size: int | None = None
    """Height and width of the small crops in pixels. By default 96 for photographs of 224 pixels, and accordingly for
    others; 16 for drawings and digits."""
    layer_decay: float = 1.0
    """Factor on the learning rate from each layer of the network to the layer below it; 1 trains all layers alike."""
    momentum: float = 0.95
    """The teacher's momentum at the start; it rises along a cosine to 1 at the last step. Use 0.996 for long runs."""
    teacher_temp: float = 0.04
    """Divides the teacher's logits; a lower temperature gives sharper targets."""
    warmup_teacher_temp: float = 0.04
    """The teacher's temperature at the start, from which it rises linearly."""
    warmup_teacher_epochs: float = 3
    """Number of epochs in which the teacher's temperature rises."""
    centering: Literal["mean", "sinkhorn"] = "sinkhorn"
    """How the prototypes are kept in use (version 1): by a moving mean of the teacher's logits, as in the paper, or by
    Sinkhorn-Knopp over the batch, as in version 2, which learned more from little data."""
    center_momentum: float = 0.9
    """Momentum of the moving mean."""
    freeze_last_layer: float = 1
    """Number of first epochs in which the prototypes stay as they are."""
    final_weight_decay: float = 0.4
    """AdamW's weight decay at the end. It goes there from --weight-decay along a cosine."""

    mask_share: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of a view's patches that are hidden from the student (version 2)."""
    mask_probability: float = 0.5
    """Share of the large views that have hidden patches; at least two views have some (version 2)."""
    ibot_weight: float = 1.0
    """Weight of the loss on hidden patches (version 2)."""
    koleo_weight: float = 0.1
    """Weight of KoLeo (version 2)."""
    separate_heads: bool = False
    """Give the patches a head of their own, as large models need (version 2)."""

    def check(self) -> None:
        super().check()
        require(self, at_least(2), "prototypes")
        require(self, LAYER_DECAY, "layer_decay")
        if self.local_crops is not None:
            require(self, at_least(0), "local_crops")
        if self.local_size is not None and self.local_crops != 0:
            most = self.image_size
            require(self, Range(f"8 to --image-size {most}", lambda size: 8 <= size <= most), "local_size")
        require(self, SHARE, "momentum", "center_momentum", "mask_probability")
        require(self, POSITIVE, "teacher_temp", "warmup_teacher_temp")
        require(self, NOT_NEGATIVE, "warmup_teacher_epochs", "freeze_last_layer", "final_weight_decay")
        require(self, NOT_NEGATIVE, "ibot_weight", "koleo_weight")
        if self.version == 2 and self.centering == "mean":
            raise UserError("--centering: version 2 has Sinkhorn-Knopp, not mean")
        shares = Range("two shares in (0, 1), the smaller first", lambda pair: 0 < pair[0] <= pair[1] < 1)
        require(self, shares, "mask_share")
