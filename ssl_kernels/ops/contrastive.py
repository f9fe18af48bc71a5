"""What the losses over a matrix of similarities share: which pairs are what, and the way from loss to gradients.

The forward pass makes sums over the tiles, which are the gradients but for two factors that wait for the upstream
gradient: a unit of all of them, and the scale in those of the features. For ``reduction="none"`` the weight of each row
is known only in the backward pass, which then visits the tiles again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.ops._op import Op, may_overwrite, owns_outputs
from ssl_kernels.ops.matmul import onednn_is_faster_for

NO_DIAGONAL = 2**62  # a diagonal that meets no tile
_ONE_TILE = 2**16  # similarities; where there are more, the way from panel to panel is a small part of the time


class Pairs(NamedTuple):
    """What the pairs of a tile are: ids of its rows and columns, and its diagonals, counted from its corner.

    (i, i + positive) is a positive pair, and so are pairs of equal ids, unless ``ignore_same_id`` leaves these out;
    (i, i + excluded) is left out whatever else it is.
    """

    row_ids: Tensor | None
    col_ids: Tensor | None
    ignore_same_id: bool
    positive: int
    excluded: int

    @classmethod
    def of(cls, a: Any) -> Pairs:
        """Of an op's arguments; without y the columns are the rows."""
        x_ids = None if a.x_ids is None else a.x_ids.contiguous()
        y_ids = x_ids if a.y is None else None if a.y_ids is None else a.y_ids.contiguous()
        return cls(x_ids, y_ids, a.ignore_same_id, a.positive, a.excluded)

    def part(self, row: int, rows: int, col: int, cols: int) -> Pairs:
        """Of so many rows from ``row`` on, and so many columns from ``col`` on."""
        row_ids = None if self.row_ids is None else self.row_ids[row : row + rows]
        col_ids = None if self.col_ids is None else self.col_ids[col : col + cols]
        shift = row - col
        return Pairs(row_ids, col_ids, self.ignore_same_id, self.positive + shift, self.excluded + shift)

    def transposed(self) -> Pairs:
        return Pairs(self.col_ids, self.row_ids, self.ignore_same_id, -self.positive, -self.excluded)

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


NO_PAIRS = Pairs(None, None, False, NO_DIAGONAL, NO_DIAGONAL)


class Result(NamedTuple):
    """Of the forward pass. Gradients that are not wanted are empty, or any number."""

    loss: Tensor
    dx: Tensor  # as dy but for the factor scale
    dy: Tensor
    scalars: Tensor  # [3]: the derivatives by scale and by bias, and the unit of all derivatives


RESULT = "Tensor loss, Tensor dx, Tensor dy, Tensor scalars"


def wanted_gradients(a: Any) -> Sequence[bool]:
    """Which of the gradients are made in the forward pass of an op with such arguments."""
    return a.needs_grad if a.reduction != "none" else [False] * len(a.needs_grad)


def is_one_tile(a: Any) -> bool:
    """Whether the similarities are so few that one call of C++ had better do all of a forward pass of such arguments as
    :func:`setup_context` takes."""
    if a.backend != "cpu" or a.group or a.row_weight is not None or a.reduction == "none":
        return False
    return fit_one_tile(a.x, a.x if a.y is None else a.y, a.workspace)


def fit_one_tile(x: Tensor, y: Tensor, workspace: int) -> bool:
    """The same of the similarities of x and y."""
    pairs = x.shape[0] * y.shape[0]
    return 0 < pairs <= min(_ONE_TILE, workspace // 4) and not onednn_is_faster_for(pairs * x.shape[1])


def scratch_of(backend: str, y: Tensor, workspace: int) -> Any:
    """What the launches of a pass over the columns y share, a :class:`ssl_kernels.kernels.scratch.Scratch`; or None
    where Triton does not run it."""
    if backend != "triton":
        return None
    from ssl_kernels.kernels.scratch import Scratch

    return Scratch(y.shape[0], workspace)


def divide(gradients: Sequence[Tensor], factor: float) -> None:
    """By the power of two that tiles carry, in place; by 1 costs nothing."""
    if factor != 1:
        for gradient in gradients:
            gradient /= factor


def weighted_sums(stats: Tensor, row_weight: Tensor | None, divisor: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of stats [M, 3], or [M, 1], times ``row_weight`` [M]: the sum of the first column over the divisor, which is the
    loss; and the sums of the others, with one over the divisor as the unit of derivatives."""
    loss, scalars = stats.new_empty((), dtype=dtype), stats.new_empty(3, dtype=dtype)
    if stats.device.type == "cpu" and dtype == torch.float32:
        weight = None if row_weight is None else row_weight.contiguous()
        torch.ops.ssl_kernels.weighted_sums_(stats, weight, divisor, loss, scalars)
        return loss, scalars
    sums = (stats if row_weight is None else stats * row_weight[:, None]).sum(0)
    loss.copy_(sums[0] / divisor)
    scalars.fill_(1 / max(divisor, 1))[: len(sums) - 1] = sums[1:]
    return loss, scalars


def setup_context(ctx: Any, arguments: Any, output: tuple[Tensor, ...]) -> None:
    """Of an op whose arguments start with x, y or None, scale and perhaps bias, and have row_weight and reduction, and
    whose output starts as a Result.

    Outputs after the Result are not differentiable. Its gradients stay so, that a second backward pass meets an error.
    """
    ctx.mark_non_differentiable(*output[4:])
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.fields, ctx.backend = arguments.x.dtype, arguments._fields, arguments.backend
    ctx.again = None
    if arguments.reduction == "none":
        tensors = {name: value for name, value in arguments._asdict().items() if isinstance(value, Tensor)}
        ctx.again, ctx.names = arguments._replace(**dict.fromkeys(tensors), reduction="sum"), list(tensors)
        ctx.save_for_backward(*tensors.values())
    else:
        ctx.save_for_backward(arguments.scale, *output[1:4])


def backward(op: Any, ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Of such an op."""
    if upstream is None:
        return (None,) * len(ctx.fields)
    if ctx.again is None:
        scale, dx, dy, scalars = ctx.saved_tensors
    else:
        tensors = dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        _, dx, dy, scalars, *_ = op(ctx.again._replace(**tensors | {"row_weight": upstream}))
        scale, upstream = tensors["scale"], None
    sums = Finish(upstream, scale, scalars, dx, dy, ctx.dtype)
    if ctx.backend == "triton":
        gradients = finish_with_triton(sums)
    else:
        gradients = finish_in_place(sums) if owns_outputs(ctx) else finish_gradients(sums)
    differentiable = 4 if ctx.fields[3] == "bias" else 3
    wanted = zip(gradients, ctx.needs_input_grad[:differentiable], strict=False)
    rest = (None,) * (len(ctx.fields) - differentiable)
    return (*(gradient if needed else None for gradient, needed in wanted), *rest)


class Finish(NamedTuple):
    """What is left of a Result, to be multiplied by the unit and the upstream gradient; dx and dy by the scale, too."""

    upstream: Tensor | None  # None is 1
    scale: Tensor
    scalars: Tensor
    dx: Tensor
    dy: Tensor
    dtype: torch.dtype  # of the gradients of x and y, to which they are cast last


def finish_in_place(a: Finish) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As finish_gradients, but what a backward pass has saved becomes the gradients where nobody can ask again."""
    if a.dx.device.type == "cpu" and a.dx.dtype == a.dtype == torch.float32 and may_overwrite(a.dx, a.upstream):
        return _finish(a, (a.dx.detach(), a.dy.detach()))
    gradients: tuple[Tensor, Tensor, Tensor, Tensor] = finish_gradients(a)
    return gradients


def _finish(a: Finish, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = (*(into or _empty_features(a)), torch.empty_like(a.scale), torch.empty_like(a.scale))
    if a.dx.device.type == "cpu" and a.dx.dtype == torch.float32:
        torch.ops.ssl_kernels.finish_gradients_(*a[:5], *gradients)
        return gradients
    dscale, dbias, unit = a.scalars
    shared = unit if a.upstream is None else a.upstream * unit
    dx, dy, *scalars = gradients
    torch.mul(a.dx, shared * a.scale, out=dx)
    torch.mul(a.dy, shared * a.scale, out=dy)
    for gradient, derivative in zip(scalars, (dscale, dbias), strict=True):
        torch.mul(derivative, shared, out=gradient)
    return gradients


def _finish_triton(a: Finish) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, with one launch for all that is a number."""
    from ssl_kernels.kernels.softmax_summary import finish_scalars

    dx, dy, by_scale, by_bias = gradients = _empty_gradients(a)
    factor = torch.empty_like(a.scale)
    finish_scalars(a.upstream, a.scale, a.scalars, factor, by_scale, by_bias)
    for made, gradient in ((a.dx, dx), (a.dy, dy)):
        if made.numel():
            torch.mul(made, factor, out=gradient)
    return gradients


def _empty_features(a: Finish) -> tuple[Tensor, Tensor]:
    return a.dx.new_empty(a.dx.shape, dtype=a.dtype), a.dy.new_empty(a.dy.shape, dtype=a.dtype)


def _empty_gradients(a: Finish) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *_empty_features(a), torch.empty_like(a.scale), torch.empty_like(a.scale)


def no_double_backward(ctx: Any, *grads: Tensor | None) -> None:
    raise RuntimeError(
        "ssl_kernels: the gradient of a fused loss cannot be differentiated again; "
        "for double backward run the loss inside `with ssl_kernels.use_backend('reference'):`"
    )


# Ops of their own, so that differentiating a gradient again meets an error instead of a wrong result.
finish_with_triton = Op(
    "finish_gradients_with_triton",
    Finish,
    "(Tensor, Tensor, Tensor, Tensor)",
    forward=_finish_triton,
    fake=_empty_gradients,
    backward=no_double_backward,
)
finish_gradients = Op(
    "finish_gradients",
    Finish,
    "(Tensor, Tensor, Tensor, Tensor)",
    forward=_finish,
    fake=_empty_gradients,
    backward=no_double_backward,
)
