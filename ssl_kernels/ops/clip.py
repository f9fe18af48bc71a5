"""Symmetric softmax contrastive loss (CLIP): checks, reference, and the call of the engine."""

from __future__ import annotations

from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.softmax import NO_DIAGONAL, Pairs, dense_losses, reduce_losses, softmax_contrastive
from ssl_kernels.settings import choose_backend


def clip_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    *,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same_id: str = "positive",
    offset: int = 0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Documented at :func:`ssl_kernels.functional.clip_loss`."""
    x, y = _checks.autocast_features(x, y)
    _checks.check_features(x=x, y=y)
    _checks.check_ids(x, y, x_ids, y_ids)
    _checks.check_choice("same_id", same_id, ("positive", "ignore"))
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    _checks.check_offset(offset)
    _checks.check_fraction("label_smoothing", label_smoothing)
    if reduction == "none" and (x.shape[0] != y.shape[0] or offset != 0):
        raise ValueError(
            "reduction: 'none' pairs every row with its own column: expected as many rows in x as in y and offset 0, "
            f"got {x.shape[0]}, {y.shape[0]} and {offset}"
        )
    scale = _checks.as_softmax_scale("scale", scale, x)
    ignore_same_id = same_id == "ignore"
    backend = choose_backend(x.device.type, x.dtype)
    if backend == "reference":
        return reference(x, y, scale, x_ids, y_ids, ignore_same_id, offset, label_smoothing, reduction)
    loss, _ = softmax_contrastive(
        x, y, scale, x_ids, y_ids, ignore_same_id=ignore_same_id, positive=offset, label_smoothing=label_smoothing,
        reduction=reduction, backend=backend,
    )  # fmt: skip
    return loss


def reference(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    ignore_same_id: bool,
    offset: int,
    label_smoothing: float,
    reduction: str,
) -> Tensor:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    dtype = _checks.accumulation_dtype(x.dtype)
    with _checks.without_autocast(x):
        z = scale * (x.to(dtype) @ y.to(dtype).t())
        positive, ignored = Pairs(x_ids, y_ids, ignore_same_id, offset, NO_DIAGONAL).masks(z.shape, z.device)
        rows, paired_rows = dense_losses(z, positive, ignored, label_smoothing)
        cols, paired_cols = dense_losses(z.t(), positive.t(), ignored.t(), label_smoothing)
        return (reduce_losses(rows, paired_rows, reduction) + reduce_losses(cols, paired_cols, reduction)) / 2
