"""What a process visits of the matrix of similarities: all of it alone, a strip each way as one of several ranks.

A rank visits its own rows against the columns of all ranks, which makes the gradient of its rows, and its own columns
against the rows of all ranks. So the features of others travel, and no gradient does. The second strip is one of the
transposed matrix: in both, what is the rank's own are the rows.

In units of 2 M_r N D FLOP, for W ranks that hold M_r = N_r rows each of N: sigmoid 4, softmax 6, and 3 if y is x, whose
matrix is symmetric: the rows' strip is then enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.distributed import Across, Ranks
from ssl_kernels.ops.contrastive import NO_DIAGONAL, NO_PAIRS, Pairs


class Strip(NamedTuple):
    """Rows of this rank against columns of another one, or of its own."""

    x: Tensor
    y: Tensor
    pairs: Pairs
    side: int  # 0 for rows of the matrix, 1 for columns of it: then the strip is one of the transpose
    first: int  # the place of the first of y among those of all ranks
    is_own: bool  # of rows and columns of this rank: it gives what both sides ask for
    is_counted: bool  # whether its pairs count in sums over all ranks, which must meet each once


class Shares:
    """What the ranks of an op have of a batch, with ``counts`` of the rows of each side on each rank.

    Args:
        a: the arguments of the op, with needs_grad and Across among them.
        sides: the features whose rows are counted.
        pairs: ids, and what equal ids mean.
        what: the function that was called.
        facts: what all ranks must say alike, by name.
    """

    def __init__(self, a: Any, sides: Sequence[Tensor], pairs: Pairs, what: str, **facts: object) -> None:
        self.counts = [[len(side)] for side in sides]
        self.size, self.factor, self.own_share = 1, 1, False
        self._ranks: Ranks | None = None
        if not a.group:
            return
        self._ranks = Ranks(a.group, what)
        self.size, self.own_share = self._ranks.size, a.own_share
        self.factor = self.size if a.grad_reduce == "mean" else 1
        wanted = [name for name, needed in zip(("x", "y", "scale", "bias"), a.needs_grad, strict=False) if needed]
        facts |= {"gradients wanted": wanted, "own_share": a.own_share}
        self.counts = agree(self._ranks, sides, a, pairs, **facts)

    def count(self, side: int) -> int:
        """Of rows, or of columns, over all ranks."""
        return sum(self.counts[side])

    def sum(self, totals: Tensor) -> Tensor:
        """Over the ranks."""
        return totals if self._ranks is None else self._ranks.sum(totals)

    def largest(self, number: Tensor) -> Tensor:
        """Over the ranks."""
        return number if self._ranks is None else self._ranks.gather(number).amax(0)

    def gather_vectors(self, vectors: Tensor, side: int) -> Tensor:
        """[k, n] of the rows or columns of a rank, as [k, M] or [k, N] of all."""
        if self._ranks is None:
            return vectors
        return self._ranks.gather_rows(vectors.t(), self.counts[side]).t().contiguous()

    def shared(self, loss: Tensor, scalars: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Of what this rank adds to the loss and its derivatives, and their unit: the loss to be shown, and the scalars
        of a :class:`ssl_kernels.ops.contrastive.Result` whose derivatives reduce to those of the loss."""
        *_, unit = scalars
        overall = self.sum(torch.stack([loss, *scalars[:2]]))
        shown = loss * self.size if self.own_share else overall[0]
        return shown.to(dtype), torch.stack([*overall[1:] / self.size, unit * self.factor]).to(dtype)


class Matrix(Shares):
    """The similarities of x and y, or of x and itself, [M, D] and [N, D] over all ranks.

    Args:
        a: the arguments of an op: x, y or None, ids and what equal ids mean, positive, excluded, needs_grad and Across.
    """

    def __init__(self, a: Any, what: str, **facts: object) -> None:
        self.sides = [a.x] if a.y is None else [a.x, a.y]
        self.symmetric = a.y is None
        self.pairs = Pairs.of(a)
        if not self.symmetric:  # else a diagonal is the number of rows
            facts["offset"] = a.positive
        super().__init__(a, self.sides, self.pairs, what, **facts)
        ranks = self._ranks
        if ranks is None:
            return
        ids: list[Any] = [*self.pairs[:2]]
        if self.pairs.row_ids is not None:
            ids = [ranks.gather_rows(i, counts) for i, counts in zip(ids, self.counts, strict=False)]
        self._whole = self.pairs._replace(row_ids=ids[0], col_ids=ids[-1])
        if self.symmetric:  # the diagonals are of a rank's own rows
            self._whole = self._whole._replace(positive=NO_DIAGONAL, excluded=NO_DIAGONAL)
        self._blocks = [
            ranks.blocks(side, counts, a.strategy, number)
            for number, (side, counts) in enumerate(zip(self.sides, self.counts, strict=True))
        ]

    def strips(self, rows: bool, cols: bool) -> Iterator[Strip]:
        """The own block first; then, as wanted, what the rank's rows and its columns meet of others'."""
        if self._ranks is None:
            yield Strip(self.sides[0], self.sides[-1], self.pairs, 0, 0, True, True)
            return
        wanted = [side for side, want in enumerate((rows, cols)) if want]
        for number, arrived in enumerate(zip(*(self._blocks[self._other(side)] for side in wanted), strict=True)):
            if number == 0:
                first, y = self._blocks[-1].start, self.sides[-1]
                pairs = self.pairs if self.symmetric else self._pairs(0, first, len(y))
                yield Strip(self.sides[0], y, pairs, 0, first, True, True)
                continue
            for side, (first, theirs) in zip(wanted, arrived, strict=True):
                pairs = self._pairs(side, first, len(theirs))
                yield Strip(self.sides[side], theirs, pairs, side, first, False, side == wanted[0])

    def _other(self, side: int) -> int:
        """Whose rows those of a side meet."""
        return 0 if self.symmetric else 1 - side

    def _pairs(self, side: int, first: int, count: int) -> Pairs:
        """Of this rank's rows, on a side, and so many on the other side."""
        own = self._blocks[side]
        whole = self._whole if side == 0 else self._whole.transposed()
        return whole.part(own.start, len(own.rows), first, count)


def agree(ranks: Ranks, sides: Sequence[Tensor], over: Any, pairs: Pairs, **facts: object) -> list[list[int]]:
    """How many rows each rank has of each side, once all of them call alike; ``over`` has the fields of Across."""
    if over.even_batches:
        return [[len(side)] * ranks.size for side in sides]
    alike = {
        "features": sides[0].shape[1], "dtype": sides[0].dtype, "ids": pairs.row_ids is not None,
        "ignore_same_id": pairs.ignore_same_id, **facts, "grad_reduce": over.grad_reduce, "strategy": over.strategy,
    }  # fmt: skip
    rows = ranks.agree([len(side) for side in sides], alike, sides[0].device)
    return [list(counts) for counts in zip(*rows, strict=True)]


def gathered(
    over: Across,
    features: Sequence[Tensor],
    scalars: Sequence[Tensor],
    pairs: Pairs = NO_PAIRS,
    *,
    what: str,
    **facts: object,
) -> tuple[list[Tensor], list[Tensor], Pairs]:
    """For the reference of ``what``: the features and ids of all ranks, in whose graph are those of this one, and the
    scalars.

    The gradients that flow back are those that the ranks are to have. It cannot be differentiated twice, for what other
    ranks hold is constant.
    """
    if not over.group:
        return list(features), list(scalars), pairs
    if over.own_share:
        raise NotImplementedError("own_share: the reference gives the loss of all ranks; expected False, got True")
    ranks = Ranks(over.group, f"{what}, reference")
    counts = agree(ranks, features, over, pairs, **facts)
    everyones = []
    for own, count in zip(features, counts, strict=True):
        parts = list(ranks.gather_rows(own.detach(), count).split(count))
        parts[ranks.rank] = _ScaledGradient.apply(own, ranks.size if over.grad_reduce == "mean" else 1)
        everyones.append(torch.cat(parts))
    shares = [_ScaledGradient.apply(t, 1 if over.grad_reduce == "mean" else 1 / ranks.size) for t in scalars]
    ids = [None if i is None else ranks.gather_rows(i, count) for i, count in zip(pairs[:2], counts, strict=False)]
    return everyones, shares, pairs._replace(row_ids=ids[0], col_ids=ids[-1])


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("ssl_kernels: a loss over several processes cannot be differentiated twice")
        return gradient * ctx.factor, None
