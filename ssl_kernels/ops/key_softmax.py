r"""Softmax over frozen keys: schema, reference, backends, fake and autograd.

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
from typing import Any

import torch
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.contrastive import no_double_backward
from ssl_kernels.ops.matmul import matmul
from ssl_kernels.ops.panels import run_panels
from ssl_kernels.settings import choose_backend, workspace_bytes


def key_softmax(query: Tensor, keys: Tensor, scale: Tensor | float, *, want_mean: bool = True) -> tuple[Tensor, Tensor]:
    r"""Log-sum-exp and softmax-weighted mean of keys that receive no gradient, in one pass that keeps no similarities.

    .. math:: \mathrm{lse}_i = \log \sum_j \exp(t\, q_i \cdot k_j), \qquad
              \mathrm{mean}_i = \sum_j \operatorname{softmax}_j(t\, q_i \cdot k_j)\, k_j

    What losses over frozen keys are made of: the cross-entropy against targets :math:`w_{ij}` that sum to 1 is
    :math:`\mathrm{lse}_i - t\, q_i \cdot \sum_j w_{ij} k_j`, and over keys in several tensors
    ``torch.logaddexp(lse_a, lse_b)`` is the log-sum-exp.

    Args:
        query: [M, D] features, float32, bfloat16, float16 or float64, any strides.
        keys: [K, D] features without gradient, of any of these dtypes and any strides, read in place: for a queue that
            is stored as [D, K] pass ``queue.t()``. The CPU multiplies in float32 (float64 for a float64 query),
            a GPU in the dtype of ``query``, to which each key is cast as it is read.
        scale: t = 1 / temperature, a float or a floating tensor of one element; gradients flow to tensors.
        want_mean: whether the mean is needed. Without it, and without gradients, half of the work is left out.

    Returns:
        lse [M], differentiable in ``query`` and ``scale``, and mean [M, D], a constant to autograd; in float32 (float64
        for a float64 query). Without ``want_mean`` the mean is not to be relied on, and may have no rows. Over no keys
        lse is -inf and mean 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected; ``keys`` that require a gradient
            are to be detached.
        RuntimeError: on double backward, which only the reference backend supports.

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
    backend = choose_backend(query.device.type, query.dtype)
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
    lse, mean = _key_softmax(query, keys, scale, want_mean, dtype, backend)
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


@torch.library.custom_op(
    "ssl_kernels::key_softmax",
    mutates_args=(),
    schema=(
        "(Tensor query, Tensor keys, Tensor scale, bool want_mean, ScalarType dtype, str backend) "
        "-> (Tensor lse, Tensor mean)"
    ),
)
def _key_softmax(
    query: Tensor, keys: Tensor, scale: Tensor, want_mean: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    """``query`` holds values of ``dtype`` in fp32 (float64): a GPU multiplies in ``dtype``, a CPU in fp32."""
    rows, width = query.shape
    mean = query.new_zeros(rows if want_mean else 0, width)
    if query.numel() == 0 or keys.numel() == 0:  # similarities are 0, if there are any
        return query.new_full((rows,), math.log(keys.shape[0]) if keys.shape[0] else -math.inf), mean
    with _checks.without_autocast(query):
        if backend == "triton":
            from ssl_kernels.kernels import key_softmax as kernels

            lse, weighted = kernels.key_softmax(query.to(dtype), keys, scale, want_mean)
            return lse, mean if weighted is None else weighted
        panel_function = _PANELS[backend]

        def panel(query_i: Tensor, keys_j: Tensor, stats: Tensor, i: int, j: int) -> Tensor | None:
            if j == 0:
                stats[:, 0] = -math.inf
            mean_i = mean[i : i + query_i.shape[0]] if want_mean else None
            return panel_function(query_i, keys_j, stats, mean_i, scale)

        stats, _, _ = run_panels(
            panel,
            query,
            keys,
            workspace=workspace_bytes(),
            compute_dtype=query.dtype,
            tiles=_TILES[backend],
            tile_scale=1.0,
            stats_width=2,
            want_dx=want_mean,
            want_dy=False,
            dx=mean,
        )
    peak, total = scale.abs().to(stats.dtype) * stats[:, 0], stats[:, 1]
    if want_mean:
        mean /= total.masked_fill(peak.isinf(), math.nan)[:, None]  # no softmax of infinite logits
    return (peak + total.log()).to(query.dtype), mean


@_key_softmax.register_fake
def _(
    query: Tensor, keys: Tensor, scale: Tensor, want_mean: bool, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape[0]), query.new_empty(query.shape[0] if want_mean else 0, query.shape[1])


@torch.library.custom_op(
    "ssl_kernels::key_softmax_gradients",
    mutates_args=(),
    schema="(Tensor upstream, Tensor query, Tensor mean, Tensor scale) -> (Tensor, Tensor)",
)
def key_softmax_gradients(upstream: Tensor, query: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the query and of the scale, given that of lse.

    An op of its own, so that differentiating a gradient again meets an error instead of a wrong result.
    """
    with _checks.without_autocast(query):  # a backward pass inside autocast would round both factors
        rows = torch.linalg.vecdot(query, mean)
    return mean * (upstream * scale)[:, None], (rows * upstream).sum()


@key_softmax_gradients.register_fake
def _(upstream: Tensor, query: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(scale)


key_softmax_gradients.register_autograd(no_double_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, _, scale, *_ = inputs
    _, mean = output
    ctx.mark_non_differentiable(mean)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, mean, scale)


def _backward(ctx: Any, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * 3
    if grad_lse is None:
        return (None, None, None, *rest)
    query, mean, scale = ctx.saved_tensors
    dquery, dscale = key_softmax_gradients(grad_lse, query, mean, scale)
    needs_query, _, needs_scale, *_ = ctx.needs_input_grad
    return (dquery if needs_query else None, None, dscale if needs_scale else None, *rest)


_key_softmax.register_autograd(_backward, setup_context=_setup_context)
