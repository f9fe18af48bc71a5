r"""Losses over pairs that labels or lists name, tile by tile: what metric learning needs beyond a softmax over rows.

A tile is a block of similarities with what its pairs are. A formula turns it into numbers to each row, and a tile is
formed again for the backward pass, so that nothing of size M x N exists. Pairs come from

- labels: rows and columns in the order of their labels have all pairs of equal labels near one diagonal, and no other
  tile is visited. Products cost about 2 P D FLOP for P positive pairs;
- lists, as a miner gives: whole rows are visited, and a pair that is listed twice counts twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssl_kernels.ops import _checks
from ssl_kernels.ops.matmul import add_matmul, matmul
from ssl_kernels.settings import workspace_bytes

_PLANES = 12  # of the size of a tile, that a formula and its gradient hold at a time
_ROWS = 128  # of a tile of few labels: more would visit more pairs of other labels


class Tile(NamedTuple):
    rows: slice
    cols: slice
    positive: Tensor  # [m, n]: how many times each pair is positive
    negative: Tensor | None  # the same for negative pairs; None where they are counted elsewhere


class SameLabels:
    """The pairs of equal labels [M] and [N], as positive ones; all others are negative, and not visited.

    Queries and candidates are to be put in ``order`` and ``candidate_order`` first. ``own`` [M] names the candidate
    that is the query itself, and no pair; None if there is none.
    """

    def __init__(self, labels: Tensor, candidate_labels: Tensor, own: Tensor | None) -> None:
        self._labels, self.order = labels.sort(stable=True)
        self._others, self.candidate_order = candidate_labels.sort(stable=True)
        first = torch.searchsorted(self._others, self._labels)
        stop = torch.searchsorted(self._others, self._labels, right=True)
        self._own: Tensor | None = None
        if own is not None:
            places = torch.empty_like(self.candidate_order)
            places[self.candidate_order] = torch.arange(len(places), device=places.device)
            self._own = places[own[self.order]]
        counts = stop - first - int(own is not None)
        self.paired = torch.empty_like(counts, dtype=torch.bool)
        self.paired[self.order] = counts > 0
        self._spans = torch.stack([first, stop], 1)  # of the candidates that have the label of a query
        self.positives = int(counts.sum())
        self.negatives = len(labels) * len(candidate_labels) - int((stop - first).sum())

    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        limit = max(1, workspace_bytes(self.order.device) // (_PLANES * dtype.itemsize))
        spans, end = self._spans.tolist(), 0
        while end < len(spans):
            start, first = end, spans[end][0]
            end = min(start + _ROWS, len(spans))
            while end > start + 1 and (end - start) * (spans[end - 1][1] - first) > limit:
                end = (start + end) // 2
            rows, cols = slice(start, end), slice(first, spans[end - 1][1])
            if cols.start == cols.stop:
                continue
            positive = self._labels[rows, None] == self._others[cols]
            if self._own is not None:
                positive &= torch.arange(cols.start, cols.stop, device=positive.device) != self._own[rows, None]
            yield Tile(rows, cols, positive.to(dtype), None)


class ListedPairs:
    """Pairs (anchor, positive) and (anchor, negative) by their numbers among M queries and N candidates."""

    def __init__(self, positive: tuple[Tensor, Tensor], negative: tuple[Tensor, Tensor], m: int, n: int) -> None:
        self._shape = m, n
        self._lists = [_by_anchor(*pairs, m, n) for pairs in (positive, negative)]
        self.positives, self.negatives = len(positive[0]), len(negative[0])
        self.paired = torch.zeros(m, dtype=torch.bool, device=positive[0].device)
        self.paired[positive[0]] = True

    def tiles(self, dtype: torch.dtype) -> Iterator[Tile]:
        m, n = self._shape
        step = max(1, workspace_bytes(self.paired.device) // (_PLANES * dtype.itemsize * max(1, n)))
        for start in range(0, m, step):
            rows = slice(start, min(start + step, m))
            counts = (_counts(rows, n, *listed, dtype) for listed in self._lists)
            yield Tile(rows, slice(0, n), *counts)


def _by_anchor(anchors: Tensor, others: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    for numbers, size, what in ((anchors, m, "anchors"), (others, n, "positives and negatives")):
        if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < size:
            raise IndexError(
                f"indices_tuple: expected {what} from 0 to {size - 1}, got {int(numbers.min())} to {int(numbers.max())}"
            )
    anchors, order = anchors.sort(stable=True)
    return anchors, others[order]


def _counts(rows: slice, n: int, anchors: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    first, stop = torch.searchsorted(anchors, anchors.new_tensor([rows.start, rows.stop])).tolist()
    counts = torch.zeros(rows.stop - rows.start, n, dtype=dtype, device=anchors.device)
    where = anchors[first:stop] - rows.start, others[first:stop]
    return counts.index_put_(where, counts.new_ones(()), accumulate=True)


# Of logits [m, n], what the pairs are, and a number to each row or None; numbers to each row [m, k].
Formula = Callable[[Tensor, Tile, "Tensor | None"], Tensor]


def nt_xent(z: Tensor, tile: Tile, lse: Tensor | None) -> Tensor:
    """[m, 1]: the sum over positive pairs of -log of exp(z_ip) / (exp(z_ip) + sum_n exp(z_in)), n over negatives.

    Each positive has a denominator of its own. With the log-sum-exp of the negatives it is softplus(lse_i - z_ip).
    """
    if lse is None:
        assert tile.negative is not None
        lse = _log_sum_exp(z, tile.negative)
    gaps = F.softplus(lse[:, None] - z, threshold=50)  # beyond which it is the gap, to the digits of float64
    return (gaps * tile.positive).sum(1, keepdim=True)


def sup_con(z: Tensor, tile: Tile, _: Tensor | None) -> Tensor:
    """[m, 2]: the log-sum-exp over positive and negative pairs, each of which counts once; the mean over positives."""
    positive = tile.positive.clamp(max=1)
    counted = positive
    if tile.negative is not None:
        if bool(((tile.negative > 0) & (positive > 0)).any()):
            raise ValueError("indices_tuple: expected pairs that are positive or negative, got some that are both")
        counted = positive + tile.negative.clamp(max=1)
    mean = (z * positive).sum(1) / positive.sum(1).clamp(min=1)
    return torch.stack([_log_sum_exp(z, counted), mean], 1)


def _log_sum_exp(z: Tensor, counts: Tensor) -> Tensor:
    """About the least number of the dtype for a row of nothing, so that its gradient is 0 and not NaN."""
    least = torch.finfo(z.dtype).min
    return torch.where(counts > 0, z + counts.clamp(min=1).log(), least).logsumexp(1)


def by_row(
    formula: Formula, pairs: SameLabels | ListedPairs, query: Tensor, candidates: Tensor, scale: Tensor,
    lse: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula's numbers [M, k] of the logits scale q_i . c_j, 0 for rows of no tile, with exact gradients.

    float32, or float64 for float64 features.
    """
    if isinstance(pairs, ListedPairs):
        listed: Tensor = _ByRow.apply(query, candidates, scale, lse, pairs, formula)
        return listed
    sides = query.index_select(0, pairs.order), candidates.index_select(0, pairs.candidate_order)
    lse = None if lse is None else lse.index_select(0, pairs.order)
    ordered = _ByRow.apply(*sides, scale, lse, pairs, formula)
    places = torch.empty_like(pairs.order)
    places[pairs.order] = torch.arange(len(places), device=places.device)
    return ordered.index_select(0, places)


class _ByRow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        query, candidates, scale, lse, pairs, formula = arguments
        ctx.save_for_backward(query, candidates, scale, lse)
        ctx.pairs, ctx.formula = pairs, formula
        out: Tensor | None = None
        with _checks.without_autocast(query):
            for tile, _, logits in _logits(pairs, query, candidates, scale):
                made = formula(logits, tile, None if lse is None else lse[tile.rows])
                if out is None:
                    out = made.new_zeros(len(query), made.shape[1])
                out[tile.rows] = made
        return query.new_zeros(len(query), 2, dtype=_checks.accumulation_dtype(query.dtype)) if out is None else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, candidates, scale, lse = ctx.saved_tensors
        wide = _checks.accumulation_dtype(query.dtype)
        dq, dc = (
            torch.zeros_like(t, dtype=wide) if wanted else None
            for t, wanted in zip((query, candidates), ctx.needs_input_grad, strict=False)
        )
        by_scale, by_lse = torch.zeros_like(scale), None if lse is None else torch.zeros_like(lse)
        with _checks.without_autocast(query):
            for tile, raw, logits in _logits(ctx.pairs, query, candidates, scale):
                with torch.enable_grad():
                    leaves = [logits.requires_grad_()]
                    if lse is not None:
                        leaves.append(lse[tile.rows].detach().requires_grad_())
                    made = ctx.formula(logits, tile, None if lse is None else leaves[1])
                gradient, *rest = torch.autograd.grad(made, leaves, upstream[tile.rows])
                by_scale += (gradient * raw).sum()
                if by_lse is not None:
                    by_lse[tile.rows] = rest[0]
                gradient *= scale
                if dq is not None:
                    add_matmul(dq[tile.rows], gradient, candidates[tile.cols].to(wide), first=False)
                if dc is not None:
                    add_matmul(dc[tile.cols], gradient.t(), query[tile.rows].to(wide), first=False)
        dq, dc = (None if t is None else t.to(query.dtype) for t in (dq, dc))
        return dq, dc, by_scale, by_lse, None, None


def _logits(
    pairs: SameLabels | ListedPairs, query: Tensor, candidates: Tensor, scale: Tensor
) -> Iterator[tuple[Tile, Tensor, Tensor]]:
    """Each tile, its similarities, and these times the scale."""
    wide = _checks.accumulation_dtype(query.dtype)
    for tile in pairs.tiles(wide):
        raw = matmul(query[tile.rows].to(wide), candidates[tile.cols].to(wide).t())
        yield tile, raw, raw * scale
