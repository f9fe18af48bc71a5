"""CLIP loss. The loss alone takes one product of 2 B^2 D FLOP, loss and gradients three; ours, which stores no matrix,
takes one more to form it again, which is spared for tiles that are kept within the budget."""

from __future__ import annotations

import functools
import pkgutil

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels import ClipLoss
from ssl_kernels.bench.problem import Floor, Loss, NotComparableError, Op, Problem, gflop, pairs, peer, recomputing
from ssl_kernels.bench.sigmoid import SIGMOID
from ssl_kernels.settings import tile_budget_bytes


def eager(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * x @ y.t(), torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def transformers() -> Loss:
    clip = pkgutil.resolve_name("transformers.models.clip.modeling_clip")
    loss = getattr(clip, "image_text_contrastive_loss", None) or clip.clip_loss  # its name before version 5
    return lambda x, y, scale: loss(scale * y @ x.t())


def memeff() -> Loss:
    # "stable" would rescale the gradients; the temperature is a number and gets none.
    loss = pkgutil.resolve_name("memeff:MemoryEfficientCLIPLoss")(1 / SCALE, normalized_inputs=True, stable=False)
    return lambda x, y, scale: loss(x, y)


def inf_cl(width: int) -> Loss:
    fused = pkgutil.resolve_name("inf_cl:cal_flash_loss")
    head = next((h for h in (256, 128, 64) if width % h == 0), None)
    if head is None:
        raise NotComparableError(f"cuts features into heads of a power of two, which {width} is no multiple of")
    return lambda x, y, scale: sum(fused(a, b, scale=scale, head_dim=head).mean() for a, b in ((x, y), (y, x))) / 2


def both_ways(of_rows: Loss) -> Loss:
    """CLIP of a cross-entropy that multiplies features [B, D] by weights [B, D] itself, and takes labels [B]."""

    def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        labels, sides = torch.arange(len(x), device=x.device), ((x, y), (y, x))
        return sum(of_rows((scale * a).to(x.dtype), b, labels) for a, b in sides) / 2

    return loss


def cut_cross_entropy() -> Loss:
    # Without its filter, which leaves small probabilities out of the gradient.
    fused = pkgutil.resolve_name("cut_cross_entropy:linear_cross_entropy")
    return both_ways(functools.partial(fused, filter_eps=None))


def liger() -> Loss:
    fused = pkgutil.resolve_name("liger_kernel.transformers:LigerFusedLinearCrossEntropyLoss")()
    return both_ways(lambda features, weights, labels: fused(weights, features, labels))


def torch_in_chunks() -> Loss:
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise NotComparableError(f"torch {torch.__version__} has none")
    return both_ways(functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions()))


SCALE = 10.0


def problem(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    def floor(provider: str, backward: bool) -> Floor:
        keeps = provider == "ours" and device.type == "cpu"
        kept = min(1.0, tile_budget_bytes() / (4 * batch**2)) if keeps else 0.0
        products = 1 if not backward else 4 - kept if provider.startswith("ours") else 3
        return Floor(products * gflop(batch, batch, width), width)

    providers = {
        "ours": ClipLoss,
        "ours, recomputing": lambda: recomputing(ClipLoss()),
        "open_clip": peer("open_clip.loss:ClipLoss"),
        "transformers": transformers,
        "memeff": memeff,
        "Inf-CL": lambda: inf_cl(width),
        "cut-cross-entropy": cut_cross_entropy,
        "Liger": liger,
        "quack": lambda: both_ways(pkgutil.resolve_name("quack.linear_cross_entropy:chunked_linear_cross_entropy")),
        "torch, in chunks": torch_in_chunks,
    }
    return Problem(pairs(batch, width, dtype, device, SCALE), eager, providers, floor, not_by={"memeff": (2,)})


CLIP = Op(
    "clip",
    "CLIP",
    problem,
    ("ours", "ours, recomputing", "open_clip", "transformers", "eager", "compile"),
    [(4096, 512), (4096, 128), (4096, 1152)],
    tiny=[(64, 16)],
    sweep=SIGMOID.sweep,
    gpu_shapes=SIGMOID.gpu_shapes,
    quadratic=True,
)
