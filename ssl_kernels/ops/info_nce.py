r"""InfoNCE with one positive and many frozen negatives to a query (MoCo), on top of the softmax over frozen keys.

With lse_i over the negatives and z+_i = t q_i . p_i, -log softmax of the positive among all is softplus(lse_i - z+_i):
no sum of the positive with the negatives, from which a confident positive would have to be taken back. Its slope,
sigmoid(lse_i - z+_i), and the mean of the negatives less the positive are what the backward pass needs of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.distributed import ALONE, Across, Ranks
from ssl_kernels.ops import _checks, key_softmax
from ssl_kernels.ops._op import Op
from ssl_kernels.ops.contrastive import NO_PAIRS
from ssl_kernels.ops.dino import unit_stride
from ssl_kernels.ops.key_softmax import KERNELS, check_keys, widen
from ssl_kernels.ops.strips import agree, gathered
from ssl_kernels.settings import choose_backend, workspace_bytes


def info_nce_loss(
    query: Tensor, positive: Tensor, negatives: Tensor, scale: Tensor | float, *, reduction: str = "mean"
) -> Tensor:
    r"""InfoNCE loss of MoCo: each query has one positive, and all queries share the negatives, which get no gradient.

    .. math:: L_i = -\log \frac{\exp(t\, q_i \cdot p_i)}{\exp(t\, q_i \cdot p_i) + \sum_j \exp(t\, q_i \cdot k_j)}

    Args:
        query: [M, D] features in float32, bfloat16, float16 or float64 and with any strides. Normalise them first; this
            function does not.
        positive: [M, D] features of the same dtype and device as ``query``. They may require a gradient.
        negatives: [K, D] features without gradient, such as ``keys`` of :class:`ssl_kernels.KeyQueue`, of any of these
            dtypes and any strides. They are read in place: for a queue that is stored as [D, K] pass ``queue.t()``.
        scale: t = 1 / temperature. A float, or a floating-point tensor of one element, which gets a gradient.
        reduction: "mean" or "sum" over the rows, or "none", [M].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features). The mean over no rows is NaN.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.
            ``negatives`` that require a gradient do not fit: detach them.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    Under autocast, ``query`` and ``positive`` are cast as for a matrix product. Besides its arguments the function
    needs a few times [M, D] in float32 and one tile of similarities. ``negatives`` are neither copied nor kept for the
    backward pass, so a queue may be updated before it. See also :func:`key_softmax`.

    Source: He et al., Momentum Contrast, 2019, arXiv:1911.05722.

    >>> import torch, ssl_kernels.functional as K
    >>> query = torch.eye(2, 4).requires_grad_()
    >>> loss = K.info_nce_loss(query, query.detach(), torch.eye(4)[2:], scale=1 / 0.2)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(query.grad.shape)
    (0.0134, (2, 4))
    """
    query, positive = _checks.autocast_features(query, positive)
    _checks.check_features(query=query, positive=positive)
    check_same_rows(query, positive=positive)
    check_keys(query, negatives=negatives)
    return fused_info_nce(query, positive, negatives, scale, reduction, positive_is_key=False)


def fused_info_nce(
    query: Tensor,
    positive: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    reduction: str,
    *,
    positive_is_key: bool,
    over: Across = ALONE,
) -> Tensor:
    """The loss of features that were checked; ``positive_is_key`` tells that the positives are among the keys.

    Over several processes these keys are what each of them has, and the loss is the mean over all their rows.
    """
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    scale = _checks.as_scalar("scale", scale, query)
    backend = choose_backend(query.device, query.dtype, KERNELS)
    if backend == "reference":
        (query, positive, keys), (scale,), _ = gathered(
            over, (query, positive, keys), (scale,), what="MoCoV3Loss", reduction=reduction
        )
        return reference(query, positive, keys, scale, reduction, positive_is_key)
    _checks.check_transforms(query, positive, scale)
    want_mean = torch.is_grad_enabled() and (query.requires_grad or scale.requires_grad)
    workspace = workspace_bytes(query.device)
    loss: Tensor = _op(
        Arguments(query, positive, keys, scale, positive_is_key, reduction, want_mean, workspace, backend, *over)
    )[0]
    return loss


def reference(
    query: Tensor, positive: Tensor, keys: Tensor, scale: Tensor, reduction: str, positive_is_key: bool = False
) -> Tensor:
    """The definition: cross-entropy of the positive among 1 + K, or K of which it is one; dense, in fp32 or float64."""
    with _checks.without_autocast(query):
        query, positive = widen(query), widen(positive)
        keys = keys.to(query.dtype, copy=True)  # a queue may change before the backward pass
        similarity = (query * positive).sum(1, keepdim=True)
        if positive_is_key:
            return reduce_rows((scale * (query @ keys.t())).logsumexp(1) - scale * similarity[:, 0], reduction)
        similarities = torch.cat([similarity, query @ keys.t()], 1)
        target = torch.zeros(query.shape[0], dtype=torch.int64, device=query.device)
        return F.cross_entropy(scale * similarities, target, reduction=reduction)


def check_same_rows(query: Tensor, **others: Tensor) -> None:
    for name, other in others.items():
        if other.shape[0] != query.shape[0]:
            raise ValueError(f"{name}: expected {query.shape[0]} rows, one to a query, got {other.shape[0]}")


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return rows
    return rows.mean() if reduction == "mean" else rows.sum()


class Arguments(NamedTuple):
    query: Tensor
    positive: Tensor
    keys: Tensor
    scale: Tensor
    positive_is_key: bool
    reduction: str
    want_mean: bool
    workspace: int
    backend: str
    group: str  # this and what follows is Across
    strategy: str
    grad_reduce: str
    even_batches: bool
    own_share: bool


def _forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The loss; and for the gradient the mean of each row's negatives less its positive, if wanted, and the slopes."""
    if a.backend == "triton" and not a.group and a.query.numel() and a.keys.numel():
        return _forward_triton(a)
    query, average = widen(a.query), a.reduction == "mean"
    softmax = key_softmax.Arguments(query, a.keys, a.scale, a.want_mean, a.query.dtype, a.workspace, a.backend)
    if a.group:
        return _forward_in_group(a, softmax)
    if a.backend == "cpu":
        stats, pull = key_softmax.statistics(softmax)
        loss, _, slope = _fake(a)
        given = unit_stride(a.query), unit_stride(a.positive), a.positive_is_key, average
        torch.ops.ssl_kernels.info_nce_rows_(stats, a.scale.item(), *given, pull, loss, slope)
        return loss, pull, slope
    (lse, mean), positive = key_softmax.forward(softmax), widen(a.positive)
    z = a.scale * (query * positive).sum(1)
    # An infinite similarity would pass for a perfect match, but for the second term.
    if a.positive_is_key:
        rows, slope = lse - z, torch.ones_like(lse)
    else:
        rows, slope = -F.logsigmoid(z - lse) + 0 * z, torch.sigmoid(lse - z)
    pull = mean.sub_(positive) if a.want_mean else mean
    return reduce_rows(rows, a.reduction), pull, slope / max(len(slope), 1) if average else slope


def _forward_triton(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    from ssl_kernels.kernels.info_nce import info_nce_rows
    from ssl_kernels.kernels.key_softmax import key_softmax as softmax

    lse, mean = softmax(a.query, a.keys, a.scale, a.want_mean)
    rows, slope = torch.empty_like(lse), torch.empty_like(lse)
    factor = 1 / len(rows) if a.reduction == "mean" else 1.0
    info_nce_rows(a.query, a.positive, lse, a.scale, mean, rows, slope, factor, a.positive_is_key)
    return reduce_rows(rows, a.reduction), _fake(a)[1] if mean is None else mean, slope


def _forward_in_group(a: Arguments, softmax: key_softmax.Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The same where the keys are those of all ranks: the softmax over each rank's, one after the other, and merged."""
    ranks = Ranks(a.group, "MoCoV3Loss")
    (counts,) = agree(ranks, [a.keys], a, NO_PAIRS, gradients_wanted=a.want_mean, reduction=a.reduction)
    query = softmax.query
    lse, mean = query.new_full((len(query),), -math.inf), torch.zeros_like(query) if a.want_mean else query[:0]
    for _, keys in ranks.blocks(a.keys, counts, a.strategy):
        if len(keys) == 0:
            continue
        of_block, mean_of_block = key_softmax.forward(softmax._replace(keys=keys))
        merged = torch.logaddexp(lse, of_block)
        if a.want_mean:
            mean.mul_((lse - merged).exp()[:, None]).addcmul_(mean_of_block, (of_block - merged).exp()[:, None])
        lse = merged
    positive = widen(a.positive)
    rows = lse - a.scale * (query * positive).sum(1)
    total = rows.sum(dtype=torch.float64)
    divisor = sum(counts) if a.reduction == "mean" else 1
    loss = (ranks.sum(total) / divisor).to(rows.dtype)
    slope = torch.full_like(rows, (ranks.size if a.grad_reduce == "mean" else 1) / max(divisor, 1))
    return loss, mean.sub_(positive) if a.want_mean else mean, slope


def _fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    new = functools.partial(a.query.new_empty, dtype=_checks.accumulation_dtype(a.query.dtype))
    rows, width = a.query.shape
    loss = new(rows if a.reduction == "none" else ())
    return loss, new(rows if a.want_mean else 0, width), new(rows)


def _setup_context(ctx: Any, a: Arguments, output: tuple[Tensor, Tensor, Tensor]) -> None:
    """All outputs stay differentiable, so that a second backward pass meets an error."""
    _, pull, slope = output
    ctx.set_materialize_grads(False)
    ctx.backend = a.backend
    ctx.save_for_backward(slope, a.query, pull, a.scale)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * len(Arguments._fields)
    needs_query, needs_positive, _, needs_scale, *_ = ctx.needs_input_grad
    needs = [needs_query, needs_positive, needs_scale]
    slope, query, pull, scale = ctx.saved_tensors
    arguments = key_softmax.Gradients(upstream, slope, query, pull, scale, needs, ctx.backend)
    found = key_softmax.gradients(arguments)
    query, positive, scale = (t if needed else None for t, needed in zip(found, needs, strict=True))
    return query, positive, None, scale, *(None,) * (len(Arguments._fields) - 4)


_op = Op(
    "info_nce",
    Arguments,
    "(Tensor loss, Tensor pull, Tensor slope)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
