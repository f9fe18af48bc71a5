"""The definition of the softmax over rows: dense, differentiable any number of times, in fp32 or float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.distributed import Across, Ranks
from ssl_kernels.ops import _checks
from ssl_kernels.ops.contrastive import NO_PAIRS
from ssl_kernels.ops.row_checks import Call, Rules
from ssl_kernels.ops.row_strips import NO_TARGET
from ssl_kernels.ops.softmax import dense_losses
from ssl_kernels.ops.strips import agree, gathered


def reference(
    call: Call, rules: Rules, label_smoothing: float, reduction: str, lse: bool, what: str, over: Across
) -> Tensor:
    rows = len(call.query)
    if over.group:
        facts = {"label_smoothing": label_smoothing, "reduction": reduction}
        call, first = _everyones(call, rules, over, what, lse, **facts)
    with _checks.without_autocast(call.query):
        dtype = _checks.accumulation_dtype(call.query.dtype)
        query, candidates = call.query.to(dtype), call.candidates.to(dtype)
        masks = _masks(call, rules)
        losses = [
            share * _of_rows(call, rules, query[:, :length], candidates[:, :length], masks, label_smoothing, lse)
            for length, share in zip(rules.dims, rules.dim_weights, strict=True)
        ]
        paired = masks[0].any(1)
        total = torch.stack(losses).sum(0)
        if call.weights is not None:
            total = total.masked_fill(call.weights == 0, 0) * call.weights
        if reduction == "none":
            return total[first : first + rows] if over.group else total
        return total.sum() / paired.sum().clamp(min=1) if reduction == "mean" else total.sum()


def _masks(call: Call, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs are positive, which are left out, and which are negatives that are hardened."""
    positive = torch.arange(len(call.candidates), device=call.target.device) == call.target[:, None]
    ignored, same = torch.zeros_like(positive), torch.zeros_like(positive)
    if call.query_ids is not None and call.candidate_ids is not None:
        same = call.query_ids[:, None] == call.candidate_ids
        if rules.same_id == "ignore":
            ignored = same & ~positive
        elif rules.same_id == "positive":
            positive = positive | same
    if call.guide_query is not None and call.guide_candidates is not None and call.guide_threshold is not None:
        dtype = call.guide_threshold.dtype
        scores = call.guide_query.to(dtype) @ call.guide_candidates.to(dtype).t()
        ignored = ignored | ((scores > call.guide_threshold[:, None]) & ~positive)
    if call.candidate_bias is not None:
        ignored = ignored | (call.candidate_bias == -torch.inf)
        positive = positive & ~ignored
    hardened = ~positive & {"all": torch.ones_like(same), "same_id": same, "other_ids": ~same}[rules.hardened]
    return positive, ignored, hardened


def _of_rows(
    call: Call,
    rules: Rules,
    query: Tensor,
    candidates: Tensor,
    masks: tuple[Tensor, Tensor, Tensor],
    label_smoothing: float,
    lse: bool,
) -> Tensor:
    positive, ignored, hardened = masks
    if rules.normalize:
        query, candidates = F.normalize(query, dim=1), F.normalize(candidates, dim=1)
    s = query @ candidates.t()
    z = call.scale * s
    if rules.hardness:
        z = z + rules.hardness * (s.detach() * hardened)
    if call.candidate_bias is not None:
        z = z + call.candidate_bias
    if lse:
        return z.masked_fill(ignored, -torch.inf).logsumexp(1)
    return dense_losses(z, positive, ignored, label_smoothing)[0]


def _everyones(call: Call, rules: Rules, over: Across, what: str, lse: bool, **facts: Any) -> tuple[Call, int]:
    """The call of one process that holds all rows, and the place of this rank's first query."""
    features = [call.query, call.candidates, *([] if call.candidate_bias is None else [call.candidate_bias])]
    ranks, scale = Ranks(over.group, what), call.scale
    rows, cols = agree(ranks, features[:2], over, NO_PAIRS, **facts, **rules._asdict())
    if lse:  # each rank has a loss of its own
        found = [_OfAll.apply(t, ranks, counts) for t, counts in zip(features, (rows, cols, cols), strict=False)]
    else:
        found, (scale,), _ = gathered(over, features, (call.scale,), what=what)
    first_row, first_col = (sum(counts[: ranks.rank]) for counts in (rows, cols))

    def gather(t: Tensor | None, counts: list[int]) -> Tensor | None:
        return None if t is None else ranks.gather_rows(t, counts)

    target = gather(torch.where(call.target < 0, NO_TARGET, call.target + first_col), rows)
    assert target is not None
    return Call(
        found[0],
        found[1],
        scale,
        None if call.candidate_bias is None else found[2],
        target,
        gather(call.query_ids, rows),
        gather(call.candidate_ids, cols),
        gather(call.weights, rows),
        gather(call.guide_query, rows),
        gather(call.guide_candidates, cols),
        gather(call.guide_threshold, rows),
    ), first_row


class _OfAll(torch.autograd.Function):
    """The rows of all ranks, whose gradients add up on the rank that has them."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks, counts: list[int]) -> Tensor:
        ctx.ranks, ctx.rows = ranks, slice(sum(counts[: ranks.rank]), sum(counts[: ranks.rank + 1]))
        return ranks.gather_rows(own.detach(), counts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.ranks.sum(gradient)[ctx.rows], None, None
