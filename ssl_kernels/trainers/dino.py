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

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import CollapseMonitor, DINOLoss, KoLeoLoss
from ssl_kernels.distributed import gather_rows
from ssl_kernels.schedules import linear_warmup
from ssl_kernels.trainers import command, train_images
from ssl_kernels.trainers.data.batches import Batch
from ssl_kernels.trainers.data.image_data import ImageData
from ssl_kernels.trainers.dino_config import DINOConfig
from ssl_kernels.trainers.dino_students import MaskedStudent, Student
from ssl_kernels.trainers.masking import block_masks, mask_weights
from ssl_kernels.trainers.optim import cosine, parameter_groups
from ssl_kernels.trainers.processes import own_share
from ssl_kernels.trainers.self_supervised import Encoder, MomentumMethod, SelfSupervisedConfig
from ssl_kernels.trainers.spread import spread
from ssl_kernels.trainers.steps import steps_per_epoch


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
    train_images.train(f"DINO v{config.version}", make, config, console, draw=True)


def main(argv: Sequence[str] | None = None, prog: str = "python -m ssl_kernels.trainers.dino") -> int:
    return command.run(DINOConfig, train, argv, prog)


if __name__ == "__main__":
    raise SystemExit(main())
