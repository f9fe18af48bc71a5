"""Sigmoid contrastive loss (SigLIP): schema, reference, backends, fake and autograd.

All gradients exist at the end of the forward pass: one pass over the tiles costs 3 units (2 M N D FLOP each) where
autograd over the dense formula costs 3 units and several passes over M x N in memory. For ``reduction="none"`` the
weight of each row is known only in the backward pass, which then visits the tiles again: 4 units.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops._triton import triton_kernels
from ssl_kernels.ops.gradients import finish_gradients
from ssl_kernels.ops.matmul import matmul
from ssl_kernels.ops.panels import run_panels
from ssl_kernels.settings import choose_backend, workspace_bytes


def sigmoid_contrastive_loss(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    *,
    x_ids: Tensor | None = None,
    y_ids: Tensor | None = None,
    same_id: str = "positive",
    offset: int = 0,
    reduction: str = "mean",
) -> Tensor:
    r"""Pairwise sigmoid loss of SigLIP, in memory linear in the batch, with exact gradients.

    .. math:: L = \frac{1}{M} \sum_{ij} \operatorname{softplus}(-s_{ij} (t\, x_i \cdot y_j + b)),
              \qquad s_{ij} = +1 \text{ on positives}, -1 \text{ elsewhere}

    Args:
        x: [M, D] features (images), float32, bfloat16, float16 or float64, any strides. Normalise them first; the
            function does not.
        y: [N, D] features (texts), of the dtype and device of ``x``.
        scale: t > 0, already exponentiated, a float or a floating tensor of one element; gradients flow to tensors.
        bias: b, likewise. SigLIP starts from t = 10, b = -10.
        x_ids, y_ids: int64 [M] and [N], both or neither. Pairs with equal ids are positive (``same_id="positive"``)
            or left out of the sum (``same_id="ignore"``).
        offset: pair (i, i + offset) is always positive, whatever the ids say; out of range it is no pair.
        reduction: "mean" divides the sum over all pairs by M, "sum" does not, "none" gives the sum of each row, [M].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features). The mean over no rows is NaN.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: on double backward, which only the reference backend supports.

    Under autocast, ``x`` and ``y`` are cast as for a matrix product; the loss is still accumulated in float32.
    float32 products follow ``torch.get_float32_matmul_precision()``. Between forward and backward the sums of the
    gradients that are needed are kept, [M, D] and [N, D] in float32. A tile, and a panel of features, take at most
    ``SSL_KERNELS_WORKSPACE_MB`` (default 64) megabytes each; see :func:`ssl_kernels.use_workspace`.

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023, arXiv:2303.15343.

    >>> import torch, ssl_kernels.functional as K
    >>> x = torch.nn.functional.normalize(torch.arange(8.0).reshape(4, 2), dim=-1).requires_grad_()
    >>> y = x.detach().flip(1)
    >>> loss = K.sigmoid_contrastive_loss(x, y, 10.0, -10.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(x.grad.shape)
    (4.0231, (4, 2))
    """
    x, y = _checks.autocast_features(x, y)
    _checks.check_features(x=x, y=y)
    _checks.check_ids(x, y, x_ids, y_ids)
    _checks.check_choice("same_id", same_id, ("positive", "ignore"))
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    _checks.check_offset(offset)
    scale = _checks.as_scalar("scale", scale, x)
    bias = _checks.as_scalar("bias", bias, x)
    ignore_same_id = same_id == "ignore"
    backend = choose_backend(x.device.type, x.dtype)
    if backend == "reference":
        return reference(x, y, scale, bias, x_ids, y_ids, ignore_same_id, offset, reduction)
    _checks.check_transforms(x, y, scale, bias)
    grad = torch.is_grad_enabled()
    needs_grad = [grad and t.requires_grad for t in (x, y, scale, bias)]
    loss: Tensor = _sigmoid_contrastive(
        x, y, scale, bias, x_ids, y_ids, None, ignore_same_id, offset, reduction, needs_grad, workspace_bytes(), backend
    )[0]
    return loss


def reference(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    ignore_same_id: bool,
    offset: int,
    reduction: str,
) -> Tensor:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    dtype = _checks.accumulation_dtype(x.dtype)
    with _checks.without_autocast(x):
        z = scale * (x.to(dtype) @ y.to(dtype).t()) + bias
        positive, ignored = _pair_masks(z.shape, offset, x_ids, y_ids, ignore_same_id, z.device)
        loss = -F.logsigmoid(torch.where(positive, z, -z))
        if ignored is not None:
            loss = loss.masked_fill(ignored, 0)
        rows = loss.sum(1)
    if reduction == "none":
        return rows
    return rows.sum() / x.shape[0] if reduction == "mean" else rows.sum()


def _pair_masks(
    shape: Sequence[int],
    diagonal: int,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    ignore_same_id: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Which pairs are positive, and which are left out (None where no pair is)."""
    row = torch.arange(shape[0], device=device)[:, None]
    col = torch.arange(shape[1], device=device)[None, :]
    positive = col - row == diagonal
    if x_ids is None or y_ids is None:
        return positive, None
    same = x_ids[:, None] == y_ids[None, :]
    if ignore_same_id:
        return positive, same & ~positive
    return positive | same, None


# The panel function of each backend takes the same arguments: x [m, D], y [n, D]; stats [m, 3] float64 (or [m, 1] when
# only the loss is wanted), to which per-row sums of the loss, of G (x_i . y_j) and of G are added; 0-dim scale and
# bias; int64 ids or None; the column of the positive of row 0. It returns G [m, n] if ``write_grad``.


def _panel_eager(
    x: Tensor,
    y: Tensor,
    stats: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    ignore_same_id: bool,
    diagonal: int,
    write_grad: bool,
) -> Tensor | None:
    raw = matmul(x, y.t())
    z = scale * raw + bias
    positive, ignored = _pair_masks(raw.shape, diagonal, x_ids, y_ids, ignore_same_id, raw.device)
    z = torch.where(positive, -z, z)
    loss = -F.logsigmoid(-z)
    if ignored is not None:
        loss = loss.masked_fill(ignored, 0)
        raw = raw.masked_fill(ignored, 0)
    stats[:, 0] += loss.sum(1)
    if stats.shape[1] == 1:
        return None
    grad = torch.sigmoid(z)
    grad = torch.where(positive, -grad, grad)
    if ignored is not None:
        grad = grad.masked_fill(ignored, 0)
    stats[:, 1] += (grad * raw).sum(1)
    stats[:, 2] += grad.sum(1)
    return grad if write_grad else None


def _panel_cpu(
    x: Tensor,
    y: Tensor,
    stats: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    ignore_same_id: bool,
    diagonal: int,
    write_grad: bool,
) -> Tensor | None:
    tile = matmul(x, y.t())
    torch.ops.ssl_kernels.sigmoid_panel_(
        tile, stats, scale.item(), bias.item(), x_ids, y_ids, ignore_same_id, diagonal, write_grad
    )
    return tile if write_grad else None


def _panel_triton(
    x: Tensor,
    y: Tensor,
    stats: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    ignore_same_id: bool,
    diagonal: int,
    write_grad: bool,
) -> Tensor | None:
    m, n = x.shape[0], y.shape[0]
    grad = x.new_empty(m, -(-n // 16) * 16)[:, :n] if write_grad else None  # aligned rows, for wide stores
    triton_kernels("sigmoid").sigmoid_panel(x, y, grad, stats, scale, bias, x_ids, y_ids, ignore_same_id, diagonal)
    return grad


_PANELS = {"eager": _panel_eager, "cpu": _panel_cpu, "triton": _panel_triton}
_TILES = {"eager": 8, "cpu": 1, "triton": 1}  # tiles that each holds at a time


@torch.library.custom_op(
    "ssl_kernels::sigmoid_contrastive",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor y, Tensor scale, Tensor bias, Tensor? x_ids, Tensor? y_ids, Tensor? row_weight, "
        "bool ignore_same_id, SymInt offset, str reduction, bool[] needs_grad, int workspace, str backend) "
        "-> (Tensor loss, Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)"
    ),
)
def _sigmoid_contrastive(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    row_weight: Tensor | None,
    ignore_same_id: bool,
    offset: int,
    reduction: str,
    needs_grad: Sequence[bool],
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and sum_ij w_i G_ij times y_j, x_i, x_i . y_j and 1, where needed: the derivatives of the loss's sum
    but for the factor ``scale`` in dx and dy, which waits for the upstream gradient."""
    needs_grad = needs_grad if reduction != "none" else [False] * 4
    want_dx, want_dy = needs_grad[0], needs_grad[1]
    dtype = _checks.accumulation_dtype(x.dtype)
    x_ids = None if x_ids is None else x_ids.contiguous()
    y_ids = None if y_ids is None else y_ids.contiguous()
    panel_function = _PANELS[backend]

    def panel(x_i: Tensor, y_j: Tensor, stats: Tensor, i: int, j: int) -> Tensor | None:
        row_ids = None if x_ids is None else x_ids[i : i + x_i.shape[0]]
        col_ids = None if y_ids is None else y_ids[j : j + y_j.shape[0]]
        return panel_function(
            x_i, y_j, stats, scale, bias, row_ids, col_ids, ignore_same_id, offset + i - j, want_dx or want_dy
        )

    tiles = 0 if backend == "triton" and not (want_dx or want_dy) else _TILES[backend]
    tiles += 0 if row_weight is None else 2  # weighted products hold the tile in fp32
    with _checks.without_autocast(x):
        stats, dx, dy = run_panels(
            panel,
            x,
            y,
            workspace=workspace,
            compute_dtype=x.dtype if backend == "triton" else dtype,
            tiles=tiles,
            tile_scale=triton_kernels("sigmoid").gradient_scale(x.dtype) if backend == "triton" else 1.0,
            stats_width=3 if any(needs_grad) else 1,
            want_dx=want_dx,
            want_dy=want_dy,
            row_weight=row_weight,
        )
    if row_weight is not None:
        weight = row_weight[:, None]
        stats = stats * weight
        if want_dx:
            dx *= weight
    empty = stats.new_empty(0, dtype=dtype)
    loss = stats[:, 0].to(dtype) if reduction == "none" else stats[:, 0].sum().to(dtype)
    if reduction == "mean":
        loss = loss / x.shape[0]
    dscale = stats[:, 1].sum().to(dtype) if needs_grad[2] else empty
    dbias = stats[:, 2].sum().to(dtype) if needs_grad[3] else empty.clone()
    return loss, dx, dy, dscale, dbias


@_sigmoid_contrastive.register_fake
def _(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    bias: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    row_weight: Tensor | None,
    ignore_same_id: bool,
    offset: int,
    reduction: str,
    needs_grad: Sequence[bool],
    workspace: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _checks.accumulation_dtype(x.dtype)
    needs_grad = needs_grad if reduction != "none" else [False] * 4
    new = functools.partial(x.new_empty, dtype=dtype)
    return (
        new(x.shape[0] if reduction == "none" else ()),
        new(x.shape[0] if needs_grad[0] else 0, x.shape[1]),
        new(y.shape[1], y.shape[0] if needs_grad[1] else 0).t(),
        new(() if needs_grad[2] else 0),
        new(() if needs_grad[3] else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, bias, x_ids, y_ids, _, *options = inputs
    _, dx, dy, dscale, dbias = output
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.rows, ctx.options = x.dtype, x.shape[0], options
    if options[2] == "none":
        ctx.save_for_backward(x, y, scale, bias, x_ids, y_ids)
    else:
        ctx.save_for_backward(scale, dx, dy, dscale, dbias)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 9
    if grad_loss is None:
        return (None,) * 4 + rest
    ignore_same_id, offset, reduction, needs_grad, workspace, backend = ctx.options
    if reduction == "none":
        x, y, scale, bias, x_ids, y_ids = ctx.saved_tensors
        _, *sums = _sigmoid_contrastive(
            x,
            y,
            scale,
            bias,
            x_ids,
            y_ids,
            grad_loss,
            ignore_same_id,
            offset,
            "sum",
            needs_grad,
            workspace,
            backend,
        )
        upstream = torch.ones_like(scale)
    else:
        scale, *sums = ctx.saved_tensors
        upstream = grad_loss / max(ctx.rows, 1) if reduction == "mean" else grad_loss
    gradients = finish_gradients(upstream, scale, *sums, ctx.dtype)
    return (*(g if needed else None for g, needed in zip(gradients, needs_grad, strict=True)), *rest)


_sigmoid_contrastive.register_autograd(_backward, setup_context=_setup_context)
