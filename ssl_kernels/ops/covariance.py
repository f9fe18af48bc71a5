r"""Squares off the diagonal of a covariance matrix, summed, and the gradient: what VICReg and Barlow Twins share.

For a, b [n, D] and C = a^T b,

    S = sum_{j != k} C_jk^2,    (1/2) d S / d a_k = sum_{j != k} C_kj b_j,    (1/2) d S / d b_k = sum_{j != k} C_jk a_j

(a_k is a column). Where D is large C is the lesser way to them: since |a^T b|^2 = <a a^T, b b^T>,

    S = <a a^T, b b^T> - sum_j C_jj^2,    (1/2) d S / d a = b b^T a - b diag(C_jj)

takes products of 2 n^2 D FLOP in place of 2 n D^2. It is used where 2 n <= D. What it takes back is then small: C has a
rank of n at most, so that |C|^2 >= (sum_j C_jj)^2 / n, at least twice what is taken back if the C_jj are equal. At
worst, where few features hold all variance, the error is that of rounding the squares of these variances; on a CPU the
other way is taken then. There the diagonal is left out of the sum.

Either matrix exists in panels of rows only, that fit the workspace. A product with a panel is large enough to run at
the full rate of the machine; symmetry, which would spare a quarter of the FLOP where b is a, costs as much in small
tiles.

Over several ranks that hold the rows together no product is repeated: by features each rank multiplies its own rows,
and the panels of C are summed; by rows each rank makes its own rows of the n x n products, for which the rows of the
others travel. Sums down the columns are exchanged in double precision, and gradients never: these sums are all that a
rank takes for those of its own rows.

On a CPU what surrounds the products is C++: one call centres the views, another finishes their gradients. Elsewhere,
in float64, and over several ranks it is plain PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.distributed import Ranks
from ssl_kernels.ops import _checks
from ssl_kernels.ops.contrastive import NO_PAIRS, Finish, finish_gradients
from ssl_kernels.ops.dino import unit_stride
from ssl_kernels.ops.key_softmax import widen
from ssl_kernels.ops.matmul import add_matmul, matmul
from ssl_kernels.ops.strips import agree


class Squares(NamedTuple):
    total: Tensor | float  # S in double precision; not a number where reading it would wait for the device
    da: Tensor | None  # half of its gradient by a, where that is wanted
    db: Tensor | None


class Views:
    """Two views of a batch, whose rows this process holds alone or with other ranks.

    Args:
        a: the arguments of an op: za, zb, whether the gradient by either is wanted, and Across.
        facts: what all ranks must say alike, by name.
    """

    def __init__(self, a: Any, what: str, **facts: object) -> None:
        self.z: tuple[Tensor, Tensor] = (a.za, a.zb)
        self.counts, self.factor, self.strategy = [len(a.za)], 1, a.strategy
        self._ranks: Ranks | None = None
        if a.group:
            self._ranks = ranks = Ranks(a.group, what)
            self.factor = ranks.size if a.grad_reduce == "mean" else 1
            wanted = [name for name, want in (("za", a.want_a), ("zb", a.want_b)) if want]
            (self.counts,) = agree(ranks, [a.za], a, NO_PAIRS, **{"gradients wanted": wanted, **facts})
        self.rows = sum(self.counts)
        if self.rows < 2:
            raise ValueError(f"za: expected at least 2 rows over all ranks, which a variance needs, got {self.rows}")
        self._means = None if self._ranks is None else self._exact_means()
        self._sigmas: list[Tensor] | None = None
        self.own = [self._centered(view, z) for view, z in enumerate(self.z)]

    @property
    def are_shared(self) -> bool:
        return self._ranks is not None

    def _exact_means(self) -> Tensor:
        """[2, 2, D] of either view: what the accumulation dtype holds of the means, and what it does not."""
        exact = torch.stack(list(self.sums(*(z.sum(0, dtype=torch.float64) for z in self.z)))) / self.rows
        means = exact.to(_checks.accumulation_dtype(self.z[0].dtype))
        return torch.stack([means, (exact - means).to(means.dtype)], 1)

    def _centered(self, view: int, z: Tensor) -> Tensor:
        if self._means is None:
            return centered(z)
        mean, rest = self._means[view]
        return torch.sub(widen(z), mean).sub_(rest)

    def standardise(self, eps: float) -> list[Tensor]:
        """Bring the columns to variance 1, and return by what those of either view are divided."""
        squares = self.sums(*(torch.linalg.vecdot(c, c, dim=0) for c in self.own))
        self._sigmas = [torch.sqrt(s / self.rows + eps).to(c.dtype) for s, c in zip(squares, self.own, strict=True)]
        for c, sigma in zip(self.own, self._sigmas, strict=True):
            c.div_(sigma)
        return self._sigmas

    def sums(self, *values: Any) -> Sequence[Any]:
        """Of each over the ranks: a tensor in double precision where there are others."""
        if self._ranks is None:
            return values
        device = self.z[0].device
        wide_ones = [torch.as_tensor(value, dtype=torch.float64, device=device) for value in values]
        return self._ranks.sum(torch.stack(wide_ones)).unbind()

    def sum_panel(self, panel: Tensor) -> Tensor:
        return panel if self._ranks is None else self._ranks.sum_many(panel)

    def blocks(self, a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of a and b, either of which is one of ``own``: those of this rank, then those of each other."""
        if self._ranks is None:
            yield a, b
            return
        chosen = sorted({0 if t is self.own[0] else 1 for t in (a, b)})
        blocks = [self._ranks.blocks(self.z[view], self.counts, self.strategy, view) for view in chosen]
        for number, arrived in enumerate(zip(*blocks, strict=True)):
            if number == 0:
                yield a, b
                continue
            rows = [self._as_own(view, theirs) for view, (_, theirs) in zip(chosen, arrived, strict=True)]
            yield rows[0], rows[-1]

    def _as_own(self, view: int, z: Tensor) -> Tensor:
        c = self._centered(view, z)
        return c if self._sigmas is None else c.div_(self._sigmas[view])


def off_diagonal_squares(
    a: Tensor,
    b: Tensor,
    diagonal: Tensor,
    want_a: bool,
    want_b: bool,
    workspace: int,
    in_cpp: bool,
    views: Views | None = None,
) -> Squares:
    """S and its gradients. ``diagonal`` [D] holds C_jj.

    Where ``b`` is ``a``, so is its gradient, and what is returned for a is a quarter of that of S. With ``views``, of
    which a and b are the own rows, S is over all ranks.
    """
    rows, width = len(a) if views is None else views.rows, a.shape[1]
    if 2 * rows > width:
        return _by_features(a, b, want_a, want_b, workspace, in_cpp, views)
    total, da, db = _by_rows(a, b, want_a, want_b, workspace, in_cpp, views)
    taken_back = _inner_product(diagonal[None], diagonal[None], in_cpp)
    if a.device.type == "cpu" and 16 * taken_back > 15 * total:  # elsewhere this would wait for the device
        return _by_features(a, b, want_a, want_b, workspace, in_cpp, views)
    for gradient, other in ((da, b), (db, a)):
        if gradient is not None:
            gradient.addcmul_(other, diagonal, value=-1)
    return Squares(total - taken_back, da, db)


def _by_rows(
    a: Tensor, b: Tensor, want_a: bool, want_b: bool, workspace: int, in_cpp: bool, views: Views | None
) -> Squares:
    total: Tensor | float = 0.0
    da, db = (a.new_empty(a.shape) if want else None for want in (want_a, want_b))
    for number, (x, y) in enumerate([(a, b)] if views is None else views.blocks(a, b)):
        for panel in _panels(a.shape[0], x.shape[0], a, workspace):
            gram = matmul(a[panel], x.t())
            other = gram if b is a else matmul(b[panel], y.t())
            total += _inner_product(gram, other, in_cpp)
            if da is not None:
                add_matmul(da[panel], other, x, first=number == 0)
            if db is not None:
                add_matmul(db[panel], gram, y, first=number == 0)
    return Squares(total if views is None else views.sums(total)[0], da, db)


def _by_features(
    a: Tensor, b: Tensor, want_a: bool, want_b: bool, workspace: int, in_cpp: bool, views: Views | None
) -> Squares:
    width = a.shape[1]
    total: Tensor | float = 0.0
    da, db = (a.new_empty(a.shape) if want else None for want in (want_a, want_b))
    if views is not None and views.are_shared:
        workspace //= 2  # for what other ranks have of a panel
    for panel in _panels(width, width, a, workspace):
        some = a[:, panel].t()
        covariance = matmul(some, b)
        if views is not None:
            covariance = views.sum_panel(covariance)
        covariance[:, panel].fill_diagonal_(0)
        total += _inner_product(covariance, covariance, in_cpp)
        if da is not None:
            add_matmul(da[:, panel], b, covariance.t(), first=True)
        if db is not None:
            add_matmul(db, some.t(), covariance, first=panel.start == 0)
    return Squares(total, da, db)


def _panels(rows: int, cols: int, like: Tensor, workspace: int) -> list[slice]:
    """Cuts [rows, cols] so that two panels, and a product with one, fit the workspace."""
    step = max(1, workspace // (2 * like.element_size() * max(1, cols, like.shape[1])))
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]


def _inner_product(a: Tensor, b: Tensor, in_cpp: bool) -> Tensor | float:
    """The sum of a b, as the total of :class:`Squares`."""
    if in_cpp:
        product: float = torch.ops.ssl_kernels.inner_product(a, b)
        return product
    return wide(torch.linalg.vecdot(a, b)).sum()


def fused_views(za: Tensor, zb: Tensor, eps: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The views without the means of their columns, in fp32, and sums down the columns, [3, D], by C++.

    The sums are those of the squares of either view, and of their difference. With ``eps`` the views are brought to
    variance 1 as by batch normalisation; then the rows hold by what either was divided, and the products of both.
    """
    a, b = (z.new_empty(z.shape, dtype=torch.float32) for z in (za, zb))
    columns = a.new_empty(3, a.shape[1])
    torch.ops.ssl_kernels.center_views_(unit_stride(za), unit_stride(zb), eps, a, b, columns)
    return a, b, columns


def centered(z: Tensor) -> Tensor:
    """z without the mean of its columns, in the accumulation dtype.

    What rounding leaves of a mean that is large beside the deviations from it goes in a second step: all of a constant
    column, whose deviation Barlow Twins would otherwise blow up.
    """
    z = widen(z)
    z = z - z.mean(0)
    return z.sub_(z.mean(0))


def wide(t: Tensor) -> Tensor:
    return t if t.device.type == "mps" else t.double()  # MPS has no float64


def check_views(za: Tensor, zb: Tensor, group: str) -> None:
    """Two [n, D] matrices of one dtype and device, n at least 2, or over a group: there is no variance of one row."""
    _checks.check_features(za=za, zb=zb)
    if za.shape != zb.shape:
        raise ValueError(f"zb: expected {za.shape[0]} rows as za has, got {zb.shape[0]}")
    if za.shape[0] < 2 and not group:
        raise ValueError(f"za: expected at least 2 rows, which a variance needs, got {za.shape[0]}")
    if za.shape[1] < 1:
        raise ValueError("za: expected at least 1 feature, got 0")


class Result(NamedTuple):
    """Of the forward pass, in the accumulation dtype. Gradients that are not wanted are empty."""

    loss: Tensor
    da: Tensor
    db: Tensor


RESULT = "(Tensor loss, Tensor da, Tensor db)"


def result(loss: Tensor, da: Tensor | None, db: Tensor | None, width: int) -> Result:
    da, db = (loss.new_empty(0, width) if gradient is None else gradient for gradient in (da, db))
    return Result(loss, da, db)


def fake(a: Any) -> Result:
    """Of an op whose arguments have za, zb, and whether the gradient by either is wanted."""
    new = functools.partial(a.za.new_empty, dtype=_checks.accumulation_dtype(a.za.dtype))
    da, db = (new(z.shape[0] if want else 0, z.shape[1]) for z, want in ((a.za, a.want_a), (a.zb, a.want_b)))
    return Result(new(()), da, db)


def setup_context(ctx: Any, a: Any, output: Result) -> None:
    """Of an op whose arguments start with two views."""
    _, da, db = output
    ctx.dtype, ctx.others = a.za.dtype, [None] * (len(a) - 2)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(da, db)


def backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None, None, *ctx.others)
    da, db = ctx.saved_tensors
    ga, gb, *_ = finish_gradients(Finish(None, upstream, upstream.new_ones(3), da, db, ctx.dtype))
    needs_a, needs_b, *_ = ctx.needs_input_grad
    return (ga if needs_a else None, gb if needs_b else None, *ctx.others)
