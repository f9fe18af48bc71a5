"""What a forward pass changes besides gradients, kept for the case that the step does not come to its end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_kernels.trainers import checkpoints


class LastStep:
    """The random generators and the running statistics of BatchNorm, as the last finished step left them."""

    def __init__(self, module: nn.Module) -> None:
        norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        self.buffers = [buffer for norm in norms for buffer in norm.buffers()]
        self.kept: list[Tensor] = [torch.empty_like(buffer) for buffer in self.buffers]
        self.rng: dict[str, Any] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """A step begins."""
        self.rng = checkpoints.rng_state()
        if self.buffers:
            torch._foreach_copy_(self.kept, self.buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """It is given up, before the optimizer's update."""
        checkpoints.set_rng_state(self.rng)
        if self.buffers:
            torch._foreach_copy_(self.buffers, self.kept)
