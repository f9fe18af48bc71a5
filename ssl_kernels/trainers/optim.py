"""What the optimizer is given: groups of parameters, and the factor on their learning rate at each step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn


def parameter_groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The module's trainable parameters, those with fewer than two dimensions without weight decay."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed, plain = [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]
    groups = [
        {"params": decayed, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay},
        {"params": plain, "lr": lr, "peak_lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def cosine(step: int, total: int, warmup: int) -> float:
    """The factor on the peak learning rate at a step: up in a line, down along half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
