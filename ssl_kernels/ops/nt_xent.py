"""Normalised temperature-scaled cross-entropy (SimCLR's NT-Xent): checks, reference, and the call of the engine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.softmax import dense_losses, reduce_losses, softmax_contrastive
from ssl_kernels.settings import choose_backend


def nt_xent_loss(z0: Tensor, z1: Tensor, temperature: Tensor | float, *, reduction: str = "mean") -> Tensor:
    """Documented at :func:`ssl_kernels.functional.nt_xent_loss`."""
    z0, z1 = _checks.autocast_widest(z0, z1)  # and not narrower, before they are normalised
    _checks.check_features(z0=z0, z1=z1)
    if z0.shape != z1.shape:
        raise ValueError(f"z1: expected {z0.shape[0]} rows as z0 has, got {z1.shape[0]}")
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    scale = 1 / _checks.as_temperature("temperature", temperature, z0)
    z = torch.cat([unit_rows(z0), unit_rows(z1)])
    (z,) = _checks.autocast_features(z)
    backend = choose_backend(z.device.type, z.dtype)
    if backend == "reference":
        return reference(z, scale, reduction)
    rows = z0.shape[0]
    loss, _ = softmax_contrastive(
        z, None, scale, None, None, positive=rows, excluded=0, seam=rows, reduction=reduction, backend=backend
    )
    return loss


def unit_rows(z: Tensor) -> Tensor:
    """Normalised in the accumulation dtype, returned in that of ``z``."""
    return F.normalize(z.to(_checks.accumulation_dtype(z.dtype)), dim=-1).to(z.dtype)


def reference(z: Tensor, scale: Tensor, reduction: str) -> Tensor:
    """The definition for normalised rows z = [z0; z1]: dense, differentiable any number of times."""
    dtype = _checks.accumulation_dtype(z.dtype)
    with _checks.without_autocast(z):
        logits = scale * (z.to(dtype) @ z.to(dtype).t())
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = itself.roll(len(z) // 2, 0)
        return reduce_losses(*dense_losses(logits, positive, itself), reduction)
