r"""KoLeo: arguments, reference, backends, fake and autograd.

With unit rows u_i = x_i / max(|x_i|, eps) and the nearest other row n(i) = argmax_{j != i} u_i . u_j,

    L_i = -log(r_i + eps),   r_i = |d_i|,   d_i = u_i - u_n(i) + eps
    d L_i / d u_i = e_i = -d_i / (r_i (r_i + eps)),   d L_i / d u_n(i) = -e_i

The neighbour is a constant of the gradient, so that B x B similarities serve to find it and for nothing else: their
tiles are looked through, along rows and along columns, and thrown away. They are symmetric and only those on and above
the diagonal are multiplied, half a unit (2 B^2 D FLOP). The rest is O(B D). Products are those of fp32 whatever the
dtype of x, for neighbours that 16 bits cannot tell apart are many.

Over several ranks the neighbour is among the rows of all. Each rank searches those of its own rows, as the rows of the
others come by, and learns which neighbours the others found. Then they come by again, and it keeps the few that are
neighbours of its own rows or have one there: with these the gradient of its own rows is made where they are.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.distributed import Blocks, Group, Ranks, across
from ssl_kernels.ops import _checks
from ssl_kernels.ops._op import Op
from ssl_kernels.ops.contrastive import NO_PAIRS, Finish, finish_gradients, no_double_backward
from ssl_kernels.ops.dino import unit_stride
from ssl_kernels.ops.info_nce import reduce_rows
from ssl_kernels.ops.key_softmax import widen
from ssl_kernels.ops.matmul import matmul
from ssl_kernels.ops.panels import run_panels
from ssl_kernels.ops.strips import agree, gathered
from ssl_kernels.settings import choose_backend, workspace_bytes

KERNELS = ("cpu", "triton")


def koleo_loss(
    x: Tensor,
    *,
    eps: float = 1e-8,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    even_batches: bool = False,
) -> Tensor:
    r"""KoLeo: spreads the features of a batch by pushing each away from its nearest neighbour. Its memory is linear.

    .. math:: L_i = -\log(\lVert u_i - u_{n(i)} + \epsilon \rVert + \epsilon), \qquad
              u_i = \frac{x_i}{\max(\lVert x_i \rVert, \epsilon)}, \qquad n(i) = \arg\max_{j \ne i} u_i \cdot u_j

    If several rows have the largest product, the neighbour is the first of them. Its choice gets no gradient.

    Args:
        x: [B, D] features with at least 2 rows, in float32, bfloat16, float16 or float64 and with any strides. They are
            normalised here.
        eps: :math:`\epsilon > 0`; it is added to every component of the difference, as by
            :class:`torch.nn.PairwiseDistance`.
        reduction: "mean" or "sum" over the rows, or "none" for the loss of each, [B].
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group the loss is over the rows of this process alone. The
            neighbour may be a row of any process, and its gradient reaches that row. In a group any process may have
            fewer than 2 rows.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features). The loss of two equal rows is
        finite, about 15 for 1,024 features. Their gradient is finite too, but of the order of 1 / :math:`\epsilon`,
        which float16 cannot hold.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects. A
            single row has no neighbour.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    Autocast has no effect here: 16-bit features are compared as float32, whose products follow
    ``torch.get_float32_matmul_precision()``. Each pair of rows is multiplied once; if its rows are on two processes,
    both multiply it. No B x B matrix is stored: besides a few times [B, D] in float32, a tile of similarities takes at
    most ``SSL_KERNELS_WORKSPACE_MB`` megabytes.

    Source: Sablayrolles et al., Spreading Vectors for Similarity Search, 2018, arXiv:1806.03198; Oquab et al., DINOv2,
    2023, arXiv:2304.07193.

    >>> import torch, ssl_kernels.functional as K
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]], requires_grad=True)
    >>> loss = K.koleo_loss(x)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(x.grad.shape)
    (-0.3466, (3, 2))
    """
    _checks.check_features(x=x)
    _checks.check_eps(eps)
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    over = across(group, strategy, grad_reduce, even_batches, False, reduction)
    if not over.group:
        _check_rows(x.shape[0])
    backend = choose_backend(x.device, x.dtype, KERNELS)
    if backend == "reference":
        (x,), _, _ = gathered(over, (x,), (), what="koleo_loss", eps=eps, reduction=reduction)
        _check_rows(x.shape[0])
        return reference(x, eps, reduction)
    _checks.check_transforms(x)
    arguments = Arguments(x, eps, reduction, workspace_bytes(x.device), backend)
    if over.group:
        wanted = torch.is_grad_enabled() and x.requires_grad
        shared: Tensor = _op_across(ArgumentsAcross(*arguments, wanted, **over._asdict()))[0]
        return shared
    loss: Tensor = _op(arguments)[0]
    return loss


def _check_rows(rows: int) -> None:
    if rows < 2:
        raise ValueError(f"x: expected at least 2 rows, a row and its neighbour, got {rows}")


def reference(x: Tensor, eps: float, reduction: str) -> Tensor:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    with _checks.without_autocast(x):
        u = F.normalize(widen(x), dim=1, eps=eps)
        similarity = _searchable(u.detach())
        neighbor = (similarity @ similarity.t()).fill_diagonal_(-math.inf).argmax(1)
        return reduce_rows(-torch.log(F.pairwise_distance(u, u[neighbor], 2, eps) + eps), reduction)


def _searchable(u: Tensor) -> Tensor:
    """A row with NaN is left with a NaN loss of its own; as a neighbour it is a row of zeros to the others."""
    return u.nan_to_num(nan=0)


class Arguments(NamedTuple):
    x: Tensor
    eps: float
    reduction: str
    workspace: int
    backend: str


# The panel function of each backend takes rows u_i [m, D] and u_j [n, D], what was found so far for all rows, best [B]
# and neighbor [B] int64, and the first row of either panel. It brings best and neighbor of both panels up to date.
# Tiles are visited in rising order on either side, so that the first of equals is the one with the smallest index.


def _panel_eager(u_i: Tensor, u_j: Tensor, best: Tensor, neighbor: Tensor, first_row: int, first_col: int) -> None:
    tile = matmul(u_i, u_j.t())
    on_diagonal = first_row == first_col  # where the columns are the rows
    if on_diagonal:
        tile.fill_diagonal_(-math.inf)
    sides = [(1, first_row, first_col), (0, first_col, first_row)]
    for axis, first, first_other in sides[: 1 if on_diagonal else 2]:
        found, at = tile.max(axis)
        mine = slice(first, first + len(found))
        neighbor[mine] = torch.where(found > best[mine], at + first_other, neighbor[mine])
        best[mine] = torch.maximum(best[mine], found)


def _panel_cpu(u_i: Tensor, u_j: Tensor, best: Tensor, neighbor: Tensor, first_row: int, first_col: int) -> None:
    torch.ops.ssl_kernels.koleo_panel_(matmul(u_i, u_j.t()), best, neighbor, first_row, first_col)


def _panel_triton(u_i: Tensor, u_j: Tensor, best: Tensor, neighbor: Tensor, first_row: int, first_col: int) -> None:
    from ssl_kernels.kernels import koleo as kernels

    kernels.koleo_panel(u_i, u_j, best, neighbor, first_row, first_col)


_PANELS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int, int], None]] = {
    "eager": _panel_eager,
    "cpu": _panel_cpu,
    "triton": _panel_triton,
}


def nearest_neighbors(u: Tensor, workspace: int, backend: str) -> Tensor:
    """For each of at least two unit rows [B, D] the other one with the largest dot product, [B] int64."""
    return _search(u, u, workspace, backend)[1]


def _search(u: Tensor, v: Tensor, workspace: int, backend: str) -> tuple[Tensor, Tensor]:
    """For each row of u, and then of v, the largest dot product with a row of the other, and the first that has it.

    Where v is u, there are no rows after those of u, and a row is not compared with itself.
    """
    symmetric = v is u
    first = 0 if symmetric else u.shape[0]  # of v
    best = u.new_full((first + v.shape[0],), -math.inf)
    neighbor = torch.zeros(best.shape, dtype=torch.int64, device=u.device)
    panel_function = _PANELS[backend]

    def panel(u_i: Tensor, v_j: Tensor, _: Tensor, i: int, j: int) -> None:
        panel_function(u_i, v_j, best, neighbor, i, first + j)

    run_panels(
        panel, u, v, workspace=workspace, compute_dtype=u.dtype, tiles=0 if backend == "triton" else 1,
        stats_width=0, want_dx=False, want_dy=False, symmetric=symmetric,
    )  # fmt: skip
    return best, neighbor


def _forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss; and of each row what the gradient takes beside x: the neighbour, |x| and the distance."""
    with _checks.without_autocast(a.x):
        norm, u = _normalised(a)
        neighbor = nearest_neighbors(_as_searched(u, a), a.workspace, a.backend)
        loss, distance = _losses(a, norm, u, neighbor)
        return loss, neighbor, norm, distance


def _normalised(a: Arguments) -> tuple[Tensor, Tensor]:
    """|x| and the unit rows."""
    if a.backend == "cpu":
        norm = a.x.new_empty(a.x.shape[0], dtype=torch.float32)
        u = norm.new_empty(a.x.shape)
        torch.ops.ssl_kernels.koleo_unit_rows_(unit_stride(a.x), a.eps, norm, u)
        return norm, u
    norm = torch.linalg.vector_norm(widen(a.x), dim=1)
    return norm, _unit_rows(a.x, norm, a.eps)


def _as_searched(u: Tensor, a: Arguments) -> Tensor:
    return u if a.backend == "cpu" else _searchable(u)  # where C++ makes them they are


def _losses(a: Arguments, norm: Tensor, u: Tensor, neighbor: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the distances."""
    if a.backend == "cpu":
        distance, loss = norm.new_empty(norm.shape), norm.new_empty(norm.shape if a.reduction == "none" else ())
        mean = a.reduction == "mean"
        torch.ops.ssl_kernels.koleo_loss_(unit_stride(a.x), a.eps, norm, neighbor, mean, distance, loss)
        return loss, distance
    distance = torch.linalg.vector_norm(_differences(u, neighbor, a.eps), dim=1)
    return reduce_rows(-torch.log(distance + a.eps), a.reduction), distance


def _unit_rows(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    return widen(x) / norm.clamp_min(eps)[:, None]


def _differences(u: Tensor, neighbor: Tensor, eps: float) -> Tensor:
    d = u[neighbor]
    return torch.sub(u, d, out=d).add_(eps)


def _fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new = functools.partial(a.x.new_empty, dtype=_checks.accumulation_dtype(a.x.dtype))
    rows = a.x.shape[0]
    loss = new(rows if a.reduction == "none" else ())
    return loss, new(rows, dtype=torch.int64), new(rows), new(rows)


def _setup_context(ctx: Any, a: Arguments, output: tuple[Tensor, ...]) -> None:
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.eps, ctx.mean, ctx.backend = a.eps, a.reduction == "mean", a.backend
    ctx.save_for_backward(a.x, *rest)


def _backward(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * len(Arguments._fields)
    x, neighbor, norm, distance = ctx.saved_tensors
    found = gradient(Gradient(upstream, x, neighbor, norm, distance, ctx.eps, ctx.mean, ctx.backend))
    return found, None, None, None, None


class Gradient(NamedTuple):
    upstream: Tensor
    x: Tensor
    neighbor: Tensor
    norm: Tensor
    distance: Tensor
    eps: float
    mean: bool  # whether the loss is the mean of the rows
    backend: str


def _gradient(a: Gradient) -> Tensor:
    if a.backend == "cpu":
        found = _gradient_fake(a)
        torch.ops.ssl_kernels.koleo_gradient_(
            a.upstream, unit_stride(a.x), a.eps, a.norm, a.neighbor, a.distance, a.mean, found
        )
        return found
    upstream = a.upstream / len(a.x) if a.mean else a.upstream
    u = _unit_rows(a.x, a.norm, a.eps)
    pull = _differences(u, a.neighbor, a.eps)
    pull *= torch.where(a.distance > 0, upstream / (a.distance * (a.distance + a.eps)), 0 * upstream)[:, None]
    du = -pull
    _add_rows(du, a.neighbor, pull)
    with _checks.without_autocast(a.x):  # a backward pass inside autocast would round both factors
        radial = torch.linalg.vecdot(du, u)
    radial = torch.where(a.norm > a.eps, radial, 0)  # a row below eps is divided by a constant, not by its norm
    return du.addcmul_(u, radial[:, None], value=-1).div_(a.norm.clamp_min(a.eps)[:, None]).to(a.x.dtype)


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index] += rows, always in the same order: on a GPU index_add_ adds with atomics, index_put_ sorts first."""
    if out.device.type == "cpu":
        out.index_add_(0, index, rows)
    else:
        out.index_put_((index,), rows, accumulate=True)


def _gradient_fake(a: Gradient) -> Tensor:
    return a.x.new_empty(a.x.shape)


# ---- over several ranks


class ArgumentsAcross(NamedTuple):
    x: Tensor
    eps: float
    reduction: str
    workspace: int
    backend: str
    want_grad: bool
    group: str  # this and what follows is Across
    strategy: str
    grad_reduce: str
    even_batches: bool
    own_share: bool


def _forward_across(a: ArgumentsAcross) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient by the rows of this rank."""
    ranks, rows = Ranks(a.group, "koleo_loss"), len(a.x)
    facts = {"gradients wanted": a.want_grad, "eps": a.eps, "reduction": a.reduction}
    (counts,) = agree(ranks, [a.x], a, NO_PAIRS, **facts)
    _check_rows(sum(counts))
    own = Arguments(a.x, a.eps, "none", a.workspace, a.backend)
    with _checks.without_autocast(a.x):
        blocks = ranks.blocks(a.x, counts, a.strategy)
        neighbor = _nearest_of_all(own, blocks)
        x, neighbor = _with_those_met(a, blocks, neighbor)
        met = own._replace(x=widen(x))  # the gradient is in its dtype
        norm, u = _normalised(met)
        losses, distance = _losses(met, norm, u, neighbor)
        divisor = sum(counts) if a.reduction == "mean" else 1
        loss = ranks.sum(losses[:rows].sum(dtype=torch.float64)) / divisor
        dx = met.x[:0]
        if a.want_grad:
            unit = met.x.new_full((), (ranks.size if a.grad_reduce == "mean" else 1) / divisor)
            whole = _gradient(Gradient(unit, met.x, neighbor, norm, distance, a.eps, False, a.backend))
            dx = whole[:rows]
        return loss.to(met.x.dtype), dx.clone()


def _nearest_of_all(own: Arguments, blocks: Blocks) -> Tensor:
    """For each own row the place of its neighbour among the rows of all ranks, the first of equal ones."""
    u = _as_searched(_normalised(own)[1], own)
    best = u.new_full((len(u),), -math.inf)
    neighbor = torch.zeros(len(u), dtype=torch.int64, device=u.device)
    for number, (first, rows) in enumerate(blocks):
        if number == 0:
            found, place = _search(u, u, own.workspace, own.backend)
        else:
            theirs = own._replace(x=rows)
            v = _as_searched(_normalised(theirs)[1], theirs)
            found, place = (t[: len(u)] for t in _search(u, v, own.workspace, own.backend))
            first -= len(u)
        place = place + first
        nearer = (found > best) | ((found == best) & (place < neighbor) & (found > -math.inf))
        best, neighbor = torch.where(nearer, found, best), torch.where(nearer, place, neighbor)
    return neighbor


def _with_those_met(a: ArgumentsAcross, blocks: Blocks, neighbor: Tensor) -> tuple[Tensor, Tensor]:
    """The own rows, then the rows of others that are neighbours of these or, for a gradient, whose neighbours are among
    these; and where the neighbours are in this list. A row whose neighbour is not there stands for it itself."""
    ranks, counts = blocks.ranks, blocks.counts
    own = slice(blocks.start, blocks.start + len(blocks.rows))
    neighbors = ranks.gather_rows(neighbor, counts)
    pushes = (neighbors >= own.start) & (neighbors < own.stop) & a.want_grad
    met = pushes.index_fill(0, neighbor, True)
    met[own] = False
    parts = [(first, rows[met[first : first + len(rows)]]) for first, rows in blocks]
    others = met.nonzero().flatten()
    place = torch.zeros_like(neighbors)
    place[own] = torch.arange(len(a.x), device=place.device)
    place[others] = torch.arange(len(a.x), len(a.x) + len(others), device=place.device)
    x = torch.cat([a.x, *(rows for _, rows in sorted(parts[1:], key=lambda part: part[0]))])
    theirs = torch.where(pushes[others], neighbors[others], others)
    return x, place[torch.cat([neighbor, theirs])]


def _fake_across(a: ArgumentsAcross) -> tuple[Tensor, Tensor]:
    new = functools.partial(a.x.new_empty, dtype=_checks.accumulation_dtype(a.x.dtype))
    return new(()), new(len(a.x) if a.want_grad else 0, a.x.shape[1])


def _setup_context_across(ctx: Any, a: ArgumentsAcross, output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = a.x.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])


def _backward_across(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    rest = (None,) * (len(ArgumentsAcross._fields) - 1)
    if upstream is None:
        return None, *rest
    (dx,) = ctx.saved_tensors
    found, *_ = finish_gradients(Finish(None, upstream, upstream.new_ones(3), dx, dx[:0], ctx.dtype))
    return found, *rest


_op = Op(
    "koleo",
    Arguments,
    "(Tensor loss, Tensor neighbor, Tensor norm, Tensor distance)",
    forward=_forward,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
# An op of its own, so that differentiating a gradient again meets an error instead of a wrong result.
gradient = Op(
    "koleo_gradient",
    Gradient,
    "Tensor",
    forward=_gradient,
    fake=_gradient_fake,
    backward=no_double_backward,
)
_op_across = Op(
    "koleo_across",
    ArgumentsAcross,
    "(Tensor loss, Tensor dx)",
    forward=_forward_across,
    fake=_fake_across,
    setup_context=_setup_context_across,
    backward=_backward_across,
)
