r"""Softmax over rows alone, with gradients to queries and candidates: arguments, checks and definition.

CLIP normalises rows and columns, and InfoNCE freezes its keys. Retrieval, text embeddings with hard negatives and
recommenders normalise rows only, and train both sides:

    z_ij = t q_i . c_j + b_j,    l_i = log sum_j exp(z_ij) - z_i,target(i)

How it is computed: ``row_passes.py`` has the two passes over tiles, ``row_tiles.py`` a tile on each backend,
``row_strips.py`` what one of several processes visits, and ``row_loss.py`` the op that autograd sees.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ssl_kernels.distributed import Across, Group, across
from ssl_kernels.ops import _checks
from ssl_kernels.ops.row_checks import Call, Rules, checked
from ssl_kernels.ops.row_loss import row_softmax
from ssl_kernels.ops.row_passes import Arguments
from ssl_kernels.ops.row_reference import reference
from ssl_kernels.ops.unit_rows import unit_rows
from ssl_kernels.settings import choose_backend, tile_budget_bytes, workspace_bytes

KERNELS = ("cpu", "triton")


def row_softmax_loss(
    query: Tensor,
    candidates: Tensor,
    scale: Tensor | float,
    *,
    target: Tensor | None = None,
    candidate_bias: Tensor | None = None,
    query_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    same_id: str = "ignore",
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    hardness: float = 0.0,
    hardened: str = "all",
    guide_query: Tensor | None = None,
    guide_candidates: Tensor | None = None,
    guide_threshold: Tensor | None = None,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    even_batches: bool = False,
    own_share: bool = False,
) -> Tensor:
    r"""Softmax loss of queries among candidates, with exact gradients for both, in memory that is linear in the batch.

    .. math:: L = \frac{1}{M} \sum_i w_i \Big[ \log \sum_j e^{z_{ij}} - z_{i, y(i)} \Big],
              \qquad z_{ij} = t\, q_i \cdot c_j + b_j

    where y(i) is the target of query i, and j goes over the candidates that neither ids nor a guide leave out. This is
    in-batch negatives with or without hard negatives, and sampled softmax. M does not count queries without a target.

    Args:
        query: [M, D] features in float32, bfloat16, float16 or float64 and with any strides. Normalise them first, or
            see ``normalize``.
        candidates: [N, D] features of the same dtype and device, such as positives and behind them hard negatives.
        scale: t >= 0, which is 1 / temperature. A float, or a floating-point tensor of one element, which gets a
            gradient.
        target: int64 [M], the candidate that each query is to find. A negative number is no target. By default query i
            is to find candidate i.
        candidate_bias: [N], added to the logits of each candidate, which gets a gradient: -log Q of sampled softmax,
            where Q is the probability that a candidate is sampled; -inf removes a candidate.
        query_ids, candidate_ids: int64 [M] and [N], both or neither. ``same_id`` tells what candidates with the id of
            the query are, its target aside: "ignore" leaves them out as false negatives, "positive" makes them targets
            too, of which the mean is taken, and "negative" changes nothing, for the use of ``hardened``.
        weights: w, [M], without gradient. They do not change M. By default 1.
        label_smoothing: share of each target that is spread evenly over all candidates that are not left out, as in
            :func:`torch.nn.functional.cross_entropy`.
        hardness: alpha >= 0. The logits of negatives get alpha q_i . c_j more, which counts as a constant in the
            gradient.
        hardened: which negatives do so: "all", those with the "same_id" as the query, such as its own hard negatives,
            or those with "other_ids".
        guide_query, guide_candidates: [M, E] and [N, E], features of a guiding model, without gradient. Negatives whose
            guide score, the product of these features, exceeds the threshold of the query are left out.
        guide_threshold: [M]. By default the guide score of the target.
        dims: lengths of prefixes of the features, at most D, such as (768, 512, 256). The loss is the weighted sum of
            the losses of the prefixes. On a CPU it takes no more products than that of the longest; the Triton kernels
            take one prefix after the other.
        dim_weights: the weights, by default 1 each.
        normalize: divide each query and candidate, or each prefix of them, by its norm first. The Triton kernels
            take the quotients rounded to the features' dtype.
        reduction: "mean" is the equation above; "sum" does not divide by M; "none" returns the terms of i, [M].
        group, strategy, grad_reduce, even_batches, own_share: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group the loss is over the rows of this process alone. ``target``
            counts the candidates of the own process, which others meet as negatives.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features); 0 without any target.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects. A
            target beyond the last candidate gives NaN on a GPU, where looking at it would wait for the device.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    Under autocast, features are cast as for a matrix product; the loss is still accumulated in float32. float32
    products follow ``torch.get_float32_matmul_precision()``. Between forward and backward, the gradients that are
    needed are kept, [M, D] and [N, D] in float32; for ``reduction="none"`` they are made in the backward pass. See
    :func:`ssl_kernels.use_workspace` and :func:`ssl_kernels.use_tile_budget` for the memory of tiles.

    Sources: van den Oord et al., 2018, arXiv:1807.03748; Bengio and Senecal, 2008, for the bias; Lan et al., 2025,
    arXiv:2503.04812, for the hardness; Solatorio, 2024, arXiv:2402.16829, for the guide; Kusupati et al., 2022,
    arXiv:2205.13147, for prefixes.

    >>> import torch, ssl_kernels.functional as K
    >>> query, candidates = torch.eye(2, 4).requires_grad_(), torch.eye(4).requires_grad_()
    >>> loss = K.row_softmax_loss(query, candidates, 5.0)  # candidates 2 and 3 are hard negatives
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(candidates.grad.shape)
    (0.02, (4, 4))
    """
    call, rules = checked(
        query, candidates, scale, target=target, target_is_row=True, candidate_bias=candidate_bias, query_ids=query_ids,
        candidate_ids=candidate_ids, weights=weights, guide_query=guide_query, guide_candidates=guide_candidates,
        guide_threshold=guide_threshold, same_id=same_id, hardness=hardness, hardened=hardened, dims=dims,
        dim_weights=dim_weights, normalize=normalize,
    )  # fmt: skip
    _checks.check_fraction("label_smoothing", label_smoothing)
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    over = across(group, strategy, grad_reduce, even_batches, own_share, reduction)
    return _softmax(call, rules, label_smoothing, reduction, False, "row_softmax_loss", over)


def row_lse(
    query: Tensor,
    candidates: Tensor,
    scale: Tensor | float,
    *,
    target: Tensor | None = None,
    candidate_bias: Tensor | None = None,
    query_ids: Tensor | None = None,
    candidate_ids: Tensor | None = None,
    hardness: float = 0.0,
    hardened: str = "all",
    same_id: str = "ignore",
    guide_query: Tensor | None = None,
    guide_candidates: Tensor | None = None,
    guide_threshold: Tensor | None = None,
    group: Group = None,
    strategy: str = "auto",
    even_batches: bool = False,
) -> Tensor:
    r"""Log-sum-exp of each query over candidates, with exact gradients for both, without a matrix of similarities.

    .. math:: \mathrm{lse}_i = \log \sum_j \exp(t\, q_i \cdot c_j + b_j)

    Losses over several blocks of candidates are sums of ``torch.logaddexp`` of these.

    Args:
        query, candidates, scale, candidate_bias, query_ids, candidate_ids, hardness, hardened, guide_query,
            guide_candidates: as for :func:`row_softmax_loss`. ``same_id`` may be "ignore" or "negative".
        target: int64 [M], the candidate of each query that neither ids nor a guide leave out, and that gets no
            hardness. A negative number is none, which is also the default.
        guide_threshold: [M], of guide scores. It must be given with a guide, unless there is a target.
        group, strategy, even_batches: as for :func:`row_softmax_loss`: the candidates of all processes. Gradients of
            this process's rows are those of the sum of all processes' losses, so that their mean, which data-parallel
            trainers take, is the gradient of the mean of these losses.

    Returns:
        lse [M] in float32 (float64 for float64 features), which has gradients for ``query``, ``candidates``, ``scale``
        and ``candidate_bias``; -inf where all candidates are left out.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    >>> import torch, ssl_kernels.functional as K
    >>> [round(x, 4) for x in K.row_lse(torch.eye(2), torch.eye(2), 2.0).tolist()]
    [2.1269, 2.1269]
    """
    if same_id == "positive":
        raise ValueError("same_id: expected one of 'ignore', 'negative', got 'positive'")
    if guide_query is not None and guide_threshold is None and target is None:
        raise ValueError("guide_threshold: expected a number to each query, or a target, got neither")
    call, rules = checked(
        query, candidates, scale, target=target, target_is_row=False, candidate_bias=candidate_bias,
        query_ids=query_ids, candidate_ids=candidate_ids, weights=None, guide_query=guide_query,
        guide_candidates=guide_candidates, guide_threshold=guide_threshold, same_id=same_id, hardness=hardness,
        hardened=hardened, dims=None, dim_weights=None, normalize=False,
    )  # fmt: skip
    over = across(group, strategy, "sum", even_batches, False, "mean")
    return _softmax(call, rules, 0.0, "none", True, "row_lse", over)


def _softmax(
    call: Call, rules: Rules, label_smoothing: float, reduction: str, lse: bool, what: str, over: Across
) -> Tensor:
    backend = choose_backend(call.query.device, call.query.dtype, KERNELS)
    if backend == "reference":
        return reference(call, rules, label_smoothing, reduction, lse, what, over)
    if backend == "triton" and (rules.normalize or len(rules.dims) > 1):
        return _by_prefix(call, rules, label_smoothing, reduction, what, over)
    differentiable = call[:4]
    _checks.check_transforms(*(t for t in differentiable if t is not None))
    grad = torch.is_grad_enabled()
    needs_grad = [grad and t is not None and t.requires_grad for t in differentiable]
    keep_bytes = tile_budget_bytes() if any(needs_grad) and reduction != "none" else 0
    loss: Tensor = row_softmax(
        Arguments(
            *call, None, needs_grad, lse, *rules, label_smoothing, reduction, workspace_bytes(call.query.device),
            keep_bytes, backend, what, *over,
        )
    )[0]  # fmt: skip
    return loss


def _by_prefix(call: Call, rules: Rules, label_smoothing: float, reduction: str, what: str, over: Across) -> Tensor:
    """The sum of the losses of prefixes, one after the other."""
    total: Tensor | None = None
    for length, share in zip(rules.dims, rules.dim_weights, strict=True):
        query, candidates = (t[:, :length] for t in (call.query, call.candidates))
        if rules.normalize:
            query, candidates = unit_rows(query), unit_rows(candidates)
        one = rules._replace(dims=[length], dim_weights=[1.0], normalize=False)
        loss = share * _softmax(
            call._replace(query=query, candidates=candidates), one, label_smoothing, reduction, False, what, over
        )
        total = loss if total is None else total + loss
    assert total is not None
    return total
