"""The engine of the softmax over rows: passes over tiles of similarities, and the way from loss to gradients.

1. statistics of the rows, merged online over the tiles: 1 unit of 2 M N D FLOP;
2. gradients: G_ij = w_i (P_ij - T_ij) with softmax P, targets T and weights w of the rows, and then two products: 3
   units, or 2 for tiles that the first pass kept within the budget of ``ssl_kernels.use_tile_budget``.

The C++ kernels do both in one visit, 3 units, where a tile of enough rows and all candidates fits the workspace: it
knows all that there is to know of its rows.

Prefixes of the features, as Matryoshka's loss has them, share these units: the similarities of one are those of the one
before plus a product over the features that it adds, and the gradient of these features is a product with the sum of G
over all prefixes that have them. With prefixes of norm 1, s_ij = (q_i . c_j) a_i b_j, the gradient of q_i through a_i
is -q_i a_i^2 sum_j G_ij s_ij: row sums, and column sums, that the second pass makes of each tile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.matmul import onednn_is_faster
from ssl_kernels.ops.panel_shape import whole_rows
from ssl_kernels.ops.panels import run_panels
from ssl_kernels.ops.reuse import KeptTiles
from ssl_kernels.ops.row_strips import Candidates, Queries, RowMatrix, Strip
from ssl_kernels.ops.row_tiles import PANELS, TILES, ColumnSums, Memory, Rule, Weights, gradient_scale, visit_cpu

_EPS = 1e-12  # the least norm of a prefix


class Arguments(NamedTuple):
    x: Tensor  # [M, D], the queries
    y: Tensor  # [N, D], the candidates
    scale: Tensor
    bias: Tensor | None  # [N]
    target: Tensor  # [M]; negative for none
    x_ids: Tensor | None
    y_ids: Tensor | None
    weights: Tensor | None  # [M]
    x_guide: Tensor | None
    y_guide: Tensor | None
    threshold: Tensor | None  # [M]
    stats: Tensor | None  # of an earlier call, which need not be made again
    needs_grad: Sequence[bool]  # of the first four
    lse: bool  # the log-sum-exp of each row instead of its loss
    same_id: str
    hardness: float
    hardened: str
    dims: Sequence[int]  # the last is D
    dim_weights: Sequence[float]
    normalize: bool  # each prefix is divided by its norm
    label_smoothing: float
    reduction: str
    workspace: int
    keep_bytes: int
    backend: str
    what: str  # the function that was called
    group: str  # this and what follows is Across
    strategy: str
    grad_reduce: str
    even_batches: bool
    own_share: bool


def wanted_gradients(a: Arguments) -> Sequence[bool]:
    """Those that the forward pass makes: where there is an upstream gradient to a row, they wait for it."""
    return [False] * 4 if a.reduction == "none" else a.needs_grad


def stats_width(a: Arguments) -> int:
    return 6 if a.label_smoothing else 4


class Gradients(NamedTuple):
    """But for the scale in those of the features, and the unit in all; empty where not wanted."""

    dx: Tensor
    dy: Tensor
    by_scale: Tensor
    by_bias: Tensor


class Passes:
    def __init__(self, a: Arguments) -> None:
        self.a, self.triton = a, a.backend == "triton"
        self.rule = Rule(a.scale, a.same_id, a.hardness, a.hardened, a.dims, a.normalize)
        self.factors = [_factors(t, self.rule) if a.normalize else None for t in (a.x, a.y)]
        self.matrix = RowMatrix(
            a,
            Queries(a.x, a.target, _dense(a.x_ids), a.x_guide, _dense(a.threshold), self.factors[0]),
            Candidates(a.y, _dense(a.y_ids), _dense(a.bias), a.y_guide, self.factors[1]),
            **{name: getattr(a, name) for name in ("lse", "same_id", "hardness", "hardened", "dims", "dim_weights")},
            **{name: getattr(a, name) for name in ("normalize", "label_smoothing", "reduction")},
        )
        self.stats_panel, self.grad_panel = PANELS[a.backend]
        self.prefixes = len(a.dims)
        self.tiles = TILES[a.backend] * self.prefixes
        self.kept = KeptTiles(a.keep_bytes)  # by strip and corner
        self.memory = None if onednn_is_faster() else Memory()  # oneDNN writes to none that it is given
        dtype = torch.float32 if a.x.device.type == "mps" else torch.float64  # MPS has no float64
        self.zeros = functools.partial(torch.zeros, dtype=dtype, device=a.x.device)
        self.compute_dtype = a.x.dtype if self.triton else _checks.accumulation_dtype(a.x.dtype)
        self.run = functools.partial(
            run_panels,
            workspace=a.workspace,
            compute_dtype=self.compute_dtype,
        )

    def unit(self) -> Tensor:
        """What statistics are multiplied by to give those of logits."""
        return self.rule.unit(self.a.bias)

    def statistics(self) -> Tensor:
        """[K, M, 4 or 6] of the rows of this rank, for K prefixes."""
        stats = self._no_statistics(self.a.x.shape[0])
        want_dx, *_ = wanted_gradients(self.a)

        def panel(strip: Strip, x_i: Tensor, y_j: Tensor, _: Tensor, i: int, j: int) -> None:
            queries, candidates = strip.queries.part(x_i, i, j), strip.candidates.part(y_j, j)
            nbytes = self.prefixes * len(x_i) * len(y_j) * x_i.itemsize
            keeps = (strip.is_own or want_dx) and self.kept.has_room(nbytes)
            if keeps:
                self.kept.make_room()
            memory = None if keeps else self.memory
            raws = self.stats_panel(queries, candidates, stats[:, i : i + len(x_i)], self.rule, memory)
            if raws is not None and keeps:
                self.kept.keep((strip.key, i, j), raws)

        tiles = 0 if self.triton else self.tiles
        for strip in self.matrix.strips(rows=True, cols=False):
            self._visit(strip, panel, tiles=tiles, stats_width=0, want_dx=False, want_dy=False)
        return stats

    def _no_statistics(self, rows: int) -> Tensor:
        stats = self.zeros(self.prefixes, rows, stats_width(self.a))
        stats[:, :, 0].fill_(-torch.inf)
        return stats

    def rows_of_one_visit(self) -> int:
        """How many rows at a time meet all candidates, so that one visit makes statistics and gradients; 0 for none."""
        a = self.a
        if a.backend != "cpu" or a.group or a.lse or a.stats is not None or not any(wanted_gradients(a)):
            return 0
        if len(a.y) == 0:
            return 0
        if a.y.dtype != self.compute_dtype and a.y.numel() * self.compute_dtype.itemsize > a.workspace:
            return 0  # all candidates are converted at a time
        return whole_rows(len(a.x), len(a.y), self.tiles * self.compute_dtype.itemsize, a.workspace)

    def in_one_visit(self, rows: int, weigh: Weights) -> tuple[Tensor, Gradients]:
        """Statistics and gradients, of so many rows at a time."""
        want_dx, want_dy, *_ = wanted_gradients(self.a)
        sums, stats = self._column_sums(), self._no_statistics(len(self.a.x))
        (strip,) = self.matrix.strips(rows=True, cols=True)

        def panel(strip: Strip, x_i: Tensor, y_j: Tensor, moments: Tensor, i: int, j: int) -> Any:
            queries, candidates = strip.queries.part(x_i, i, j), strip.candidates.part(y_j, j)
            part = slice(i, i + len(x_i))
            known = weigh if weigh.rows is None else weigh._replace(rows=weigh.rows[part])
            return visit_cpu(
                queries, candidates, stats[:, part], moments, sums, self.rule, known, want_dx or want_dy, self.memory
            )

        moments, dx, dy = self._visit(
            strip, panel, tiles=self.tiles, stats_width=self.prefixes, want_dx=want_dx, want_dy=want_dy,
            shape=(rows, len(self.a.y)),
        )  # fmt: skip
        return stats, self._finished(dx, dy, moments, moments.sum(), sums)

    def _column_sums(self) -> ColumnSums:
        _, want_dy, _, want_bias = wanted_gradients(self.a)
        return ColumnSums(
            self.zeros(self.a.y.shape[0]) if want_bias else None,
            self.zeros(self.prefixes, self.a.y.shape[0]) if want_dy and self.a.normalize else None,
        )

    def gradients(self, sides: Tensor) -> Gradients:
        """Of the rows with these vectors, [K, 4 or 5, M] as :class:`ssl_kernels.ops.row_loss._Summary` has them."""
        want_dx, want_dy, _, want_bias = wanted_gradients(self.a)
        moments = self.zeros(self.a.x.shape[0], self.prefixes)
        sums = self._column_sums()
        everyones = torch.stack([self.matrix.gather_vectors(side, 0) for side in sides]) if self.a.group else sides

        def panel(strip: Strip, x_i: Tensor, y_j: Tensor, stats: Tensor, i: int, j: int, *, write: bool) -> Any:
            queries, candidates = strip.queries.part(x_i, i, j), strip.candidates.part(y_j, j)
            raws = None if strip.side else self.kept.take((strip.key, i, j))
            by_column = sums.part(j, len(y_j)) if strip.is_own or strip.side else ColumnSums(None, None)
            rows = slice(strip.first + i, strip.first + i + len(x_i))
            sides = everyones[:, :, rows]
            return self.grad_panel(raws, queries, candidates, stats, by_column, sides, self.rule, write, self.memory)

        dx = dy = None
        moment = self.zeros(())
        for strip in self.matrix.strips(rows=want_dx or not (want_dy or want_bias), cols=want_dy or want_bias):
            here_dx, here_dy = want_dx and not strip.side, want_dy and (strip.is_own or strip.side == 1)
            write = here_dx or here_dy
            stats, *made = self._visit(
                strip,
                functools.partial(panel, write=write),
                tiles=0 if self.triton and not write else self.tiles,
                stats_width=self.prefixes,
                want_dx=here_dx,
                want_dy=here_dy,
                dx=dx if here_dx else None,
                dy=dy if here_dy else None,
                add=not strip.is_own,
            )
            if strip.is_own:
                dx, dy = made
            if strip.is_counted:
                moment += stats.sum()
            if not strip.side:
                moments += stats
        assert dx is not None
        assert dy is not None
        return self._finished(dx, dy, moments, moment, sums)

    def _finished(self, dx: Tensor, dy: Tensor, moments: Tensor, moment: Tensor, sums: ColumnSums) -> Gradients:
        if self.triton:
            scale = gradient_scale(self.a.x.dtype)
            dx, dy = dx / scale, dy / scale
        if self.a.normalize:
            self._through_norms(dx, self.a.x, moments.t(), self.factors[0])
            self._through_norms(dy, self.a.y, sums.moments, self.factors[1])
        return Gradients(dx, dy, moment, dx.new_empty(0) if sums.grads is None else sums.grads.to(dx.dtype))

    def _visit(self, strip: Strip, panel: Callable[..., Any], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        return self.run(functools.partial(panel, strip), strip.queries.features, strip.candidates.features, **options)

    def _through_norms(self, gradient: Tensor, rows: Tensor, moments: Tensor | None, factors: Tensor | None) -> None:
        if moments is None or factors is None or not len(gradient):
            return
        pull = moments.to(gradient.dtype) * factors.square().masked_fill(factors >= 1 / _EPS, 0)
        for k, cut in enumerate(self.rule.cuts()):
            gradient[:, cut].addcmul_(rows[:, cut].to(gradient.dtype), pull[k:].sum(0)[:, None], value=-1)


def _dense(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.contiguous()


def _factors(rows: Tensor, rule: Rule) -> Tensor:
    """One over the norm of each prefix, [K, rows]."""
    wide = _checks.accumulation_dtype(rows.dtype)
    norms = torch.stack([torch.linalg.vector_norm(rows[:, cut], dim=1, dtype=wide) for cut in rule.cuts()])
    return 1 / norms.square().cumsum(0).sqrt().clamp(min=_EPS)
