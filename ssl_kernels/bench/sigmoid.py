"""SigLIP loss: three products of 2 B^2 D FLOP for loss and gradients, one for the loss alone."""

from __future__ import annotations

import pkgutil

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels import SigLipLoss
from ssl_kernels.bench.problem import Floor, Loss, Op, Problem, gflop, pairs, peer


def eager(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(signs * (scale * x @ y.t() + bias)).sum() / len(x)


def siglip_kernel() -> Loss:
    fused = pkgutil.resolve_name("siglip_kernel:fused_siglip_loss")
    return lambda x, y, scale, bias: fused(x, y, scale.log(), bias)  # takes the logarithm of the scale


def problem(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    def floor(provider: str, backward: bool) -> Floor:
        return Floor((3 if backward else 1) * gflop(batch, batch, width), width)

    providers = {"ours": SigLipLoss, "open_clip": peer("open_clip.loss:SigLipLoss"), "siglip-kernel": siglip_kernel}
    return Problem(pairs(batch, width, dtype, device, 10.0, -10.0), eager, providers, floor)


SIGMOID = Op(
    "sigmoid",
    "SigLIP",
    problem,
    ("ours", "open_clip", "eager", "compile"),
    [(4096, 512), (4096, 128), (4096, 1152)],
    tiny=[(64, 16)],
    sweep=[(2**k, 512) for k in range(8, 15)],
    gpu_shapes=[(8192, 512), (8192, 1152), (32_768, 768), (65_536, 512), (131_072, 512), (131_072, 1152)],
    quadratic=True,
)
