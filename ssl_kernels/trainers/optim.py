"""The optimizer, its groups of parameters, and the factor on their learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.loop_config import LoopConfig


def parameter_groups(
    module: nn.Module, lr: float, weight_decay: float, *, trunk: nn.Module | None = None, layer_decay: float = 1.0
) -> list[dict[str, Any]]:
    """The module's trainable parameters, those with fewer than two dimensions without weight decay.

    With a `layer_decay` below 1 each layer of the `trunk` learns slower by this factor than the layer above it (Clark
    2020, arXiv 2003.10555; Bao 2021, arXiv 2106.08254).
    """
    layers = _layer_groups(trunk, lr, weight_decay, layer_decay) if trunk is not None and layer_decay < 1 else []
    grouped = {id(p) for group in layers for p in group["params"]}
    trainable = [p for p in module.parameters() if p.requires_grad and id(p) not in grouped]
    decayed, plain = [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]
    groups = [
        {"params": decayed, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay},
        {"params": plain, "lr": lr, "peak_lr": lr, "weight_decay": 0.0},
    ]
    return [*layers, *(group for group in groups if group["params"])]


def _layer_groups(trunk: nn.Module, lr: float, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    from timm.optim import param_groups_layer_decay

    if not hasattr(trunk, "group_matcher"):
        raise UserError(
            f"--layer-decay: {type(trunk).__name__} has no order of layers; expected 1, or another --image-model"
        )
    groups: list[dict[str, Any]] = param_groups_layer_decay(trunk, weight_decay, layer_decay=layer_decay)
    for group in groups:
        group["lr"] = group["peak_lr"] = lr * group.pop("lr_scale")
    return groups


def make_optimizer(groups: list[dict[str, Any]], config: LoopConfig) -> torch.optim.Optimizer:
    """The optimizer that a configuration names, for groups of parameters of `parameter_groups`.

    LARS (You 2017, arXiv 1708.03888) adapts the rate of matrices and filters, as in SimCLR: biases and the like move as
    by SGD.
    """
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.optimizer_momentum)
    if config.optimizer == "lars":
        from timm.optim import Lars

        for group in groups:
            group["always_adapt"] = group["params"][0].ndim >= 2
        return Lars(groups, lr=config.lr, momentum=config.optimizer_momentum)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def cosine(step: int, total: int, warmup: int) -> float:
    """The factor on the peak learning rate at a step: up in a line, down along half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
