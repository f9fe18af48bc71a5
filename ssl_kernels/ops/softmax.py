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
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops._triton import triton_kernels
from ssl_kernels.ops.gradients import finish_gradients
from ssl_kernels.ops.matmul import matmul
from ssl_kernels.ops.panels import run_panels
from ssl_kernels.ops.reuse import HeldTiles
from ssl_kernels.settings import tile_budget_bytes, workspace_bytes

NO_DIAGONAL = 2**62  # a diagonal that meets no tile


def softmax_contrastive(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    *,
    ignore_same_id: bool = False,
    positive: int = NO_DIAGONAL,
    excluded: int = NO_DIAGONAL,
    seam: int = 0,
    label_smoothing: float = 0.0,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss, and how many rows and columns have no positive pair.

    (i, i + positive) is a positive pair, and so are pairs of equal ids, unless ``ignore_same_id`` leaves these out;
    (i, i + excluded) is left out whatever else it is. Without ``y`` the rows of x meet each other, in panels of which
    none lies across the row ``seam``: a positive diagonal must not lie below the main one, nor within such a panel.
    """
    _checks.check_transforms(x, scale, *(() if y is None else (y,)))
    grad = torch.is_grad_enabled()
    needs_grad = [grad and t is not None and t.requires_grad for t in (x, y, scale)]
    keep_bytes = tile_budget_bytes() if any(needs_grad) and reduction != "none" else 0
    outputs = _softmax_contrastive(
        x, y, scale, x_ids, y_ids, None, ignore_same_id, positive, excluded, seam, label_smoothing, reduction,
        needs_grad, workspace_bytes(), keep_bytes, backend,
    )  # fmt: skip
    return outputs[0], outputs[1]


class Pairs(NamedTuple):
    """What the pairs of one tile are: ids of its rows and columns, and its diagonals, counted from its corner."""

    row_ids: Tensor | None
    col_ids: Tensor | None
    ignore_same_id: bool
    positive: int
    excluded: int

    def masks(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Which pairs are positive, and which are left out."""
        row, col = (torch.arange(size, device=device) for size in shape)
        diagonal = col[None, :] - row[:, None]
        positive, ignored = diagonal == self.positive, diagonal == self.excluded
        if self.row_ids is not None and self.col_ids is not None:
            same = self.row_ids[:, None] == self.col_ids[None, :]
            if self.ignore_same_id:
                ignored = ignored | (same & ~positive)
            else:
                positive = positive | same
        return positive & ~ignored, ignored


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


class Side(NamedTuple):
    """What the gradient needs to know of every row, or every column."""

    top: Tensor  # the log-sum-exp is t top + log_sum
    log_sum: Tensor
    weight: Tensor
    target: Tensor  # taken from every positive pair
    uniform: Tensor | None  # taken from every pair that counts

    def part(self, panel: slice) -> Side:
        return Side(*(None if t is None else t[panel] for t in self))  # type: ignore[arg-type]


# Per backend, the two panel functions. Statistics [m, 4] or [m, 6] float64 of rows, and of columns or None, are
# updated: max x_i . y_j, sum of exp(t (x_i . y_j - max)), sum of x_i . y_j over positives, their number; and with label
# smoothing the sum over all pairs that count, and their number. The raw tile is returned where there is one. Gradients:
# G [m, n] if ``write``, and its row sums of G (x_i . y_j) are added to stats [m, 1].


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
    positive, ignored = pairs.masks(raw.shape, raw.device)
    counted = raw.masked_fill(ignored, -torch.inf)
    for stats, dim in ((rows, 1), (cols, 0)):
        if stats is None:
            continue
        best = counted.amax(dim)
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
    return raw


def _rescaled(sums: Tensor, top: Tensor, new_top: Tensor, scale: Tensor) -> Tensor:
    """Sums of exponentials against ``top`` as sums against ``new_top``."""
    return sums * torch.where(top == new_top, 1, torch.where(top == -torch.inf, 0, (scale * (top - new_top)).exp()))


def _grad_eager(
    raw: Tensor | None, x: Tensor, y: Tensor, stats: Tensor, scale: Tensor, pairs: Pairs, row: Side, col: Side,
    write: bool,
) -> Tensor | None:  # fmt: skip
    raw = _similarities(x, y) if raw is None else raw
    positive, ignored = pairs.masks(raw.shape, raw.device)
    grad = row.weight[:, None] * (scale * (raw - row.top[:, None]) - row.log_sum[:, None]).exp()
    grad += col.weight * (scale * (raw - col.top) - col.log_sum).exp()
    grad -= torch.where(positive, row.target[:, None] + col.target, 0)
    if row.uniform is not None and col.uniform is not None:
        grad -= row.uniform[:, None] + col.uniform
    grad = grad.masked_fill(ignored, 0)
    stats[:, 0] += (grad * raw.masked_fill(ignored, 0)).sum(1)
    return grad if write else None


def _stats_cpu(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor | None, scale: Tensor, pairs: Pairs) -> Tensor:
    raw = _similarities(x, y)
    torch.ops.ssl_kernels.softmax_stats_(raw, rows, cols, scale.item(), *pairs)
    return raw


def _grad_cpu(
    raw: Tensor | None, x: Tensor, y: Tensor, stats: Tensor, scale: Tensor, pairs: Pairs, row: Side, col: Side,
    write: bool,
) -> Tensor | None:  # fmt: skip
    tile = _similarities(x, y) if raw is None else raw
    interleaved = (part for both in zip(row, col, strict=True) for part in both)
    torch.ops.ssl_kernels.softmax_grad_(tile, stats, scale.item(), *pairs, *interleaved, write)
    return tile if write else None


def _stats_triton(x: Tensor, y: Tensor, rows: Tensor, cols: Tensor | None, scale: Tensor, pairs: Pairs) -> None:
    triton_kernels("softmax").softmax_stats(x, y, rows, cols, scale, *pairs)


def _grad_triton(
    raw: Tensor | None, x: Tensor, y: Tensor, stats: Tensor, scale: Tensor, pairs: Pairs, row: Side, col: Side,
    write: bool,
) -> Tensor | None:  # fmt: skip
    m, n = x.shape[0], y.shape[0]
    grad = x.new_empty(m, -(-n // 16) * 16)[:, :n] if write else None  # aligned rows, for wide stores
    interleaved = (part for both in zip(row, col, strict=True) for part in both)
    triton_kernels("softmax").softmax_grad(x, y, grad, stats, scale, *pairs, *interleaved)
    return grad


_PANELS: dict[str, tuple[Any, Any]] = {
    "eager": (_stats_eager, _grad_eager),
    "cpu": (_stats_cpu, _grad_cpu),
    "triton": (_stats_triton, _grad_triton),
}
_TILES = {"eager": 8, "cpu": 1, "triton": 1}  # tiles that each holds at a time


# Tiles that were kept, held until the next call makes as many: malloc then serves it from memory that is mapped. Fresh
# memory is paid for in page faults, for 64 MB as much time as the product that they save at D = 128.
_warm = HeldTiles()


class _Passes:
    """The two passes over the tiles of x and y, or of x and itself."""

    def __init__(
        self, x: Tensor, y: Tensor | None, scale: Tensor, x_ids: Tensor | None, y_ids: Tensor | None,
        ignore_same_id: bool, positive: int, excluded: int, seam: int, workspace: int, keep_bytes: int, backend: str,
    ) -> None:  # fmt: skip
        self.x, self.y, self.scale, self.symmetric = x, x if y is None else y, scale, y is None
        self.x_ids = None if x_ids is None else x_ids.contiguous()
        self.y_ids = self.x_ids if y is None else None if y_ids is None else y_ids.contiguous()
        self.ignore_same_id, self.positive, self.excluded = ignore_same_id, positive, excluded
        self.backend = backend
        self.stats_panel, self.grad_panel = _PANELS[backend]
        self.keep_bytes = self.hold_bytes = keep_bytes
        self.kept: dict[tuple[int, int], Tensor] = {}  # raw tiles, by their corners
        self.tile_scale = triton_kernels("softmax").gradient_scale(x.dtype) if backend == "triton" else 1.0
        self.run = functools.partial(
            run_panels,
            x=x,
            y=self.y,
            workspace=workspace,
            compute_dtype=x.dtype if backend == "triton" else _checks.accumulation_dtype(x.dtype),
            symmetric=self.symmetric,
            seam=seam,
        )

    def pairs(self, rows: slice, cols: slice) -> Pairs:
        shift = rows.start - cols.start
        row_ids = None if self.x_ids is None else self.x_ids[rows]
        col_ids = None if self.y_ids is None else self.y_ids[cols]
        return Pairs(row_ids, col_ids, self.ignore_same_id, self.positive + shift, self.excluded + shift)

    def statistics(self, width: int) -> list[Tensor]:
        """Of the rows and of the columns; one for both if the matrix is symmetric."""
        dtype = torch.float32 if self.x.device.type == "mps" else torch.float64  # MPS has no float64
        sizes = [len(self.x)] if self.symmetric else [len(self.x), len(self.y)]
        sides = [torch.zeros(size, width, dtype=dtype, device=self.x.device) for size in sizes]
        for stats in sides:
            stats[:, 0] = -torch.inf

        def panel(x_i: Tensor, y_j: Tensor, _: Tensor, i: int, j: int) -> None:
            rows, cols = slice(i, i + len(x_i)), slice(j, j + len(y_j))
            col_stats = None if self.symmetric and i == j else sides[-1][cols]  # on the diagonal columns are rows
            if self.keep_bytes:
                _warm.free_one()
            raw = self.stats_panel(x_i, y_j, sides[0][rows], col_stats, self.scale, self.pairs(rows, cols))
            if raw is not None and raw.nbytes <= self.keep_bytes:
                self.keep_bytes -= raw.nbytes
                self.kept[i, j] = raw

        tiles = 0 if self.backend == "triton" else _TILES[self.backend]
        self.run(panel, tiles=tiles, tile_scale=1.0, stats_width=0, want_dx=False, want_dy=False)
        return sides

    def gradients(self, row: Side, col: Side, want_dx: bool, want_dy: bool) -> tuple[Tensor, Tensor, Tensor]:
        """sum_j G y, sum_i G x and sum_ij G (x_i . y_j)."""

        def panel(x_i: Tensor, y_j: Tensor, stats: Tensor, i: int, j: int) -> Tensor | None:
            rows, cols = slice(i, i + len(x_i)), slice(j, j + len(y_j))
            twice = self.symmetric and i == j  # a tile on the diagonal holds every pair both ways, G each from both
            moment = torch.zeros_like(stats) if twice else stats
            raw, pairs = self.kept.pop((i, j), None), self.pairs(rows, cols)
            if raw is not None and raw.device.type == "cpu":
                _warm.hold(raw, self.hold_bytes)
            write = want_dx or want_dy
            grad = self.grad_panel(raw, x_i, y_j, moment, self.scale, pairs, row.part(rows), col.part(cols), write)
            if twice:
                stats += moment / 2
            return grad

        want_dy = want_dx if self.symmetric else want_dy
        tiles = 0 if self.backend == "triton" and not (want_dx or want_dy) else _TILES[self.backend]
        stats, dx, dy = self.run(
            panel, tiles=tiles, tile_scale=self.tile_scale, stats_width=1, want_dx=want_dx, want_dy=want_dy
        )
        return dx, dy, stats.sum()


def _losses(stats: Tensor, scale: Tensor, label_smoothing: float) -> Tensor:
    """The loss of each row (or column); 0 for one without a positive pair."""
    scale = scale.to(stats.dtype)  # before it meets the smoothing: rounded to fp32, 1e-5 of a logit of 100 is lost
    gap = stats[:, 0] - stats[:, 2] / stats[:, 3]
    if label_smoothing:
        gap = (1 - label_smoothing) * gap + label_smoothing * (stats[:, 0] - stats[:, 4] / stats[:, 5])
    return (scale * gap + stats[:, 1].log()).masked_fill(stats[:, 3] == 0, 0)


def _side(stats: Tensor, weight: Tensor, label_smoothing: float, dtype: torch.dtype) -> Side:
    weight = weight.masked_fill(stats[:, 3] == 0, 0)
    # So that no 0 meets an infinite exponential.
    top, log_sum = stats[:, 0].masked_fill(weight == 0, 0), stats[:, 1].log().masked_fill(weight == 0, torch.inf)
    target = (1 - label_smoothing) * weight / stats[:, 3].clamp(min=1)
    uniform = (label_smoothing * weight / stats[:, 5].clamp(min=1)).to(dtype) if label_smoothing else None
    return Side(top.to(dtype), log_sum.to(dtype), weight.to(dtype), target.to(dtype), uniform)


@torch.library.custom_op(
    "ssl_kernels::softmax_contrastive",
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor? y, Tensor scale, Tensor? x_ids, Tensor? y_ids, Tensor? row_weight, bool ignore_same_id, "
        "SymInt positive, SymInt excluded, SymInt seam, float label_smoothing, str reduction, bool[] needs_grad, "
        "int workspace, int keep_bytes, str backend) "
        "-> (Tensor loss, Tensor unpaired, Tensor dx, Tensor dy, Tensor dscale, Tensor unit)"
    ),
)
def _softmax_contrastive(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    row_weight: Tensor | None,
    ignore_same_id: bool,
    positive: int,
    excluded: int,
    seam: int,
    label_smoothing: float,
    reduction: str,
    needs_grad: Sequence[bool],
    workspace: int,
    keep_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, the number of rows and columns without a positive pair, and the derivatives by x, y and scale but for
    two factors that wait for the upstream gradient: ``unit``, and in dx and dy ``scale``.

    Weights are divided by ``unit``, the largest, so that G is of order 1 wherever it is stored in 16 bits.
    ``row_weight`` [M] replaces the weight that the reduction gives to a row, and to the column paired with it.
    """
    needs_grad = needs_grad if reduction != "none" else [False] * 3
    dtype = _checks.accumulation_dtype(x.dtype)
    with _checks.without_autocast(x):
        passes = _Passes(
            x, y, scale, x_ids, y_ids, ignore_same_id, positive, excluded, seam, workspace, keep_bytes, backend
        )
        sides = passes.statistics(6 if label_smoothing else 4)
        share = 1 / len(sides)
        losses = [share * _losses(stats, scale, label_smoothing) for stats in sides]
        paired = [(stats[:, 3] > 0).sum() for stats in sides]
        divisors = [count.clamp(min=1) if reduction == "mean" else torch.ones_like(count) for count in paired]
        if reduction == "none":
            loss = sum(losses[1:], losses[0])
        else:
            loss = torch.stack([part.sum() / n for part, n in zip(losses, divisors, strict=True)]).sum()
        unpaired = torch.stack([len(stats) - count for stats, count in zip(sides, paired, strict=True)]).sum()

        empty = [loss.new_empty(0, dtype=dtype) for _ in range(4)]
        dx, dy, dscale, unit = empty[0].view(0, x.shape[1]), empty[1].view(x.shape[1], 0).t(), empty[2], empty[3]
        if any(needs_grad):
            _warm.free_down_to(keep_bytes)
            if row_weight is None:
                weights = [(share / n.to(loss)).expand(len(stats)) for stats, n in zip(sides, divisors, strict=True)]
            else:
                weights = [share * row_weight.to(loss.dtype)] * len(sides)
            largest = torch.stack([w.abs().amax() if len(w) else loss.new_zeros(()) for w in weights]).amax()
            largest = torch.where(largest == 0, 1, largest)
            row, *rest = (
                _side(stats, w / largest, label_smoothing, dtype) for stats, w in zip(sides, weights, strict=True)
            )
            dx, dy, moment = passes.gradients(row, rest[0] if rest else row, needs_grad[0], needs_grad[1])
            unit = largest.to(dtype)
            dscale = moment.to(dtype) if needs_grad[2] else dscale
    return loss.to(dtype), unpaired, dx, dy, dscale, unit


@_softmax_contrastive.register_fake
def _(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    x_ids: Tensor | None,
    y_ids: Tensor | None,
    row_weight: Tensor | None,
    ignore_same_id: bool,
    positive: int,
    excluded: int,
    seam: int,
    label_smoothing: float,
    reduction: str,
    needs_grad: Sequence[bool],
    workspace: int,
    keep_bytes: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_grad = needs_grad if reduction != "none" else [False] * 3
    new = functools.partial(x.new_empty, dtype=_checks.accumulation_dtype(x.dtype))
    return (
        new(x.shape[0] if reduction == "none" else ()),
        x.new_empty((), dtype=torch.int64),
        new(x.shape[0] if needs_grad[0] else 0, x.shape[1]),
        new(x.shape[1], y.shape[0] if y is not None and needs_grad[1] else 0).t(),
        new(() if needs_grad[2] else 0),
        new(() if any(needs_grad) else 0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, scale, x_ids, y_ids, _, *options = inputs
    _, unpaired, *gradients = output
    ctx.mark_non_differentiable(unpaired)
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.options = x.dtype, options
    if ctx.options[5] == "none":
        ctx.save_for_backward(x, y, scale, x_ids, y_ids)
    else:
        ctx.save_for_backward(scale, *gradients)


def _backward(ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    *masks, reduction, needs_grad, workspace, keep_bytes, backend = ctx.options
    rest = (None,) * 13
    if grad_loss is None:
        return (None,) * 3 + rest
    if reduction == "none":
        x, y, scale, x_ids, y_ids = ctx.saved_tensors
        _, _, dx, dy, dscale, factor = _softmax_contrastive(
            x, y, scale, x_ids, y_ids, grad_loss, *masks, "sum", needs_grad, workspace, keep_bytes,
            backend,
        )  # fmt: skip
    else:
        scale, dx, dy, dscale, unit = ctx.saved_tensors
        factor = grad_loss * unit
    *gradients, _ = finish_gradients(factor, scale, dx, dy, dscale, dscale.new_empty(0), ctx.dtype)
    return (*(g if needed else None for g, needed in zip(gradients, needs_grad, strict=True)), *rest)


_softmax_contrastive.register_autograd(_backward, setup_context=_setup_context)
