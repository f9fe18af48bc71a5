"""What there is to know of queries and candidates whose similarities meet in a softmax over rows, and what a process
visits of them: all of them alone, a strip each way as one of several ranks.

A rank visits its own queries against the candidates of all ranks, which gives the log-sum-exps and the gradient of its
queries; and, once the log-sum-exps of all queries are known, the queries of all ranks against its own candidates, which
gives the gradient of these. Features travel, and a few numbers to a row. In units of 2 M_r N D FLOP, for W ranks of
which one has M_r = M / W queries and N / W candidates: 1 for the statistics, and 2 for either gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.distributed import Blocks, Ranks
from ssl_kernels.ops.contrastive import NO_PAIRS
from ssl_kernels.ops.strips import Shares

NO_TARGET = -(2**62)


class Queries(NamedTuple):
    features: Tensor  # [m, D]
    target: Tensor  # [m]: the column of each one's target, counted from the first of those that they meet
    ids: Tensor | None
    guide: Tensor | None  # [m, E]: features of another model
    threshold: Tensor | None  # [m]: of their scores
    factors: Tensor | None  # [K, m]: one over the norm of each prefix

    def part(self, features: Tensor, first: int, col: int) -> Queries:
        """Those from ``first`` on, which meet columns from ``col`` on."""
        rows = slice(first, first + len(features))
        return Queries(
            features,
            self.target[rows] - col,
            None if self.ids is None else self.ids[rows],
            None if self.guide is None else self.guide[rows],
            None if self.threshold is None else self.threshold[rows],
            None if self.factors is None else self.factors[:, rows],
        )


class Candidates(NamedTuple):
    features: Tensor  # [n, D]
    ids: Tensor | None
    bias: Tensor | None  # [n]
    guide: Tensor | None
    factors: Tensor | None  # [K, n]

    def part(self, features: Tensor, first: int) -> Candidates:
        cols = slice(first, first + len(features))
        return Candidates(
            features,
            None if self.ids is None else self.ids[cols],
            None if self.bias is None else self.bias[cols],
            None if self.guide is None else self.guide[cols],
            None if self.factors is None else self.factors[:, cols],
        )


class Strip(NamedTuple):
    """Queries against candidates, one of which are those of this rank."""

    queries: Queries
    candidates: Candidates
    first: int  # the place of the first query among those of all ranks
    side: int  # 0 if the queries are this rank's, and the candidates another one's; 1 if it is the other way round
    is_own: bool  # if both are this rank's
    is_counted: bool  # whether its pairs count in sums over all ranks, which must meet each once
    key: int  # by which a second visit knows it again


class RowMatrix(Shares):
    """The similarities of all queries and candidates of an op with these arguments."""

    def __init__(self, a: Any, queries: Queries, candidates: Candidates, **facts: object) -> None:
        self._own = queries, candidates
        guide = None if candidates.guide is None else [candidates.guide.shape[1], candidates.guide.dtype]
        facts |= {"ids": candidates.ids is not None, "candidate_bias": candidates.bias is not None, "guide": guide}
        features = [queries.features, candidates.features]
        super().__init__(a, features, NO_PAIRS, a.what, **facts)
        if self._ranks is None:
            return
        own_first = sum(self.counts[1][: self._ranks.rank])
        target = torch.where(queries.target < 0, NO_TARGET, queries.target + own_first)
        self._whole = self._gathered(queries._replace(target=target), 0), self._gathered(candidates, 1)
        self._blocks = [
            _Features(self._ranks, side, counts, a.strategy, number)
            for number, (side, counts) in enumerate(zip(self._own, self.counts, strict=True))
        ]

    def strips(self, rows: bool, cols: bool) -> Iterator[Strip]:
        """The own block first; then, as wanted, what the rank's queries and its candidates meet of others'."""
        if self._ranks is None:
            yield Strip(*self._own, 0, 0, True, True, 0)
            return
        queries, candidates = self._own
        first_query, first_candidate = (blocks.start for blocks in self._blocks)
        wanted = [side for side, want in enumerate((rows, cols)) if want]
        yield_own = True
        for arrived in zip(*(self._blocks[1 - side] for side in wanted), strict=True):
            if yield_own:
                own = queries._replace(target=self._targets(first_query, len(queries.target), first_candidate))
                yield Strip(own, candidates, first_query, 0, True, True, first_candidate)
                yield_own = False
                continue
            for side, (first, features, guide) in zip(wanted, arrived, strict=True):
                if side == 0:
                    met = self._whole[1].part(features, first)._replace(guide=guide)
                    own = queries._replace(target=self._targets(first_query, len(queries.target), first))
                    yield Strip(own, met, first_query, 0, False, side == wanted[0], first)
                else:
                    asking = self._whole[0].part(features, first, first_candidate)._replace(guide=guide)
                    yield Strip(asking, candidates, first, 1, False, side == wanted[0], first)

    def _targets(self, first: int, count: int, col: int) -> Tensor:
        return self._whole[0].target[first : first + count] - col

    def _gathered(self, own: Any, side: int) -> Any:
        """What there is to know of the queries or candidates of all ranks, but for their features."""
        assert self._ranks is not None
        whole: dict[str, Tensor | None] = {}
        for name, value in own._asdict().items():
            if value is None or name in ("features", "guide"):
                whole[name] = None
            elif name == "factors":
                whole[name] = self.gather_vectors(value, side)
            else:
                whole[name] = self._ranks.gather_rows(value, self.counts[side])
        return type(own)(**whole)


class _Features:
    """The features of queries or candidates of all ranks in blocks, and of the guide where there is one.

    Both travel as one: their bytes side by side.
    """

    def __init__(self, ranks: Ranks, own: Any, counts: Sequence[int], strategy: str, number: int) -> None:
        self._own = [t for t in (own.features, own.guide) if t is not None]
        rows = self._own[0]
        if len(self._own) > 1:
            rows = torch.cat([t.contiguous().view(torch.uint8) for t in self._own], 1)
        self._blocks: Blocks = ranks.blocks(rows, counts, strategy, number)
        self.start = self._blocks.start

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        for first, rows in self._blocks:
            if len(self._own) == 1:
                yield first, rows, None
                continue
            parts = rows.split([t.shape[1] * t.dtype.itemsize for t in self._own], 1)
            features, guide = (part.contiguous().view(t.dtype) for part, t in zip(parts, self._own, strict=True))
            yield first, features, guide
