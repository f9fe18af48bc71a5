"""BatchNorm over what several processes hold of a batch, so that it normalises as one process with the batch would."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_kernels.distributed import Ranks, world


def synchronise(module: nn.Module, device: torch.device, group: dist.ProcessGroup | None = None) -> None:
    """Let each BatchNorm below a module see the batch of all processes of a group, by default of all there are.

    Parameters, buffers and their names stay. Torch's own, which is faster, is for GPUs only.
    """
    group = group or world()
    if group is None:
        return
    if device.type == "cuda":
        from timm.layers import convert_sync_batchnorm

        convert_sync_batchnorm(module, process_group=group)
        return
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, BatchNormOfRanks(child, group))
        else:
            synchronise(child, device, group)


class BatchNormOfRanks(_BatchNorm):
    """In the place of another BatchNorm, whose parameters and buffers it has; timm's may end in an activation."""

    def __init__(self, norm: _BatchNorm, group: dist.ProcessGroup) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        for name in (*norm._parameters, *norm._buffers):
            setattr(self, name, getattr(norm, name))
        self.training = norm.training
        self.drop, self.act = (getattr(norm, name, nn.Identity()) for name in ("drop", "act"))
        self.group = group.group_name

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            ranks = Ranks(self.group, "BatchNorm")
            y, mean, var, count = _Normalise.apply(x, self.weight, self.bias, self.eps, ranks)
            self._follow(mean, var * count / (count - 1))
        else:
            y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        normalised: Tensor = self.act(self.drop(y))
        return normalised

    @torch.no_grad()
    def _follow(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(var.to(self.running_var.dtype), share)

    def _check_input_dim(self, input: Tensor) -> None:
        """The one whose place this is has had an input."""


class _Normalise(torch.autograd.Function):
    """x [B, C, ...] of this process to y, and the mean, variance and number of values of a channel over all."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, ranks: Ranks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = _channels(x)  # [C, n]
        own_count = own.shape[1]
        own_mean = own.sum(1) / max(1, own_count)
        spread = (own - own_mean[:, None]).square().sum(1)
        told = ranks.gather(torch.cat([own_mean, spread, own_mean.new_full((1,), own_count)]).double())
        means, spreads, counts = told.split([len(own), len(own), 1], 1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (spreads + counts * (means - mean).square()).sum(0) / count
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.ranks = eps, ranks
        ctx.mark_non_differentiable(mean, var, count)
        y = F.batch_norm(x, mean.to(own.dtype), var.to(own.dtype), weight, bias, eps=eps)
        return y, mean, var, count

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        x, weight, mean, var, count = ctx.saved_tensors
        own, gradient = _channels(x), _channels(dy)
        inverse = (var + ctx.eps).rsqrt().to(own.dtype)[:, None]
        normalised = (own - mean.to(own.dtype)[:, None]) * inverse
        sums = torch.stack([gradient.sum(1), (gradient * normalised).sum(1)])
        both = (ctx.ranks.sum(sums.double()) / count).to(own.dtype)[:, :, None]
        dx = inverse * (gradient - both[0] - normalised * both[1])
        if weight is None:
            return _like(dx, x), None, None, None, None
        return _like(dx * weight[:, None], x), sums[1].to(weight.dtype), sums[0].to(weight.dtype), None, None


def _channels(x: Tensor) -> Tensor:
    """[B, C, ...] as [C, n], in fp32 at least."""
    return x.transpose(0, 1).flatten(1).to(torch.promote_types(x.dtype, torch.float32))


def _like(channels: Tensor, x: Tensor) -> Tensor:
    """The inverse of it, for a gradient of x."""
    return channels.to(x.dtype).view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)


@torch.no_grad()
def average_statistics(module: nn.Module) -> None:
    """Make the running statistics below a module, of unlike parts of a batch, their mean over all processes."""
    group = world()
    if group is None:
        return
    kept = [
        buffer for norm in module.modules() if isinstance(norm, _BatchNorm)
        for buffer in (norm.running_mean, norm.running_var) if buffer is not None
    ]  # fmt: skip
    if kept:
        ranks = Ranks(group.group_name, "average_statistics")
        means = ranks.gather(torch.cat(kept)).mean(0)
        for buffer, mean in zip(kept, means.split([len(b) for b in kept]), strict=True):
            buffer.copy_(mean)
