"""Supervised contrastive loss (SupCon): checks, reference, and the call of the engine."""

from __future__ import annotations

from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.softmax import NO_DIAGONAL, Pairs, dense_losses, reduce_losses, softmax_contrastive
from ssl_kernels.settings import choose_backend


def sup_con_loss(
    z: Tensor, ids: Tensor, temperature: Tensor | float, *, reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Documented at :func:`ssl_kernels.functional.sup_con_loss`; returns the number of unpaired rows, too."""
    (z,) = _checks.autocast_features(z)
    _checks.check_features(z=z)
    _checks.check_row_ids("ids", ids, z)
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    scale = 1 / _checks.as_temperature("temperature", temperature, z)
    backend = choose_backend(z.device.type, z.dtype)
    if backend == "reference":
        return reference(z, ids, scale, reduction)
    return softmax_contrastive(z, None, scale, ids, None, excluded=0, reduction=reduction, backend=backend)


def reference(z: Tensor, ids: Tensor, scale: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    dtype = _checks.accumulation_dtype(z.dtype)
    with _checks.without_autocast(z):
        logits = scale * (z.to(dtype) @ z.to(dtype).t())
        masks = Pairs(ids, ids, False, NO_DIAGONAL, 0).masks(logits.shape, z.device)
        losses, paired = dense_losses(logits, *masks)
        return reduce_losses(losses, paired, reduction), (~paired).sum()
