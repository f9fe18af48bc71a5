"""The softmax over rows on a tile of similarities, by each backend.

With s_ij = (q_i . c_j) a_i b_j, where a and b are one over the norms of prefixes or 1, a pair has the logit

    z_ij = t_ij s_ij + bias_j,    t_ij = t, and t plus the hardness for chosen negatives

of which the derivative by s is t wherever the hardness counts as a constant. Where there is neither a bias, nor a
hardness, nor a norm, z = t s, and statistics are those of s: a difference of similarities, multiplied by t, keeps
digits that a difference of large logits has lost.

A guide leaves pairs out by writing ``LEFT_OUT`` in the place of their similarities, so that tiles which are kept for
the second pass need no second look at the guide.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ssl_kernels.ops import reuse
from ssl_kernels.ops.matmul import matmul
from ssl_kernels.ops.row_strips import Candidates, Queries
from ssl_kernels.ops.softmax import add_statistics

LEFT_OUT = -2e38
LEAST_SIMILARITY = -1e38  # what is below is left out
SAME_ID = ("ignore", "positive", "negative")  # what pairs of equal ids are, in the order of the C++
_CHUNK = 64  # rows whose sums by column are one in C++


class Rule(NamedTuple):
    """What becomes of similarities."""

    scale: Tensor
    same_id: str
    hardness: float
    hardened: str
    dims: Sequence[int]  # lengths of the prefixes, ascending
    normalize: bool

    def cuts(self) -> list[slice]:
        """The features by which each prefix is longer than the one before."""
        return [slice(a, b) for a, b in zip((0, *self.dims), self.dims, strict=False)]

    def has_logits(self, bias: Tensor | None) -> bool:
        """Whether statistics are those of z, not of s."""
        return bias is not None or self.hardness != 0 or self.normalize

    def unit(self, bias: Tensor | None) -> Tensor:
        """What statistics are multiplied by to give those of z."""
        return torch.ones_like(self.scale) if self.has_logits(bias) else self.scale

    def scales(self, t: Any) -> tuple[Any, Any, Any]:
        """t of positives, of other pairs of equal ids, and of all others."""
        harder = t + self.hardness
        return t, harder if self.hardened != "other_ids" else t, harder if self.hardened != "same_id" else t


class Weights(NamedTuple):
    """What the rows of a visit weigh in G."""

    rows: Tensor | None  # [m]
    largest: float  # of all rows, by which they are divided
    prefixes: Sequence[float]  # over the largest of them
    label_smoothing: float


class ColumnSums(NamedTuple):
    """Sums over rows that are added to, in float64."""

    grads: Tensor | None  # [n]: of G
    moments: Tensor | None  # [K, n]: of G s

    def part(self, first: int, count: int) -> ColumnSums:
        cols = slice(first, first + count)
        return ColumnSums(*(None if t is None else t[..., cols] for t in self))


Tiles: TypeAlias = Tensor | Iterator[tuple[slice, Tensor]]

# Of each backend two functions. Statistics [K, m, 4] or [K, m, 6] of the prefixes are updated: the largest v that
# counts, the sum of exp(unit (v - largest)), the sum of v over positives, their number; and with label smoothing the
# sum over all pairs that count, and their number; v is s or z. Similarities are returned where there are tiles of them.
# Gradients: moments [m, K], the row sums of G s, and the columns' sums are added to, and the tiles of G, times the
# factors, come back if ``write``. ``sides`` [K, 4, m] or [K, 5, m] are described at ``_Summary``. What is made in a
# ``memory`` is gone with the next panel. The C++ has a third, a visit, which does the work of both.


class Memory:
    """Of the tiles of a panel, which the next one overwrites. Malloc would give and take it anew with each, and fresh
    memory is paid for in page faults: as much time as the product over 128 features that goes there.

    Long rows lie a little apart: a product that goes down a column meets one set of the cache again and again where
    they begin at multiples of 1 KB.
    """

    def __init__(self) -> None:
        self._held = torch.empty(0)

    def tiles(self, count: int, q: Queries, c: Candidates) -> list[Tensor]:
        rows, cols = len(q.features), len(c.features)
        stride = cols + 16 if cols % 256 == 0 else cols
        if self._held.dtype != q.features.dtype or self._held.numel() < count * rows * stride:
            self._held = reuse.empty((count * rows * stride,), q.features)
        return list(self._held[: count * rows * stride].view(count, rows, stride)[..., :cols])


def products(q: Queries, c: Candidates, rule: Rule, memory: Memory | None = None) -> list[Tensor]:
    """What each prefix adds to the similarities of the one before; the guide speaks in the first."""
    cuts = rule.cuts()
    places: Sequence[Tensor | None] = [None] * (len(cuts) + 1)
    if memory is not None:
        places = memory.tiles(len(cuts) + (q.guide is not None), q, c)
    if len(cuts) == 1:
        made = [matmul(q.features, c.features.t(), places[0])]
    else:
        parts = zip(cuts, places, strict=False)
        made = [matmul(q.features[:, cut], c.features[:, cut].t(), place) for cut, place in parts]
    if q.guide is not None:
        made[0] = _guided(made[0], q, c, rule, places[-1])
    return made


def similarities(q: Queries, c: Candidates, rule: Rule) -> list[Tensor]:
    return list(itertools.accumulate(products(q, c, rule), torch.add))


def _guided(raw: Tensor, q: Queries, c: Candidates, rule: Rule, memory: Tensor | None) -> Tensor:
    """Without pairs whose score exceeds the threshold, unless they are positive."""
    assert q.guide is not None
    assert c.guide is not None
    assert q.threshold is not None
    scores = matmul(q.guide.to(raw.dtype), c.guide.to(raw.dtype).t(), memory)
    if raw.device.type == "cpu" and raw.dtype == torch.float32:
        known = q.target, q.ids, c.ids, SAME_ID.index(rule.same_id)
        torch.ops.ssl_kernels.row_softmax_guide_(raw, scores, q.threshold, *known)
        return raw
    positive, _, _ = masks(raw, q, c, rule)
    return raw.masked_fill((scores > q.threshold[:, None]) & ~positive, LEFT_OUT)


def masks(raw: Tensor, q: Queries, c: Candidates, rule: Rule) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs are positive, which are left out by ids, and which have equal ids."""
    target = torch.arange(raw.shape[1], device=raw.device) == q.target[:, None]
    if q.ids is None or c.ids is None:
        return target, torch.zeros_like(target), torch.zeros_like(target)
    same = q.ids[:, None] == c.ids
    left_out = same & ~target if rule.same_id == "ignore" else torch.zeros_like(same)
    return target | same if rule.same_id == "positive" else target, left_out, same


def values(raw: Tensor, q: Queries, c: Candidates, rule: Rule, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """s and v of a prefix, and which pairs are positive and left out."""
    positive, ignored, same = masks(raw, q, c, rule)
    if q.guide is not None:
        ignored = ignored | ((raw < LEAST_SIMILARITY) & (raw != -torch.inf))
        raw = raw.masked_fill(ignored, 0)
    if c.bias is not None:
        ignored = ignored | (c.bias == -torch.inf)
    positive = positive & ~ignored
    s = raw
    if q.factors is not None and c.factors is not None:
        s = raw * q.factors[k][:, None] * c.factors[k]
    if not rule.has_logits(c.bias):
        return s, s, positive, ignored
    t, of_same, of_others = rule.scales(rule.scale)
    v = s * torch.where(positive, t, torch.where(same, of_same, of_others))
    return s, v if c.bias is None else v + c.bias, positive, ignored


def stats_eager(q: Queries, c: Candidates, stats: Tensor, rule: Rule, _memory: Memory | None) -> list[Tensor]:
    raws = similarities(q, c, rule)
    for k, raw in enumerate(raws):
        _, v, positive, ignored = values(raw, q, c, rule, k)
        add_statistics(stats[k], v, positive, ignored, rule.unit(c.bias), 1)
    return raws


def grad_eager(
    raws: Sequence[Tensor] | None, q: Queries, c: Candidates, moments: Tensor, sums: ColumnSums, sides: Tensor,
    rule: Rule, write: bool, _memory: Memory | None,
) -> Tiles | None:  # fmt: skip
    made = []
    for k, raw in enumerate(raws or similarities(q, c, rule)):
        s, v, positive, ignored = values(raw, q, c, rule, k)
        top, log_sum, weight, target, *uniform = sides[k][:, :, None]
        grad = weight * (rule.unit(c.bias) * (v - top) - log_sum).exp() - torch.where(positive, target, 0)
        grad = (grad - uniform[0] if uniform else grad).masked_fill(ignored, 0)
        product = grad * s.masked_fill(ignored, 0)
        moments[:, k] += product.sum(1)
        if sums.grads is not None:
            sums.grads.add_(grad.sum(0))
        if sums.moments is not None:
            sums.moments[k] += product.sum(0)
        if q.factors is not None and c.factors is not None:
            grad = grad * q.factors[k][:, None] * c.factors[k]
        made.append(grad)
    return _tiles(made, rule) if write else None


def _tiles(made: Sequence[Tensor], rule: Rule) -> Tiles:
    return made[0] if len(made) == 1 else _suffix_sums(made, rule)


def _suffix_sums(made: Sequence[Tensor], rule: Rule) -> Iterator[tuple[slice, Tensor]]:
    """For the features that each prefix adds, the sum over the prefixes that have them. In place."""
    total: Tensor | None = None
    for cut, grad in zip(reversed(rule.cuts()), reversed(made), strict=True):
        total = grad if total is None else total.add_(grad)
        yield cut, total


def _native(q: Queries, c: Candidates, rule: Rule) -> tuple[Any, ...]:
    """What the C++ takes of the pairs of a tile."""
    known = q.target, q.ids, c.ids, SAME_ID.index(rule.same_id), q.guide is not None
    return *known, rule.has_logits(c.bias), *rule.scales(rule.scale.item()), c.bias, q.factors, c.factors


def stats_cpu(q: Queries, c: Candidates, stats: Tensor, rule: Rule, memory: Memory | None) -> list[Tensor]:
    tiles = products(q, c, rule, memory)
    torch.ops.ssl_kernels.row_softmax_stats_(tiles, stats, *_native(q, c, rule))
    return tiles


def grad_cpu(
    raws: Sequence[Tensor] | None, q: Queries, c: Candidates, moments: Tensor, sums: ColumnSums, sides: Tensor,
    rule: Rule, write: bool, memory: Memory | None,
) -> Tiles | None:  # fmt: skip
    tiles = products(q, c, rule, memory) if raws is None else raws
    by_column = _column_sums(tiles[0], len(tiles), sums, q)
    known = _native(q, c, rule)
    torch.ops.ssl_kernels.row_softmax_grad_(tiles, moments, by_column, sides, write, raws is not None, *known)
    return _made(tiles, by_column, sums, rule, write)


def visit_cpu(
    q: Queries, c: Candidates, stats: Tensor, moments: Tensor, sums: ColumnSums, rule: Rule, weigh: Weights,
    write: bool, memory: Memory | None,
) -> Tiles | None:  # fmt: skip
    """Statistics and gradients of queries that meet all of their candidates."""
    tiles = products(q, c, rule, memory)
    by_column = _column_sums(tiles[0], len(tiles), sums, q)
    known = _native(q, c, rule)
    torch.ops.ssl_kernels.row_softmax_visit_(tiles, stats, moments, by_column, *weigh, write, *known)
    return _made(tiles, by_column, sums, rule, write)


def _column_sums(tile: Tensor, prefixes: int, sums: ColumnSums, q: Queries) -> Tensor:
    """[prefixes, planes, chunks, n], a plane for each of the sums that are wanted; that of G comes with the other one
    wherever there are factors."""
    rows, cols = tile.shape
    wanted = [t is not None for t in sums]
    planes = wanted[0] + (q.factors is not None and any(wanted))
    return tile.new_empty(prefixes, planes, -(-rows // _CHUNK), cols)


def _made(tiles: Sequence[Tensor], by_column: Tensor, sums: ColumnSums, rule: Rule, write: bool) -> Tiles | None:
    if sums.grads is not None:
        sums.grads.add_(by_column[:, 0].sum((0, 1)))
    if sums.moments is not None:
        sums.moments.add_(by_column[:, -1].sum(1))
    if not write:
        return None
    return tiles[0] if len(tiles) == 1 else zip(rule.cuts(), tiles, strict=True)


def _pairs_of(q: Queries, c: Candidates, rule: Rule) -> Any:
    """What Triton's kernels take of them."""
    from ssl_kernels.kernels.row_softmax import Guide, Pairs

    guide = None
    if q.guide is not None and c.guide is not None and q.threshold is not None:
        guide = Guide(q.guide, c.guide, q.threshold)
    scales = torch.stack(rule.scales(rule.scale))
    return Pairs(q.target, q.ids, c.ids, SAME_ID.index(rule.same_id), scales, c.bias, rule.has_logits(c.bias), guide)


def stats_triton(q: Queries, c: Candidates, stats: Tensor, rule: Rule, _memory: Memory | None) -> None:
    from ssl_kernels.kernels.row_softmax_stats import row_softmax_stats

    row_softmax_stats(q.features, c.features, stats[0], _pairs_of(q, c, rule))


def grad_triton(
    raws: None, q: Queries, c: Candidates, moments: Tensor, sums: ColumnSums, sides: Tensor, rule: Rule, write: bool,
    _memory: Memory | None,
) -> Tensor | None:  # fmt: skip
    from ssl_kernels.kernels.row_softmax_grad import row_softmax_grad
    from ssl_kernels.kernels.tiles import gradient_tile

    grad = gradient_tile(q.features, c.features.shape[0]) if write else None
    top, log_sum, weight, target, *every = sides[0]
    vectors = top, weight * torch.exp(-log_sum), target, every[0] if every else None
    row_softmax_grad(q.features, c.features, grad, moments[:, 0], sums.grads, _pairs_of(q, c, rule), *vectors)
    return grad


PANELS: dict[str, tuple[Any, Any]] = {
    "eager": (stats_eager, grad_eager),
    "cpu": (stats_cpu, grad_cpu),
    "triton": (stats_triton, grad_triton),  # of one prefix, which has no factors
}
TILES = {"eager": 8, "cpu": 1, "triton": 1}  # that each holds at a time, for each prefix


def gradient_scale(dtype: torch.dtype) -> float:
    """What the tiles of Triton are multiplied by."""
    from ssl_kernels.kernels.softmax_grad import gradient_scale

    return gradient_scale(dtype)
