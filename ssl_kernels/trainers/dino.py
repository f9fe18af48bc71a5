"""DINO: a student tells of any crop of an image what its momentum teacher says of the whole (Caron 2021, 2104.14294).

Version 1, for an image with two large views and some small, local ones:

    t = teacher(large views);  s = student(all views)               # logits of K prototypes: [2, B, K], [2 + V, B, K]
    p = softmax((t - centre) / teacher_temp)                        # no gradient
    loss = mean over pairs of unlike views of -sum(p log_softmax(s / student_temp))
    after the optimizer's step:  teacher <- m teacher + (1 - m) student;  centre <- c centre + (1 - c) mean(t)

Version 2 (Oquab 2023, arXiv 2304.07193) hides blocks of patches from the student, which is to say what the teacher
says of them (iBOT, Zhou 2021, arXiv 2111.07832), always balances the prototypes with Sinkhorn-Knopp, and spreads the
features of a batch with KoLeo:

    loss = dino + ibot_weight * mean over masked views of the mean over their hidden patches + koleo_weight * koleo

**Collapse.** Nothing but the centre and a sharp teacher keeps the teacher from saying the same of all images, evenly
(its entropy is ln K then, and so is the loss) or with one prototype. The log has the entropy as a share of ln K, that
of the batch's mean, the centre's norm, and what is left of the loss besides the entropy, which is all that is learned.

Run it: `ssl-kernels train dino` or `python -m ssl_kernels.trainers.dino`. With no arguments it learns 4,000 digits
without their labels; the settings were chosen on a validation split of these digits (`--evaluate-on validation`). What
is evaluated is the teacher.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from rich.console import Console
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import CollapseMonitor, DINOHead, DINOLoss, KoLeoLoss
from ssl_kernels.distributed import gather_rows
from ssl_kernels.schedules import linear_warmup
from ssl_kernels.trainers import command, self_supervised
from ssl_kernels.trainers.data.batches import Batch
from ssl_kernels.trainers.data.views import ImageData
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.evaluation.probes import spread
from ssl_kernels.trainers.masking import PatchMask, block_masks, mask_weights
from ssl_kernels.trainers.optim import cosine, parameter_groups
from ssl_kernels.trainers.processes import own_share
from ssl_kernels.trainers.ranges import LAYER_DECAY, NOT_NEGATIVE, POSITIVE, SHARE, Range, at_least, require
from ssl_kernels.trainers.self_supervised import Encoder, MomentumMethod, SelfSupervisedConfig
from ssl_kernels.trainers.steps import steps_per_epoch

LOCAL_CROPS, SMALLEST_PHOTO = 8, 64  # crops, and pixels of the images that have them by default


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


class DINO(MomentumMethod):
    """DINO: cross-entropy between views, with a centred and sharpened teacher."""

    def __init__(self, encoder: Student, config: DINOConfig, steps: int, epoch_steps: int | None = None) -> None:
        super().__init__(encoder, config.momentum, steps)
        self.config, self.epoch_steps = config, epoch_steps or steps // config.epochs
        self.loss = DINOLoss(config.prototypes, student_temp=config.temperature, center_momentum=config.center_momentum)
        self.monitor = CollapseMonitor(config.prototypes, max_rows=256)
        self.logged: dict[str, float] = {}

    @property
    def evaluated(self) -> Encoder:
        return cast(Encoder, self.teacher.module)

    def parameter_groups(self, config: SelfSupervisedConfig) -> list[dict[str, Any]]:
        decay = self.config.layer_decay
        return parameter_groups(self, config.lr, config.weight_decay, trunk=self.encoder.trunk, layer_decay=decay)

    def before_step(self, number: int, groups: list[dict[str, Any]]) -> None:
        config, done = self.config, number - 1
        warmup = round(config.warmup_teacher_epochs * self.epoch_steps)
        self.teacher_temp = linear_warmup(done, warmup, config.warmup_teacher_temp, config.teacher_temp)
        rest = cosine(done, self.steps, warmup=0)
        decay = config.final_weight_decay + (config.weight_decay - config.final_weight_decay) * rest
        for group in groups:
            if group["params"][0].ndim >= 2:  # biases and the like are not decayed
                group["weight_decay"] = decay
        self.logged = {
            "teacher_temp": self.teacher_temp, "momentum": self.momentum_at(number), "weight_decay": decay,
        }  # fmt: skip

    def after_backward(self, number: int) -> None:
        if number - 1 < self.config.freeze_last_layer * self.epoch_steps:
            for name, parameter in self.encoder.named_parameters():
                if name.endswith("last_layer.weight_v"):
                    parameter.grad = None  # neither counted in the norm nor decayed

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        views = batch["views"]
        with torch.no_grad():
            _, t = self.teacher(views[:2])
        features, s = self.encoder(views)
        loss, center = self.distill(s, t)
        return loss, self.metrics(features, t, loss, center)

    def distill(self, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of logits, and what it took from the teacher's: the moving centre, or that with which a softmax is
        the Sinkhorn-Knopp assignment of the batch."""
        if self.config.centering == "mean":
            return self.loss(t, s, self.teacher_temp, accumulate=True), self.loss.center.flatten()
        center = K.sinkhorn_center(t, self.teacher_temp)
        return K.dino_loss(s, t, center=center, **self.temps), center

    @property
    def temps(self) -> dict[str, Any]:
        return {"student_temp": self.config.temperature, "teacher_temp": self.teacher_temp}

    def metrics(self, features: Tensor, t: Tensor, loss: Tensor, center: Tensor) -> dict[str, Any]:
        center = center - center.mean()  # what all prototypes share teaches nothing
        rows, most = t.flatten(0, 1), self.monitor.max_rows
        few = rows[:: math.ceil(own_share().world * len(rows) / most)]  # no more than are watched need travel
        watched = self.monitor(gather_rows(few), loss.detach(), self.teacher_temp, center)
        for name in ("teacher_entropy", "marginal_entropy"):
            watched[f"{name}_share"] = watched[name] / math.log(t.shape[-1])
        return {**watched, **spread(gather_rows(features[: t.shape[1]])), **self.logged}

    def after_step(self, number: int) -> None:
        super().after_step(number)
        self.loss.update_center(self.loss.center[:0])  # by no more logits than those that wait for the end of the step


class DINOv2(DINO):
    """DINOv2: DINO with Sinkhorn-Knopp, iBOT on masked patches, and KoLeo."""

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
        views, config = batch["views"], self.config
        grid = cast(Any, self.encoder.trunk).patch_embed.grid_size
        share, n = own_share(), len(views[0])
        everyones = block_masks(2 * n * share.world, grid, config.mask_share, config.mask_probability)
        masked = int(everyones.any(2).any(1).sum())
        masks = everyones.unflatten(0, (2, -1))[:, share.of(n * share.world)].flatten(0, 1).to(views[0].device)
        weights = mask_weights(masks, masked / share.world)
        with torch.no_grad():
            _, t, t_patches = self.teacher(views[:2], masks, hide=False)
            patch_center = K.sinkhorn_center(t_patches, self.teacher_temp)
        features, s, s_patches = self.encoder(views, masks, hide=True)
        loss, center = self.distill(s, t)
        terms = {
            "dino": loss,
            "ibot": K.ibot_patch_loss(s_patches, t_patches, weights, center=patch_center, **self.temps),
            "koleo": sum(KoLeoLoss(gather_distributed=True)(view) for view in features[: 2 * n].chunk(2)),
        }
        total = loss + config.ibot_weight * terms["ibot"] + config.koleo_weight * terms["koleo"]
        metrics = self.metrics(features, t, loss, center)
        return total, {**{name: term.detach() for name, term in terms.items()}, **metrics}


def make_method(config: DINOConfig, data: ImageData, steps: int, console: Console | None = None) -> DINO:
    """The method for these data, whose batches it gives the local crops that its network takes."""
    student = MaskedStudent(config) if config.version == 2 else Student(config)
    data.batches.crops = student.crops
    if console is not None:
        number, size = student.crops
        local = f"{number} local crops of {size} pixels" if number else "no local crops"
        console.print(f"each image in two views of {config.image_size} pixels and {local} (--local-crops)")
    epoch_steps = steps_per_epoch(data.batches, config)
    return (DINOv2 if config.version == 2 else DINO)(student, config, steps, epoch_steps)


def train(config: DINOConfig, console: Console) -> None:
    make = partial(make_method, config, console=console)
    self_supervised.train(f"DINO v{config.version}", make, config, console, draw=True)


def main(argv: Sequence[str] | None = None, prog: str = "python -m ssl_kernels.trainers.dino") -> int:
    return command.run(DINOConfig, train, argv, prog)


if __name__ == "__main__":
    raise SystemExit(main())
