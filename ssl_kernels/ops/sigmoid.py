"""Sigmoid contrastive loss (SigLIP): arguments, reference, backends, fake and autograd.

All gradients exist at the end of the forward pass: one pass over the tiles costs 3 units (2 M N D FLOP each) where
autograd over the dense formula costs 3 units and several passes over M x N in memory. For ``reduction="none"`` the
weight of each row is known only in the backward pass, which then visits the tiles again: 4 units.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.distributed import Group, across
from ssl_kernels.ops import _checks, contrastive
from ssl_kernels.ops._op import Op
from ssl_kernels.ops.contrastive import NO_DIAGONAL, Pairs, Result, wanted_gradients, weighted_sums
from ssl_kernels.ops.matmul import matmul
from ssl_kernels.ops.panels import gradient_of_columns, run_panels
from ssl_kernels.ops.strips import Matrix, gathered
from ssl_kernels.settings import choose_backend, workspace_bytes

KERNELS = ("cpu", "triton")


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
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    even_batches: bool = False,
    own_share: bool = False,
) -> Tensor:
    r"""Pairwise sigmoid loss of SigLIP, with exact gradients, in memory that is linear in the batch.

    .. math:: L = \frac{1}{M} \sum_{ij} \operatorname{softplus}(-s_{ij} (t\, x_i \cdot y_j + b)),
              \qquad s_{ij} = +1 \text{ on positives}, -1 \text{ elsewhere}

    Args:
        x: [M, D] features, such as those of images, in float32, bfloat16, float16 or float64 and with any strides.
            Normalise them first; this function does not.
        y: [N, D] features, such as those of texts, of the same dtype and device as ``x``.
        scale: t > 0, not its logarithm. A float, or a floating-point tensor of one element, which gets a gradient.
        bias: b, a float or a tensor likewise. SigLIP starts from t = 10 and b = -10.
        x_ids, y_ids: int64 [M] and [N], both or neither. Pairs with equal ids are positive if ``same_id`` is
            "positive", and left out of the sum if it is "ignore".
        offset: row i of ``x`` and row i + offset of ``y`` are a positive pair, whatever the ids say, if there are such
            rows.
        reduction: "mean" divides the sum over all pairs by M, "sum" does not, and "none" returns the sum of each row,
            [M].
        group, strategy, grad_reduce, even_batches, own_share: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group the loss is over the rows of this process alone.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features). The mean over no rows is NaN.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    Under autocast, ``x`` and ``y`` are cast as for a matrix product; the loss is still accumulated in float32. float32
    products follow ``torch.get_float32_matmul_precision()``. Between forward and backward, the gradients that are
    needed are kept, [M, D] and [N, D] in float32. A tile of similarities and a panel of features take at most
    ``SSL_KERNELS_WORKSPACE_MB`` megabytes each, 64 by default and 256 on a GPU; see :func:`ssl_kernels.use_workspace`.

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
    _checks.check_pairs(x, y, x_ids, y_ids, same_id, offset, reduction)
    scale = _checks.as_scalar("scale", scale, x)
    bias = _checks.as_scalar("bias", bias, x)
    over = across(group, strategy, grad_reduce, even_batches, own_share, reduction)
    pairs = Pairs(x_ids, y_ids, same_id == "ignore", offset, NO_DIAGONAL)
    backend = choose_backend(x.device, x.dtype, KERNELS)
    if backend == "reference":
        (x, y), (scale, bias), pairs = gathered(
            over, (x, y), (scale, bias), pairs, what="sigmoid_contrastive_loss", reduction=reduction
        )
        return reference(x, y, scale, bias, pairs, reduction)
    _checks.check_transforms(x, y, scale, bias)
    grad = torch.is_grad_enabled()
    needs_grad = [grad and t.requires_grad for t in (x, y, scale, bias)]
    workspace = workspace_bytes(x.device)
    arguments = Arguments(x, y, scale, bias, *pairs, None, reduction, needs_grad, workspace, backend, *over)
    loss: Tensor = _op(arguments)[0]
    return loss


def reference(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, pairs: Pairs, reduction: str) -> Tensor:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    dtype = _checks.accumulation_dtype(x.dtype)
    with _checks.without_autocast(x):
        z = scale * (x.to(dtype) @ y.to(dtype).t()) + bias
        positive, ignored = pairs.masks(z.shape, z.device)
        rows = (-F.logsigmoid(torch.where(positive, z, -z))).masked_fill(ignored, 0).sum(1)
    return rows if reduction == "none" else rows.sum() / (x.shape[0] if reduction == "mean" else 1)


class Arguments(NamedTuple):
    x: Tensor
    y: Tensor
    scale: Tensor
    bias: Tensor
    x_ids: Tensor | None
    y_ids: Tensor | None
    ignore_same_id: bool
    positive: int
    excluded: int
    row_weight: Tensor | None
    reduction: str
    needs_grad: Sequence[bool]  # of the first four
    workspace: int
    backend: str
    group: str  # this and what follows is Across
    strategy: str
    grad_reduce: str
    even_batches: bool
    own_share: bool


# The panel function of a backend takes the arguments, of which it uses scale and bias, and panels x [m, D] and y [n, D]
# with what their pairs are. To stats [m, 3] float64 (or [m, 1] when only the loss is wanted) it adds per-row sums of
# the loss, of G (x_i . y_j) and of G. It returns G [m, n] if ``write``.


def _panel_eager(a: Arguments, x: Tensor, y: Tensor, stats: Tensor, pairs: Pairs, write: bool) -> Tensor | None:
    raw = matmul(x, y.t())
    positive, ignored = pairs.masks(raw.shape, raw.device)
    z = a.scale * raw + a.bias
    z = torch.where(positive, -z, z)
    stats[:, 0] += (-F.logsigmoid(-z)).masked_fill(ignored, 0).sum(1)
    if stats.shape[1] == 1:
        return None
    grad = torch.sigmoid(z)
    grad = torch.where(positive, -grad, grad).masked_fill(ignored, 0)
    stats[:, 1] += (grad * raw.masked_fill(ignored, 0)).sum(1)
    stats[:, 2] += grad.sum(1)
    return grad if write else None


def _panel_cpu(a: Arguments, x: Tensor, y: Tensor, stats: Tensor, pairs: Pairs, write: bool) -> Tensor | None:
    tile = matmul(x, y.t())
    torch.ops.ssl_kernels.sigmoid_panel_(tile, stats, a.scale.item(), a.bias.item(), *pairs[:4], write)
    return tile if write else None


def _panel_triton(
    a: Arguments, x: Tensor, y: Tensor, stats: Tensor, pairs: Pairs, write: bool, scratch: Any
) -> Tensor | None:
    from ssl_kernels.kernels.sigmoid import sigmoid_panel

    grad = scratch.gradient(x, y.shape[0]) if write else None
    sigmoid_panel(x, y, grad, stats, a.scale, a.bias, *pairs[:4], scratch=scratch)
    return grad


_PANELS: dict[str, Callable[..., Tensor | None]] = {
    "eager": _panel_eager,
    "cpu": _panel_cpu,
    "triton": _panel_triton,  # takes the Scratch of the pass, too, where row sums wait
}
_TILES = {"eager": 8, "cpu": 1, "triton": 1}  # tiles that each holds at a time


def _forward(a: Arguments) -> Result:
    """The loss, and sum_ij w_i G_ij times y_j, x_i, x_i . y_j and 1, where needed."""
    want_dx, want_dy, *_ = wanted = wanted_gradients(a)
    dtype, triton = _checks.accumulation_dtype(a.x.dtype), a.backend == "triton"
    divisor: int = len(a.x) if a.reduction == "mean" else 1
    write = want_dx or want_dy

    def panel(pairs: Pairs, scratch: Any, x: Tensor, y: Tensor, stats: Tensor, i: int, j: int) -> Tensor | None:
        more = () if scratch is None else (scratch,)
        return _PANELS[a.backend](a, x, y, stats, pairs.part(i, x.shape[0], j, y.shape[0]), write, *more)

    tiles = 0 if triton and not write else _TILES[a.backend]
    run = functools.partial(
        run_panels,
        workspace=a.workspace,
        compute_dtype=a.x.dtype if triton else dtype,
        tiles=tiles + (0 if a.row_weight is None else 2),  # weighted products hold the tile in fp32
        stats_width=3 if any(wanted) else 1,
        row_weight=a.row_weight,
    )
    with _checks.without_autocast(a.x):
        if contrastive.is_one_tile(a):
            one = a.x.to(dtype), a.y.to(dtype), a.scale.item(), a.bias.item(), *Pairs.of(a)[:4], divisor
            return Result(*torch.ops.ssl_kernels.sigmoid_of_one_tile(*one, want_dx, want_dy, any(wanted)))
        matrix = Matrix(a, "sigmoid_contrastive_loss", reduction=a.reduction)
        gradients: list[Tensor] = []  # of x and y
        counted: list[Tensor] = []  # statistics of the pairs that count here
        for strip in matrix.strips(want_dx or not want_dy, want_dy):
            own, scratch = strip.is_own, contrastive.scratch_of(a.backend, strip.y, a.workspace)
            stats, dx, dy = run(
                functools.partial(panel, strip.pairs, scratch), strip.x, strip.y,
                want_dx=want_dx if own else wanted[strip.side], want_dy=want_dy and own,
                dx=None if own else gradients[strip.side], add=not own,
            )  # fmt: skip
            if scratch is not None:
                scratch.reduce()
            gradients = [dx, dy] if own else gradients
            counted += [stats] if strip.is_counted else []
    dx, dy = gradients
    if triton:
        from ssl_kernels.kernels.sigmoid import gradient_scale

        contrastive.divide((dx, dy), gradient_scale(a.x.dtype))
    if a.row_weight is not None and want_dx:
        dx *= a.row_weight[:, None]
    if a.group:
        sums = torch.stack([stats.sum(0) for stats in counted])
        divisor = matrix.count(0) if a.reduction == "mean" else 1
        loss, scalars = matrix.shared(*weighted_sums(sums, None, divisor, sums.dtype), dtype)
    else:
        (stats,) = counted
        loss, scalars = weighted_sums(stats, a.row_weight, divisor, dtype)
    return Result(stats[:, 0].to(dtype) if a.reduction == "none" else loss, dx, dy, scalars)


def _fake(a: Arguments) -> Result:
    new = functools.partial(a.x.new_empty, dtype=_checks.accumulation_dtype(a.x.dtype))
    want_dx, want_dy, *_ = wanted_gradients(a)
    return Result(
        loss=new(a.x.shape[0] if a.reduction == "none" else ()),
        dx=new(a.x.shape[0] if want_dx else 0, a.x.shape[1]),
        dy=gradient_of_columns(new, a.y.shape[0] if want_dy else 0, a.x.shape[1], a.x.device),
        scalars=new(3),
    )


_op: Op[Arguments] = Op(
    "sigmoid_contrastive",
    Arguments,
    f"({contrastive.RESULT})",
    forward=_forward,
    fake=_fake,
    setup_context=contrastive.setup_context,
    backward=lambda ctx, *upstream: contrastive.backward(_op, ctx, *upstream),
)
