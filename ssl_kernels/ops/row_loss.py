"""The op of the softmax over rows: from statistics to the loss, its gradients, and what autograd sees of them."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops._op import Op, may_overwrite, owns_outputs
from ssl_kernels.ops.contrastive import (
    Finish,
    finish_gradients,
    finish_in_place,
    finish_with_triton,
    fit_one_tile,
    no_double_backward,
)
from ssl_kernels.ops.panels import gradient_of_columns
from ssl_kernels.ops.reuse import fit_budget
from ssl_kernels.ops.row_passes import Arguments, Gradients, Passes, stats_width, wanted_gradients
from ssl_kernels.ops.row_strips import RowMatrix
from ssl_kernels.ops.row_tiles import SAME_ID, Rule, Weights


class _Summary(NamedTuple):
    """What the statistics of the rows come to.

    A side [4, M], or [5, M] with label smoothing, has what the gradient needs to know of each row: the largest v that
    counts and the logarithm of the sum of exponentials against it; its weight in the loss, what is taken from every
    positive pair, and from every pair that counts. Weights are divided by the unit, the largest, so that G is of order
    1 wherever it is stored in 16 bits.
    """

    loss: Tensor
    unit: Tensor  # of one element
    sides: Tensor  # [K, 4 or 5, M]


def _summarise(a: Arguments, matrix: RowMatrix, stats: Tensor, logit_unit: Tensor, want_sides: bool) -> _Summary:
    """Of what a rank adds to the loss, divided by what all ranks have."""
    dtype = _checks.accumulation_dtype(a.x.dtype)
    if a.group or a.x.device.type != "cpu" or dtype != torch.float32:
        return _summarise_eager(a, matrix, stats, logit_unit.to(stats.dtype))
    rows, planes = len(a.x), stats_width(a) // 2 + 2 if want_sides else 0
    loss, unit = a.x.new_zeros(rows if a.reduction == "none" else (), dtype=dtype), a.x.new_empty(1, dtype=dtype)
    sides = a.x.new_empty(len(a.dims), planes, rows, dtype=dtype)
    weights = None if a.weights is None else a.weights.contiguous()
    options = logit_unit.item(), a.label_smoothing, a.reduction == "mean", a.lse, weights
    of_prefix = loss if len(a.dims) == 1 else torch.empty_like(loss)
    for k, (weight, largest) in enumerate(_shares(a)):
        torch.ops.ssl_kernels.row_softmax_summary_(stats[k], *options, of_prefix, unit, sides[k])
        if of_prefix is not loss:
            loss += weight * of_prefix
        elif weight != 1:
            loss *= weight
        if weight != largest:
            sides[k, 2:] *= weight / largest
    return _Summary(loss, unit * largest if largest != 1 else unit, sides)


def _shares(a: Arguments) -> list[tuple[float, float]]:
    """The weight of each prefix, and the largest of all."""
    largest = max(map(abs, a.dim_weights)) or 1.0
    return [(weight, largest) for weight in a.dim_weights]


def _summarise_eager(a: Arguments, matrix: RowMatrix, stats: Tensor, logit_unit: Tensor) -> _Summary:
    dtype = _checks.accumulation_dtype(a.x.dtype)
    top, total, positive, positives, *every = stats.unbind(-1)  # [K, M] each
    counted = total != 0 if a.lse else positives != 0
    if a.lse:
        losses = (logit_unit * top + total.log()).masked_fill(~counted, -torch.inf)
    else:
        gap = top - positive / positives
        if a.label_smoothing:
            gap = (1 - a.label_smoothing) * gap + a.label_smoothing * (top - every[0] / every[1])
        losses = (logit_unit * gap + total.log()).masked_fill(~counted, 0)
    weights = torch.ones_like(top[0]) if a.weights is None else a.weights.to(stats.dtype)
    shares = stats.new_tensor([weight for weight, _ in _shares(a)])[:, None]
    rows = (shares * losses.masked_fill(weights == 0, 0)).sum(0) * weights
    divisor = matrix.sum(counted[0].sum()).clamp(min=1) if a.reduction == "mean" else 1
    loss = rows if a.reduction == "none" else rows.sum() / divisor
    largest = matrix.largest(weights.abs().amax() if len(weights) else weights.new_zeros(()))
    largest = torch.where(largest == 0, 1, largest)
    weight = (weights / largest * shares / _shares(a)[0][1]).masked_fill(~counted, 0)
    nothing = weight == 0  # so that no 0 meets an infinite exponential
    vectors = [top.masked_fill(nothing, 0), total.log().masked_fill(nothing, torch.inf), weight]
    vectors.append(torch.zeros_like(weight) if a.lse else (1 - a.label_smoothing) * weight / positives.clamp(min=1))
    if a.label_smoothing:
        vectors.append(a.label_smoothing * weight / every[1].clamp(min=1))
    unit = largest * _shares(a)[0][1] / divisor
    is_part = a.group and a.reduction != "none"
    return _Summary(loss if is_part else loss.to(dtype), unit.view(1), torch.stack(vectors, 1).to(dtype))


def _forward(a: Arguments) -> tuple[Tensor, ...]:
    """Loss, gradients by x and y and of the scale, as a :class:`ssl_kernels.ops.contrastive.Result` has them; the
    gradient by the bias, and statistics for a backward pass that is to know the weights of the rows."""
    _check_targets(a)
    wanted = wanted_gradients(a)
    if any(wanted):
        fit_budget()
    with _checks.without_autocast(a.x):
        if _is_one_tile(a):
            return _of_one_tile(a, wanted)
        passes = Passes(a)
        rows = passes.rows_of_one_visit()
        if rows:
            loss, unit, (dx, dy, moment, dbias) = _in_one_visit(a, passes, rows)
            stats = a.x.new_empty(0, dtype=torch.float64)
        else:
            loss, unit, (dx, dy, moment, dbias), stats = _in_two_passes(a, passes)
        scalars = torch.stack([moment.to(unit.dtype), torch.zeros_like(unit[0]), unit[0]]).to(dx.dtype)
        if a.group and a.reduction != "none":
            loss, scalars = passes.matrix.shared(loss, scalars.to(loss.dtype), dx.dtype)
    return loss, dx, dy, scalars, dbias, stats if a.reduction == "none" else stats.new_empty(0)


def _in_two_passes(a: Arguments, passes: Passes) -> tuple[Tensor, Tensor, Gradients, Tensor]:
    """The loss, the unit of the gradients, these, and the statistics."""
    want = any(wanted_gradients(a))
    stats = a.stats
    if stats is None:
        stats = passes.statistics()
        if not _may_look(a):
            stats[:, :, 1::2].masked_fill_((a.target >= len(a.y))[:, None], torch.nan)
    loss, unit, sides = _summarise(a, passes.matrix, stats, passes.unit(), want)
    if want:
        return loss, unit, passes.gradients(sides), stats
    _, dx, dy, _, dbias, _ = _fake(a._replace(needs_grad=[False] * 4))  # empty
    return loss, unit, Gradients(dx, dy, unit.new_zeros(()), dbias), stats


def _in_one_visit(a: Arguments, passes: Passes, rows: int) -> tuple[Tensor, Tensor, Gradients]:
    weights = None if a.weights is None else a.weights.contiguous()
    largest = 1.0 if weights is None else weights.abs().amax().item() or 1.0
    shares = [weight / of_all for weight, of_all in _shares(a)]
    stats, gradients = passes.in_one_visit(rows, Weights(weights, largest, shares, a.label_smoothing))
    loss, unit, _ = _summarise(a, passes.matrix, stats, passes.unit(), False)
    return loss, unit, gradients


def _may_look(a: Arguments) -> bool:
    """Whether to look at numbers is not to wait for the device. Else what is wrong becomes NaN."""
    return a.x.device.type == "cpu"


def _check_targets(a: Arguments) -> None:
    if _may_look(a) and a.target.numel() and int(a.target.max()) >= len(a.y):
        raise ValueError(f"target: expected numbers below {len(a.y)}, one to a candidate, got {int(a.target.max())}")


def _is_one_tile(a: Arguments) -> bool:
    if a.backend != "cpu" or a.group or a.reduction == "none" or a.x_guide is not None or a.stats is not None:
        return False
    if a.normalize or a.lse or list(a.dim_weights) != [1.0]:
        return False
    return fit_one_tile(a.x, a.y, a.workspace)


def _of_one_tile(a: Arguments, wanted: Any) -> tuple[Tensor, ...]:
    rule = Rule(a.scale, a.same_id, a.hardness, a.hardened, a.dims, False)
    x, y = a.x.to(torch.float32), a.y.to(torch.float32)
    weights, ids, bias = (None if t is None else t.contiguous() for t in (a.weights, a.x_ids, a.bias))
    y_ids = None if a.y_ids is None else a.y_ids.contiguous()
    pairs = a.target, ids, y_ids, SAME_ID.index(a.same_id)
    loss, dx, dy, scalars, dbias = torch.ops.ssl_kernels.row_softmax_of_one_tile(
        x, y, weights, a.label_smoothing, a.reduction == "mean", *wanted, *pairs,
        rule.has_logits(bias), *rule.scales(a.scale.item()), bias,
    )  # fmt: skip
    return loss, dx, dy, scalars, dbias, x.new_empty(0, dtype=torch.float64)


def _fake(a: Arguments) -> tuple[Tensor, ...]:
    new = functools.partial(a.x.new_empty, dtype=_checks.accumulation_dtype(a.x.dtype))
    want_dx, want_dy, _, want_bias = wanted_gradients(a)
    (rows, width), cols = a.x.shape, a.y.shape[0]
    stats_dtype = torch.float32 if a.x.device.type == "mps" else torch.float64
    kept = (len(a.dims), rows, stats_width(a)) if a.reduction == "none" else (0,)
    return (
        new(rows if a.reduction == "none" else ()),
        new(rows if want_dx else 0, width),
        gradient_of_columns(new, cols if want_dy else 0, width, a.x.device),
        new(3),
        new(cols if want_bias else 0),
        a.x.new_empty(kept, dtype=stats_dtype),
    )


def _setup_context(ctx: Any, a: Any, output: tuple[Tensor, ...]) -> None:
    """The gradients among the outputs stay differentiable, that a second backward pass meets an error."""
    _, dx, dy, scalars, dbias, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.backend, ctx.again = a.x.dtype, a.backend, None
    if a.reduction == "none":
        tensors = {name: value for name, value in a._asdict().items() if isinstance(value, Tensor)} | {"stats": stats}
        ctx.again, ctx.names = a._replace(**dict.fromkeys(tensors), reduction="sum"), list(tensors)
        ctx.save_for_backward(*tensors.values())
    else:
        ctx.save_for_backward(a.scale, dx, dy, scalars, dbias)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * len(Arguments._fields)
    if ctx.again is None:
        scale, dx, dy, scalars, dbias = ctx.saved_tensors
    else:
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        weights = tensors.pop("weights", None)
        tensors["weights"] = upstream if weights is None else upstream * weights
        _, dx, dy, scalars, dbias, _ = row_softmax(ctx.again._replace(**tensors))
        scale, upstream = tensors["scale"], None
    sums = Finishing(upstream, scale, dx, dy, scalars, dbias, ctx.dtype)
    if ctx.backend == "triton":
        found = _finish_triton(sums)
    else:
        found = _finished(sums, finish_in_place) if owns_outputs(ctx) and may_overwrite(dx, upstream) else _finish(sums)
    needed = ctx.needs_input_grad[: len(found)]
    rest = (None,) * (len(Arguments._fields) - len(found))
    return *(gradient if need else None for gradient, need in zip(found, needed, strict=True)), *rest


class Finishing(NamedTuple):
    """What is left of the gradients, to be multiplied by the unit and the upstream gradient, dx and dy by the scale."""

    upstream: Tensor | None  # None is 1
    scale: Tensor
    dx: Tensor
    dy: Tensor
    scalars: Tensor
    dbias: Tensor
    dtype: torch.dtype


def _finished(a: Finishing, of_features: Any = finish_gradients) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dy, by_scale, _ = of_features(Finish(a.upstream, a.scale, a.scalars, a.dx, a.dy, a.dtype))
    if a.dbias.numel() == 0:
        return dx, dy, by_scale, torch.empty_like(a.dbias)
    unit = a.scalars[2] if a.upstream is None else a.scalars[2] * a.upstream
    return dx, dy, by_scale, a.dbias * unit


def _empty_gradients(a: Finishing) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, dy = (t.new_empty(t.shape, dtype=a.dtype) for t in (a.dx, a.dy))
    return dx, dy, torch.empty_like(a.scale), torch.empty_like(a.dbias)


row_softmax: Op[Arguments] = Op(
    "row_softmax",
    Arguments,
    "(Tensor loss, Tensor dx, Tensor dy, Tensor scalars, Tensor dbias, Tensor stats)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)

# Ops of their own, so that differentiating a gradient again meets an error instead of a wrong result.
_finish_triton: Op[Finishing] = Op(
    "finish_row_gradients_with_triton",
    Finishing,
    "(Tensor, Tensor, Tensor, Tensor)",
    forward=lambda a: _finished(a, finish_with_triton),
    fake=_empty_gradients,
    backward=no_double_backward,
)
_finish: Op[Finishing] = Op(
    "finish_row_gradients",
    Finishing,
    "(Tensor, Tensor, Tensor, Tensor)",
    forward=_finished,
    fake=_empty_gradients,
    backward=no_double_backward,
)
