"""Two-sided softmax over tiles of similarities: the engine of CLIP, NT-Xent and SupCon.

With z_ij = t x_i . y_j, every row with a positive pair contributes LSE_j z_ij less the mean z of its positives, and
every column likewise. Two passes over the tiles:

1. statistics: of rows and columns the largest x_i . y_j and the sum of exponentials against it, merged online, and the
   sums over positives: 1 unit of 2 M N D FLOP;
2. gradients: G_ij = w_i (P_ij - T_ij) + v_j (P'_ij - T'_ij), with softmax P by rows and P' by columns, targets T and
   T', and the weights of rows and columns in the loss; then two products: 3 units, or 2 for tiles that the first pass
   kept within the budget of ``ssl_kernels.use_tile_budget``.

Where y is x (``y`` None), the matrix is symmetric: tiles above the diagonal give the columns' side too, and each pass
costs half.

However large z is, a loss and a gradient are made of differences of z, and those are made of differences of x_i . y_j:
t times a maximum plus the logarithm of a sum would be rounded to the digits of the larger. For the same reason z_ij and
z_ji are one number where the matrix is symmetric, and a tile is the same in both passes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.distributed import ALONE, Across
from ssl_kernels.ops import _checks, contrastive
from ssl_kernels.ops._op import Op
from ssl_kernels.ops.contrastive import Pairs, wanted_gradients
from ssl_kernels.ops.matmul import matmul
from ssl_kernels.ops.panels import gradient_of_columns, run_panels
from ssl_kernels.ops.reuse import KeptTiles, fit_budget
from ssl_kernels.ops.strips import Matrix, Strip
from ssl_kernels.settings import tile_budget_bytes, workspace_bytes

KERNELS = ("cpu", "triton")


def softmax_contrastive(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    pairs: Pairs,
    *,
    seam: int = 0,
    label_smoothing: float = 0.0,
    reduction: str,
    backend: str,
    over: Across = ALONE,
    what: str = "",
) -> tuple[Tensor, Tensor]:
    """The loss, and how many rows and columns have no positive pair.

    Without ``y`` the rows of x meet each other, in panels of which none lies across the row ``seam``: a positive
    diagonal must not lie below the main one, nor within such a panel.
    """
    _checks.check_transforms(x, scale, *(() if y is None else (y,)))
    grad = torch.is_grad_enabled()
    needs_grad = [grad and t is not None and t.requires_grad for t in (x, y, scale)]
    keep_bytes = tile_budget_bytes() if any(needs_grad) and reduction != "none" else 0
    loss, _, _, _, unpaired = _op(
        Arguments(
            x, y, scale, *pairs, None, seam, label_smoothing, reduction, needs_grad, workspace_bytes(x.device),
            keep_bytes, backend, what, *over,
        )
    )  # fmt: skip
    return loss, unpaired


def dense_losses(z: Tensor, positive: Tensor, ignored: Tensor, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """The loss of each row by definition, and which rows have a positive pair; the others' loss is 0."""
    paired = positive.any(1)
    log_p = z.masked_fill(ignored & paired[:, None], -torch.inf).log_softmax(1).masked_fill(ignored, 0)
    target = (1 - label_smoothing) * positive.to(z.dtype) / positive.sum(1, keepdim=True).clamp(min=1)
    if label_smoothing:
        target = target + label_smoothing * (~ignored).to(z.dtype) / (~ignored).sum(1, keepdim=True).clamp(min=1)
    return -(target * log_p).sum(1).masked_fill(~paired, 0), paired


def reduce_losses(losses: Tensor, paired: Tensor, reduction: str) -> Tensor:
    """The mean is over the rows that have a positive pair."""
    if reduction == "none":
        return losses
    return losses.sum() / paired.sum().clamp(min=1) if reduction == "mean" else losses.sum()


class Arguments(NamedTuple):
    x: Tensor
    y: Tensor | None
    scale: Tensor
    x_ids: Tensor | None
    y_ids: Tensor | None
    ignore_same_id: bool
    positive: int
    excluded: int
    row_weight: Tensor | None  # [M], replaces what the reduction gives to a row and to the column paired with it
    seam: int
    label_smoothing: float
    reduction: str
    needs_grad: Sequence[bool]  # of the first three
    workspace: int
    keep_bytes: int
    backend: str
    what: str  # the function that was called
    group: str  # this and what follows is Across
    strategy: str
    grad_reduce: str
    even_batches: bool
    own_share: bool


# Per backend, the two panel functions. Statistics [m, 4] or [m, 6] float64 of rows, and of columns or None, are
# updated: max x_i . y_j, sum of exp(t (x_i . y_j - max)), sum of x_i . y_j over positives, their number; and with label
# smoothing the sum over all pairs that count, and their number. The raw tile is returned where there is one. Gradients:
# G [m, n] if ``write``, and its row sums of G (x_i . y_j) are added to stats [m, 1]. A side that ``row`` and ``col``
# are cut from is described at _Summary; for Triton it is what _sides_for_triton makes of it, and a Scratch comes last.


def _similarities(x: Tensor, y: Tensor) -> Tensor:
    """x y^T, symmetric to the last bit where y is x: a product is rounded as the place in it requires."""
    raw = matmul(x, y.t())
    if y is x and raw.device.type == "cpu" and raw.dtype == torch.float32:
        torch.ops.ssl_kernels.mirror_(raw)
    elif y is x:
        raw = torch.maximum(raw, raw.t().contiguous())
    return raw


def _stats_eager(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor | None, scale: Tensor, pairs: Pairs) -> Tensor:
    raw = _similarities(x, y)
    masks = pairs.masks(raw.shape, raw.device)
    for stats, dim in ((rows, 1), (cols, 0)):
        if stats is not None:
            add_statistics(stats, raw, *masks, scale, dim)
    return raw


def add_statistics(stats: Tensor, raw: Tensor, positive: Tensor, ignored: Tensor, scale: Tensor, dim: int) -> None:
    """Along a dimension of a tile."""
    best = raw.masked_fill(ignored, -torch.inf).amax(dim)
    reference = best.masked_fill(best == -torch.inf, 0)
    exps = (scale * (raw - reference.unsqueeze(dim))).exp().masked_fill(ignored, 0).sum(dim)
    best, wide = best.to(stats.dtype), scale.to(stats.dtype)
    top = torch.maximum(stats[:, 0], best)
    stats[:, 1] = _rescaled(stats[:, 1], stats[:, 0], top, wide) + _rescaled(exps, best, top, wide)
    stats[:, 0] = top
    stats[:, 2] += raw.masked_fill(~positive, 0).sum(dim)
    stats[:, 3] += positive.sum(dim)
    if stats.shape[1] == 6:
        stats[:, 4] += raw.masked_fill(ignored, 0).sum(dim)
        stats[:, 5] += (~ignored).sum(dim)


def _rescaled(sums: Tensor, top: Tensor, new_top: Tensor, scale: Tensor) -> Tensor:
    """Sums of exponentials against ``top`` as sums against ``new_top``."""
    return sums * torch.where(top == new_top, 1, torch.where(top == -torch.inf, 0, (scale * (top - new_top)).exp()))


def _grad_eager(
    raw: Tensor | None, x: Tensor, y: Tensor, stats: Tensor, scale: Tensor, pairs: Pairs, row: Tensor, col: Tensor,
    write: bool,
) -> Tensor | None:  # fmt: skip
    raw = _similarities(x, y) if raw is None else raw
    positive, ignored = pairs.masks(raw.shape, raw.device)
    top, log_sum, weight, target, *uniform = row[:, :, None]
    grad = weight * (scale * (raw - top) - log_sum).exp()
    top, log_sum, weight, col_target, *col_uniform = col
    grad += weight * (scale * (raw - top) - log_sum).exp()
    grad -= torch.where(positive, target + col_target, 0)
    if uniform:
        grad -= uniform[0] + col_uniform[0]
    grad = grad.masked_fill(ignored, 0)
    stats[:, 0] += (grad * raw.masked_fill(ignored, 0)).sum(1)
    return grad if write else None


def _stats_cpu(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor | None, scale: Tensor, pairs: Pairs) -> Tensor:
    raw = _similarities(x, y)
    torch.ops.ssl_kernels.softmax_stats_(raw, rows, cols, scale.item(), *pairs)
    return raw


def _grad_cpu(
    raw: Tensor | None, x: Tensor, y: Tensor, stats: Tensor, scale: Tensor, pairs: Pairs, row: Tensor, col: Tensor,
    write: bool,
) -> Tensor | None:  # fmt: skip
    tile = _similarities(x, y) if raw is None else raw
    torch.ops.ssl_kernels.softmax_grad_(tile, stats, scale.item(), *pairs, row, col, write)
    return tile if write else None


def _stats_triton(
    x: Tensor, y: Tensor, rows: Tensor, cols: Tensor | None, scale: Tensor, pairs: Pairs, scratch: Any
) -> None:
    from ssl_kernels.kernels.softmax_stats import softmax_stats

    softmax_stats(x, y, rows, cols, scale, *pairs, scratch=scratch)


def _grad_triton(
    raw: Tensor | None, x: Tensor, y: Tensor, stats: Tensor, scale: Tensor, pairs: Pairs,
    row: Sequence[Tensor], col: Sequence[Tensor], write: bool, scratch: Any,
) -> Tensor | None:  # fmt: skip
    from ssl_kernels.kernels.softmax_grad import softmax_grad

    grad = scratch.gradient(x, y.shape[0]) if write else None
    vectors = [vector for both in zip(row, col, strict=True) for vector in both]
    softmax_grad(x, y, grad, stats, scale, *pairs, *vectors, *[None] * (8 - len(vectors)), scratch=scratch)
    return grad


def _sides_for_triton(side: Tensor) -> Tensor:
    """The largest similarity, and what exponentials against it are multiplied by; the rest as it was. It is how
    ``softmax_summary`` of the kernels writes it."""
    top, log_sum, weight, *rest = side
    return torch.stack([top, weight * torch.exp(-log_sum), *rest])


def _gradient_scale(dtype: torch.dtype) -> float:
    from ssl_kernels.kernels.softmax_grad import gradient_scale

    return gradient_scale(dtype)


_PANELS: dict[str, tuple[Any, Any]] = {
    "eager": (_stats_eager, _grad_eager),
    "cpu": (_stats_cpu, _grad_cpu),
    "triton": (_stats_triton, _grad_triton),
}
_TILES = {"eager": 8, "cpu": 1, "triton": 1}  # tiles that each holds at a time


class _Passes:
    """The two passes over the tiles of x and y, or of x and itself."""

    def __init__(self, a: Arguments, matrix: Matrix) -> None:
        self.matrix, self.scale, self.wanted = matrix, a.scale, wanted_gradients(a)
        self.x, self.y, self.symmetric, self.seam = a.x, matrix.sides[-1], matrix.symmetric, a.seam
        self.backend, self.workspace, self.triton = a.backend, a.workspace, a.backend == "triton"
        self.stats_panel, self.grad_panel = _PANELS[a.backend]
        self.tiles = _TILES[a.backend]
        self.kept = KeptTiles(a.keep_bytes)  # raw, by side, strip and corner
        self.run = functools.partial(
            run_panels,
            workspace=a.workspace,
            compute_dtype=a.x.dtype if self.triton else _checks.accumulation_dtype(a.x.dtype),
        )

    def statistics(self, width: int) -> list[Tensor]:
        """Of the rows and of the columns; one for both if the matrix is symmetric."""
        dtype = torch.float32 if self.x.device.type == "mps" else torch.float64  # MPS has no float64
        rows, cols = self.x.shape[0], 0 if self.symmetric else self.y.shape[0]
        both = torch.zeros(rows + cols, width, dtype=dtype, device=self.x.device)
        both[:, 0].fill_(-torch.inf)
        sides = [both] if self.symmetric else [both[:rows], both[rows:]]

        def panel(strip: Strip, scratch: Any, x_i: Tensor, y_j: Tensor, _: Tensor, i: int, j: int) -> None:
            m, n = x_i.shape[0], y_j.shape[0]
            no_cols = not strip.is_own or (self.symmetric and i == j)  # on the diagonal columns are rows
            col_stats = None if no_cols else sides[-1][j : j + n]
            self.kept.make_room()
            pairs = strip.pairs.part(i, m, j, n)
            if scratch is not None:
                row_stats = scratch.once(("rows", i, m), lambda: sides[strip.side][i : i + m])
                self.stats_panel(x_i, y_j, row_stats, col_stats, self.scale, pairs, scratch)
                return
            raw = self.stats_panel(x_i, y_j, sides[strip.side][i : i + m], col_stats, self.scale, pairs)
            if raw is not None and (strip.is_own or self.wanted[strip.side]):
                self.kept.keep((strip.side, strip.first, i, j), [raw])

        tiles = 0 if self.triton else self.tiles
        for strip in self.matrix.strips(rows=True, cols=not self.symmetric):
            scratch = self._merging(strip)
            given = functools.partial(panel, strip, scratch)
            self._run(strip, given, tiles=tiles, stats_width=0, want_dx=False, want_dy=False)
            if scratch is not None:
                scratch.reduce()
        return sides

    def _merging(self, strip: Strip) -> Any:
        """What the launches of a pass that makes statistics share; None where Triton does not run it."""
        if not self.triton:
            return None
        from ssl_kernels.kernels.softmax_stats import merging

        return merging(strip.y.shape[0], self.workspace, self.scale)

    def gradients(self, sides: list[Tensor], want_dx: bool, want_dy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """sum_j G y, sum_i G x and sum_ij G (x_i . y_j), the latter of the pairs that count."""

        def panel(strip: Strip, scratch: Any, x_i: Tensor, y_j: Tensor, stats: Tensor, i: int, j: int) -> Tensor | None:
            m, n = x_i.shape[0], y_j.shape[0]
            kept, pairs = self.kept.take((strip.side, strip.first, i, j)), strip.pairs.part(i, m, j, n)
            raw = kept[0] if kept else None
            row, col = sides[strip.side], overall[-1 - strip.side]
            on_diagonal = self.symmetric and strip.is_own and i == j
            if scratch is None:
                row, col = row[:, i : i + m], col[:, strip.first :][:, j : j + n]
                grad: Tensor | None = self.grad_panel(raw, x_i, y_j, stats, self.scale, pairs, row, col, write)
            else:
                rows = scratch.once(("rows", i, m), lambda: row[:, i : i + m].unbind())
                first = strip.first + j
                cols = scratch.once(("columns", j, n), lambda: col[:, first : first + n].unbind())
                grad = self.grad_panel(raw, x_i, y_j, stats, self.scale, pairs, rows, cols, write, scratch)
            if on_diagonal:  # the first tile of its rows holds every pair both ways, G each from both
                if scratch is not None:
                    scratch.halve()
                else:
                    stats /= 2
            return grad

        overall = [self.matrix.gather_vectors(vectors, side) for side, vectors in enumerate(sides)]
        want_dy = want_dx if self.symmetric else want_dy
        write = want_dx or want_dy
        tiles = 0 if self.triton and not write else self.tiles
        gradients: list[Tensor] = []
        moments: list[Tensor] = []
        for strip in self.matrix.strips(want_dx or not want_dy, want_dy and not self.symmetric):
            own, scratch = strip.is_own, contrastive.scratch_of(self.backend, strip.y, self.workspace)
            stats, dx, dy = self._run(
                strip,
                functools.partial(panel, strip, scratch),
                tiles=tiles,
                stats_width=1,
                want_dx=(want_dx, want_dy)[0 if own else strip.side],
                want_dy=want_dy and own,
                dx=None if own else gradients[strip.side],
                add=not own,
            )
            if scratch is not None:
                scratch.reduce()
            gradients = [dx, dy] if own else gradients
            if strip.is_counted:  # a symmetric matrix has the same pairs on the other rank too, G from both ways
                moment = stats.sum()
                moments.append(moment / 2 if self.symmetric and not own else moment)
        dx, dy = gradients
        if self.triton:
            contrastive.divide((dx, dy), _gradient_scale(self.x.dtype))
        return dx, dy, sum(moments[1:], moments[0])

    def _run(self, strip: Strip, panel: Callable[..., Tensor | None], **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        if self.symmetric and strip.is_own:
            options |= {"symmetric": True, "seam": self.seam}
        return self.run(panel, strip.x, strip.y, **options)


class _Summary(NamedTuple):
    """What the statistics of rows and columns come to.

    A side [4, M], or [5, M] with label smoothing, has what the gradient needs to know of each row, or column: the
    largest similarity that counts and the logarithm of the sum of exponentials against it, whence the log-sum-exp is
    t top + log_sum; its weight in the loss, what is taken from every positive pair, and from every pair that counts.
    Weights are divided by the unit, the largest, so that G is of order 1 wherever it is stored in 16 bits.
    """

    loss: Tensor
    unpaired: Tensor
    scalars: Tensor  # of a Result; the derivative by scale is to come
    sides: list[Tensor]  # as the panel function for gradients takes them


def _summarise(a: Arguments, matrix: Matrix, stats: list[Tensor], want_sides: bool) -> _Summary:
    """Of what a rank adds to the loss, divided by what all ranks have."""
    dtype = _checks.accumulation_dtype(a.x.dtype)
    triton = a.backend == "triton"
    # The sums of several processes, and losses row by row, are rare beside the others: operations of torch make them.
    if triton and not a.group and a.reduction != "none":
        return _summarise_triton(a, stats, want_sides)
    if a.group or triton or stats[0].device.type != "cpu" or dtype != torch.float32:
        found = _summarise_eager(a, matrix, stats, dtype)
        return found._replace(sides=[_sides_for_triton(side) for side in found.sides]) if triton else found
    new = functools.partial(a.x.new_empty, dtype=dtype)
    planes = (5 if a.label_smoothing else 4) if want_sides else 0
    summary = _Summary(
        new(a.x.shape[0] if a.reduction == "none" else ()),
        new((), dtype=torch.int64),
        new(3),
        [new(planes, len(side)) for side in stats],
    )
    row_weight = None if a.row_weight is None else a.row_weight.contiguous()
    torch.ops.ssl_kernels.softmax_summary_(
        stats, a.scale.item(), a.label_smoothing, a.reduction == "mean", row_weight, *summary
    )
    return summary


def _summarise_triton(a: Arguments, stats: list[Tensor], want_sides: bool) -> _Summary:
    from ssl_kernels.kernels.softmax_summary import softmax_summary

    sizes = [len(side) for side in stats]
    both = stats[0].as_strided((sum(sizes), stats[0].shape[1]), stats[0].stride())  # as _Passes.statistics made it
    new = functools.partial(a.x.new_empty, dtype=torch.float32)
    vectors = new(4 if a.label_smoothing else 3, len(both)) if want_sides else None
    row_weight = None if a.row_weight is None else a.row_weight.contiguous()
    loss, unpaired, scalars = new(()), new((), dtype=torch.int64), new(3)
    softmax_summary(
        both, sizes[0], len(sizes), a.scale, a.label_smoothing, a.reduction == "mean", row_weight,
        loss, unpaired, scalars, vectors,
    )  # fmt: skip
    return _Summary(loss, unpaired, scalars, [] if vectors is None else list(vectors.split(sizes, dim=1)))


def _summarise_eager(a: Arguments, matrix: Matrix, stats: list[Tensor], dtype: torch.dtype) -> _Summary:
    scale = a.scale.to(stats[0].dtype)  # before it meets the smoothing: rounded to fp32, 1e-5 of a logit of 100 is lost
    share = 1 / len(stats)
    losses, weights, sides = [], [], []
    paired = matrix.sum(torch.stack([(side[:, 3] > 0).sum() for side in stats]))
    divisors = [count.clamp(min=1) if a.reduction == "mean" else torch.ones_like(count) for count in paired]
    for side, divisor in zip(stats, divisors, strict=True):
        gap = side[:, 0] - side[:, 2] / side[:, 3]
        if a.label_smoothing:
            smooth = side[:, 0] - side[:, 4] / side[:, 5]
            gap = (1 - a.label_smoothing) * gap + a.label_smoothing * smooth
        losses.append(share * (scale * gap + side[:, 1].log()).masked_fill(side[:, 3] == 0, 0))
        shared = (share / divisor.to(side.dtype)).expand(1)  # of every row, also where this rank has none
        weights.append(shared if a.row_weight is None else share * a.row_weight.to(side.dtype))
    unit = torch.stack([w.abs().amax() if len(w) else w.new_zeros(()) for w in weights]).amax()
    unit = torch.where(unit == 0, 1, unit)
    for side, given in zip(stats, weights, strict=True):
        weight = (given / unit).masked_fill(side[:, 3] == 0, 0)
        nothing = weight == 0  # so that no 0 meets an infinite exponential
        top, log_sum = side[:, 0].masked_fill(nothing, 0), side[:, 1].log().masked_fill(nothing, torch.inf)
        vectors = [top, log_sum, weight, (1 - a.label_smoothing) * weight / side[:, 3].clamp(min=1)]
        if a.label_smoothing:
            vectors.append(a.label_smoothing * weight / side[:, 5].clamp(min=1))
        sides.append(torch.stack(vectors).to(dtype))
    if a.reduction == "none":
        loss = sum(losses[1:], losses[0])
    else:
        loss = torch.stack([part.sum() / n for part, n in zip(losses, divisors, strict=True)]).sum()
    unpaired = torch.stack([matrix.count(side) - count for side, count in enumerate(paired)]).sum()
    scalars = torch.stack([0 * unit, 0 * unit, unit])
    return _Summary(loss if a.group else loss.to(dtype), unpaired, scalars.to(dtype), sides)


def _forward(a: Arguments) -> tuple[Tensor, ...]:
    """A :class:`ssl_kernels.ops.contrastive.Result`, and the number of rows and columns without a positive pair."""
    wanted = wanted_gradients(a)
    if any(wanted):
        fit_budget()
    with _checks.without_autocast(a.x):
        if contrastive.is_one_tile(a):
            x, y = a.x.to(torch.float32), None if a.y is None else a.y.to(torch.float32)
            one = x, y, a.scale.item(), *Pairs.of(a), a.seam, a.label_smoothing, a.reduction == "mean"
            outputs: tuple[Tensor, ...] = torch.ops.ssl_kernels.softmax_of_one_tile(*one, *wanted)
            return outputs
        matrix = Matrix(a, a.what, reduction=a.reduction, label_smoothing=a.label_smoothing)
        passes = _Passes(a, matrix)
        stats = passes.statistics(6 if a.label_smoothing else 4)
        loss, unpaired, scalars, sides = _summarise(a, matrix, stats, any(wanted))
        _, dx, dy, *_ = _fake(a._replace(needs_grad=[False] * 3))  # empty
        if any(wanted):
            dx, dy, scalars[0] = passes.gradients(sides, *wanted[:2])
        if a.group:
            loss, scalars = matrix.shared(loss, scalars.to(loss.dtype), dx.dtype)
    return loss, dx, dy, scalars, unpaired


def _fake(a: Arguments) -> tuple[Tensor, ...]:
    new = functools.partial(a.x.new_empty, dtype=_checks.accumulation_dtype(a.x.dtype))
    want_dx, want_dy, _ = wanted_gradients(a)
    rows, width = a.x.shape
    return (
        new(rows if a.reduction == "none" else ()),
        new(rows if want_dx else 0, width),
        gradient_of_columns(new, a.y.shape[0] if a.y is not None and want_dy else 0, width, a.x.device),
        new(3),
        new((), dtype=torch.int64),
    )


_op: Op[Arguments] = Op(
    "softmax_contrastive",
    Arguments,
    f"({contrastive.RESULT}, Tensor unpaired)",
    forward=_forward,
    fake=_fake,
    setup_context=contrastive.setup_context,
    backward=lambda ctx, *upstream: contrastive.backward(_op, ctx, *upstream),
)
