r"""Softmax over frozen keys: arguments, reference, backends, fake and autograd.

    lse_i  = log sum_j exp(t q_i . k_j)
    mean_i = sum_j softmax_j(t q_i . k_j) k_j

are all that a contrastive loss needs of keys that receive no gradient (MoCo's queue, the momentum features of MoCo v3
and ALBEF), for d lse_i / d q_i = t mean_i and d lse_i / d t = q_i . mean_i. Both come from one pass over tiles of the
similarities: a tile is exponentiated against the running maximum of its rows, what was summed before is rescaled, and
the exponentials weigh the keys in a second product. That is 2 units (2 M K D FLOP each) forward and backward together,
and O(M D) memory beside the keys, which are read in place and never copied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops._op import Op
from ssl_kernels.ops.contrastive import fit_one_tile, no_double_backward
from ssl_kernels.ops.dino import unit_stride
from ssl_kernels.ops.matmul import matmul
from ssl_kernels.ops.panels import run_panels
from ssl_kernels.settings import choose_backend, workspace_bytes

KERNELS = ("cpu", "triton")


def key_softmax(query: Tensor, keys: Tensor, scale: Tensor | float, *, want_mean: bool = True) -> tuple[Tensor, Tensor]:
    r"""Log-sum-exp and softmax-weighted mean of keys that receive no gradient, in one pass that stores no similarities.

    .. math:: \mathrm{lse}_i = \log \sum_j \exp(t\, q_i \cdot k_j), \qquad
              \mathrm{mean}_i = \sum_j \operatorname{softmax}_j(t\, q_i \cdot k_j)\, k_j

    Losses over frozen keys can be made of these two. The cross-entropy against targets :math:`w_{ij}` that sum to 1 is
    :math:`\mathrm{lse}_i - t\, q_i \cdot \sum_j w_{ij} k_j`. If the keys are in two tensors, their log-sum-exp is
    ``torch.logaddexp(lse_a, lse_b)``.

    Args:
        query: [M, D] features in float32, bfloat16, float16 or float64 and with any strides.
        keys: [K, D] features without gradient, of any of these dtypes and any strides. They are read in place: for a
            queue that is stored as [D, K] pass ``queue.t()``. The CPU multiplies in float32, or in float64 for a
            float64 query. A GPU multiplies in the dtype of ``query``, to which each key is cast as it is read.
        scale: t = 1 / temperature. A float, or a floating-point tensor of one element, which gets a gradient.
        want_mean: whether the mean is needed. If neither it nor a gradient is needed, half of the work is left out.

    Returns:
        lse [M], which has gradients for ``query`` and ``scale``, and mean [M, D], which has none; both in float32, or
        in float64 for a float64 query. Without ``want_mean``, do not use the mean: it may have no rows. Without keys,
        lse is -inf and the mean is 0.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.
            ``keys`` that require a gradient do not fit: detach them.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    Source: the running maximum and rescaling of Milakov and Gimelshein, Online normalizer calculation for softmax,
    2018, arXiv:1805.02867.

    >>> import torch, ssl_kernels.functional as K
    >>> lse, mean = K.key_softmax(torch.eye(2), torch.eye(2), 2.0)
    >>> [round(x, 4) for x in lse.tolist()], [round(x, 4) for x in mean[0].tolist()]
    ([2.1269, 2.1269], [0.8808, 0.1192])
    """
    (query,) = _checks.autocast_features(query)
    _checks.check_features(query=query)
    check_keys(query, keys=keys)
    scale = _checks.as_scalar("scale", scale, query)
    backend = choose_backend(query.device, query.dtype, KERNELS)
    if backend == "reference":
        return reference(query, keys, scale, want_mean)
    return fused_key_softmax(widen(query), keys, scale, query.dtype, backend, want_mean=want_mean)


def fused_key_softmax(
    query: Tensor, keys: Tensor, scale: Tensor, dtype: torch.dtype, backend: str, *, want_mean: bool
) -> tuple[Tensor, Tensor]:
    """For a query of ``dtype`` that is held in fp32 (float64), so that its gradient leaves in fp32 too, to be added to
    the query's others before it is cast."""
    _checks.check_transforms(query, scale)
    want_mean |= torch.is_grad_enabled() and (query.requires_grad or scale.requires_grad)
    lse, mean = _op(Arguments(query, keys, scale, want_mean, dtype, workspace_bytes(query.device), backend))
    return lse, mean


def widen(features: Tensor) -> Tensor:
    """In the accumulation dtype; gradients are added up in it, and cast last."""
    return features.to(_checks.accumulation_dtype(features.dtype))


def check_keys(query: Tensor, **keys: Tensor) -> None:
    """[K, D] features without gradient beside the query's [M, D], of any floating dtype."""
    for name, value in keys.items():
        _checks.check_features(**{name: value})
        if value.device != query.device:
            raise ValueError(f"{name}: expected the device of the query ({query.device}), got {value.device}")
        if value.shape[1] != query.shape[1]:
            raise ValueError(f"{name}: expected {query.shape[1]} features as the query has, got {value.shape[1]}")
        if value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected keys without gradient, got a tensor that requires it; detach() it")


def reference(query: Tensor, keys: Tensor, scale: Tensor, want_mean: bool) -> tuple[Tensor, Tensor]:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    dtype = _checks.accumulation_dtype(query.dtype)
    with _checks.without_autocast(query):
        keys = keys.to(dtype, copy=True)  # a queue may change before the backward pass
        z = scale * (query.to(dtype) @ keys.t())
        mean = z.detach().softmax(1) @ keys if want_mean else keys[:0]
        return z.logsumexp(1), mean


class Arguments(NamedTuple):
    query: Tensor  # values of ``dtype`` in fp32 (float64): a GPU multiplies in ``dtype``, a CPU in fp32
    keys: Tensor
    scale: Tensor
    want_mean: bool
    dtype: torch.dtype
    workspace: int
    backend: str


# The panel function of each backend takes: query [m, D], keys [n, D]; stats [m, 2] float64, the running maximum of
# u = query . key, or of -query . key if the scale is negative, and the sum of exp(|scale| (u - maximum)); mean [m, D],
# the keys weighed by these exponentials so far, or None; the scale. It brings stats and mean to the new maximum, adds
# this tile to the stats, and returns the tile's exponentials if there is a mean for them to weigh keys in. The
# difference comes before the product: with a rounded product of the maximum taken off, rounding would decide between
# large similarities.


def _panel_eager(query: Tensor, keys: Tensor, stats: Tensor, mean: Tensor | None, scale: Tensor) -> Tensor | None:
    raw = matmul(query, keys.t())
    before, total = stats.unbind(1)
    sign, magnitude = torch.where(scale < 0, -1, 1), scale.abs().to(stats.dtype)
    least, largest = torch.aminmax(raw, dim=1)
    peak = torch.maximum(before, torch.where(scale < 0, -least, largest).to(stats.dtype))
    # As in torch.logsumexp, nothing is subtracted from a row whose maximum is infinite.
    infinite = (magnitude * peak).isinf()
    shift = sign * torch.where(infinite, 0, peak)
    e = torch.exp(scale * (raw - shift.to(raw.dtype)[:, None]))
    faded = torch.exp(magnitude * (before - peak))
    rescale = torch.where(infinite | (before == peak), 1, torch.where(before == -math.inf, 0, faded))
    stats[:, 1] = total * rescale + e.sum(1, dtype=stats.dtype)
    stats[:, 0] = peak
    if mean is None:
        return None
    mean *= rescale[:, None]
    return e


def _panel_cpu(query: Tensor, keys: Tensor, stats: Tensor, mean: Tensor | None, scale: Tensor) -> Tensor | None:
    tile = matmul(query, keys.t())
    torch.ops.ssl_kernels.key_softmax_panel_(tile, stats, mean, scale.item())
    return None if mean is None else tile


_PANELS = {"eager": _panel_eager, "cpu": _panel_cpu}
_TILES = {"eager": 3, "cpu": 1}  # tiles that each holds at a time


def statistics(a: Arguments) -> tuple[Tensor, Tensor]:
    """What the panels leave of all keys: the statistics of the rows, and the keys weighed by their exponentials."""
    with _checks.without_autocast(a.query):
        if a.backend == "cpu" and fit_one_tile(a.query, a.keys, a.workspace):
            keys = a.keys.to(a.query.dtype)
            found: tuple[Tensor, Tensor] = torch.ops.ssl_kernels.key_softmax_of_one_tile(
                a.query, keys, a.scale.item(), a.want_mean
            )
            return found
    mean = _fake(a)[1].zero_()
    panel_function = _PANELS[a.backend]

    def panel(query: Tensor, keys: Tensor, stats: Tensor, i: int, j: int) -> Tensor | None:
        if j == 0:
            stats[:, 0] = -math.inf
        return panel_function(query, keys, stats, mean[i : i + len(query)] if a.want_mean else None, a.scale)

    with _checks.without_autocast(a.query):
        stats, _, _ = run_panels(
            panel,
            a.query,
            a.keys,
            workspace=a.workspace,
            compute_dtype=a.query.dtype,
            tiles=_TILES[a.backend],
            stats_width=2,
            want_dx=a.want_mean,
            want_dy=False,
            dx=mean,
        )
    return stats, mean


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of each row and the mean, [0, D] if that is not wanted."""
    if a.backend == "cpu":
        stats, mean = statistics(a)
        lse, _ = _fake(a)
        torch.ops.ssl_kernels.key_softmax_rows_(stats, a.scale.item(), mean, lse)
        return lse, mean
    if a.query.numel() == 0 or a.keys.numel() == 0:  # similarities are 0, if there are any
        lse, mean = _fake(a)
        return lse.fill_(math.log(len(a.keys)) if len(a.keys) else -math.inf), mean.zero_()
    if a.backend == "triton":
        from ssl_kernels.kernels import key_softmax as kernels

        lse, weighted = kernels.key_softmax(a.query.to(a.dtype), a.keys, a.scale, a.want_mean)
        return lse, _fake(a)[1] if weighted is None else weighted
    stats, mean = statistics(a)
    peak, total = a.scale.abs().to(stats.dtype) * stats[:, 0], stats[:, 1]
    if a.want_mean:
        mean /= total.masked_fill(peak.isinf(), math.nan)[:, None]  # no softmax of infinite logits
    return (peak + total.log()).to(a.query.dtype), mean


def _fake(a: Arguments) -> tuple[Tensor, Tensor]:
    rows, width = a.query.shape
    return a.query.new_empty(rows), a.query.new_empty(rows if a.want_mean else 0, width)


def _setup_context(ctx: Any, a: Arguments, output: tuple[Tensor, Tensor]) -> None:
    _, mean = output
    ctx.mark_non_differentiable(mean)
    ctx.set_materialize_grads(False)
    ctx.backend = a.backend
    ctx.save_for_backward(a.query, mean, a.scale)


def _backward(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * len(Arguments._fields)
    query, mean, scale = ctx.saved_tensors
    needs_query, _, needs_scale, *_ = ctx.needs_input_grad
    needs = [needs_query, False, needs_scale]
    by_query, _, by_scale = gradients(Gradients(upstream, None, query, mean, scale, needs, ctx.backend))
    return by_query if needs_query else None, None, by_scale if needs_scale else None, None, None, None, None


class Gradients(NamedTuple):
    """Of a loss with the derivative f_i = upstream_i slope_i by lse_i; and -f_i by t q_i . p_i, if it has positives."""

    upstream: Tensor  # [M], or of no dimension for all rows
    slope: Tensor | None  # [M]; None is 1
    query: Tensor
    pull: Tensor  # [M, D]: mean_i, or mean_i - p_i; perhaps no rows if only the gradient of p is needed
    scale: Tensor
    needs: Sequence[bool]  # the gradients of query, positives and scale
    backend: str


def _gradients(a: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    by_query, by_positive, by_scale = found = _empty_gradients(a)
    needs_query, needs_positive, needs_scale = a.needs
    if a.backend == "cpu":
        torch.ops.ssl_kernels.key_softmax_gradients_(
            a.upstream, a.slope, unit_stride(a.query), a.pull, a.scale.item(), *found
        )
        return found
    if a.backend == "triton" and a.query.numel():
        _gradients_triton(a, *found)
        return found
    f = a.upstream if a.slope is None else a.upstream * a.slope
    if needs_query:
        by_query.copy_(a.pull * (f * a.scale)[:, None])
    if needs_positive:
        by_positive.copy_(widen(a.query) * (-f * a.scale)[:, None])
    if needs_scale:
        with _checks.without_autocast(a.query):  # a backward pass inside autocast would round both factors
            by_scale.copy_((torch.linalg.vecdot(widen(a.query), a.pull) * f).sum())
    return found


def _gradients_triton(a: Gradients, by_query: Tensor, by_positive: Tensor, by_scale: Tensor) -> None:
    from ssl_kernels.kernels.info_nce import info_nce_gradients

    needs_query, needs_positive, needs_scale = a.needs
    parts = a.scale.new_empty(len(a.query)) if needs_scale else None
    info_nce_gradients(
        a.upstream,
        a.slope,
        a.query,
        a.pull if needs_query or needs_scale else None,
        a.scale,
        by_query if needs_query else None,
        by_positive if needs_positive else None,
        parts,
    )
    if parts is not None:
        torch.sum(parts, 0, out=by_scale)


def _empty_gradients(a: Gradients) -> tuple[Tensor, Tensor, Tensor]:
    """Those that are not needed have no elements."""
    (rows, width), (needs_query, needs_positive, needs_scale) = a.query.shape, a.needs
    by_query, by_positive = (a.query.new_empty(rows if n else 0, width) for n in (needs_query, needs_positive))
    return by_query, by_positive, a.scale.new_empty(() if needs_scale else 0)


_op = Op(
    "key_softmax",
    Arguments,
    "(Tensor lse, Tensor mean)",
    forward=forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
# An op of its own, so that differentiating a gradient again meets an error instead of a wrong result.
gradients = Op(
    "key_softmax_gradients",
    Gradients,
    "(Tensor, Tensor, Tensor)",
    forward=_gradients,
    fake=_empty_gradients,
    backward=no_double_backward,
)
