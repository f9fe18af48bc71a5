r"""KoLeo: schema, reference, backends, fake and autograd.

With unit rows u_i = x_i / max(|x_i|, eps) and the nearest other row n(i) = argmax_{j != i} u_i . u_j,

    L_i = -log(r_i + eps),   r_i = |d_i|,   d_i = u_i - u_n(i) + eps
    d L_i / d u_i = e_i = -d_i / (r_i (r_i + eps)),   d L_i / d u_n(i) = -e_i

The neighbour is a constant of the gradient, so that B x B similarities serve to find it and for nothing else: their
tiles are looked through, along rows and along columns, and thrown away. They are symmetric and only those on and above
the diagonal are multiplied, half a unit (2 B^2 D FLOP). The rest is O(B D). Products are those of fp32 whatever the
dtype of x, for neighbours that 16 bits cannot tell apart are many.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.contrastive import no_double_backward
from ssl_kernels.ops.info_nce import reduce_rows
from ssl_kernels.ops.key_softmax import widen
from ssl_kernels.ops.matmul import matmul
from ssl_kernels.ops.panels import run_panels
from ssl_kernels.settings import choose_backend, workspace_bytes


def koleo_loss(x: Tensor, *, eps: float = 1e-8, reduction: str = "mean") -> Tensor:
    r"""KoLeo: spreads the features of a batch by the distance of each to its nearest neighbour; in linear memory.

    .. math:: L_i = -\log(\lVert u_i - u_{n(i)} + \epsilon \rVert + \epsilon), \qquad
              u_i = \frac{x_i}{\max(\lVert x_i \rVert, \epsilon)}, \qquad n(i) = \arg\max_{j \ne i} u_i \cdot u_j

    The neighbour is the first of those with the largest product, and a constant of the gradient.

    Args:
        x: [B, D] features, at least 2 rows, float32, bfloat16, float16 or float64, any strides. They are normalised
            here.
        eps: :math:`\epsilon > 0`; it is added to every component of the difference, as by
            :class:`torch.nn.PairwiseDistance`.
        reduction: "mean" or "sum" over the rows, or "none", [B].

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features). That of two equal rows is finite,
        about 15 for 1,024 features, and so is its gradient, of the order of 1 / :math:`\epsilon`, which float16
        features cannot hold.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected. A single row has no neighbour.
        RuntimeError: on double backward, which only the reference backend supports.

    Autocast has no effect here: 16-bit features are compared as float32, whose products follow
    ``torch.get_float32_matmul_precision()``. Each pair is multiplied once. Nothing of B x B elements is kept: beside a
    few times [B, D] in float32, a tile of similarities takes at most ``SSL_KERNELS_WORKSPACE_MB`` megabytes.

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
    if x.shape[0] < 2:
        raise ValueError(f"x: expected at least 2 rows, a row and its neighbour, got {x.shape[0]}")
    _checks.check_eps(eps)
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    backend = choose_backend(x.device.type, x.dtype)
    if backend == "reference":
        return reference(x, eps, reduction)
    _checks.check_transforms(x)
    loss, *_ = _koleo(x, eps, backend)
    return reduce_rows(loss, reduction)


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


# The panel function of each backend takes rows u_i [m, D] and u_j [n, D], what was found so far for all rows, best [B]
# and neighbor [B] int64, and the first row of either panel. It brings best and neighbor of both panels up to date.
# Tiles are visited in rising order on either side, so that the first of equals is the one with the smallest index.


def _panel_eager(u_i: Tensor, u_j: Tensor, best: Tensor, neighbor: Tensor, first_row: int, first_col: int) -> None:
    on_diagonal = first_row == first_col  # where the columns are the rows
    tile = _tile(u_i, u_j, on_diagonal)
    sides = [(1, first_row, first_col), (0, first_col, first_row)]
    for axis, first, first_other in sides[: 1 if on_diagonal else 2]:
        found, at = tile.max(axis)
        mine = slice(first, first + len(found))
        neighbor[mine] = torch.where(found > best[mine], at + first_other, neighbor[mine])
        best[mine] = torch.maximum(best[mine], found)


def _panel_cpu(u_i: Tensor, u_j: Tensor, best: Tensor, neighbor: Tensor, first_row: int, first_col: int) -> None:
    tile = _tile(u_i, u_j, first_row == first_col)
    torch.ops.ssl_kernels.koleo_panel_(tile, best, neighbor, first_row, first_col)


def _panel_triton(u_i: Tensor, u_j: Tensor, best: Tensor, neighbor: Tensor, first_row: int, first_col: int) -> None:
    from ssl_kernels.kernels import koleo as kernels

    kernels.koleo_panel(u_i, u_j, best, neighbor, first_row, first_col)


def _tile(u_i: Tensor, u_j: Tensor, on_diagonal: bool) -> Tensor:
    tile = matmul(u_i, u_j.t())
    if on_diagonal:
        tile.fill_diagonal_(-math.inf)
    return tile


_PANELS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int, int], None]] = {
    "eager": _panel_eager,
    "cpu": _panel_cpu,
    "triton": _panel_triton,
}


def nearest_neighbors(u: Tensor, backend: str) -> Tensor:
    """For each of at least two unit rows [B, D] the other one with the largest dot product, [B] int64."""
    best = u.new_full((u.shape[0],), -math.inf)
    neighbor = torch.zeros(u.shape[0], dtype=torch.int64, device=u.device)
    panel_function = _PANELS[backend]

    def panel(u_i: Tensor, u_j: Tensor, _: Tensor, i: int, j: int) -> None:
        panel_function(u_i, u_j, best, neighbor, i, j)

    searchable = _searchable(u)
    run_panels(
        panel, searchable, searchable, workspace=workspace_bytes(), compute_dtype=u.dtype,
        tiles=0 if backend == "triton" else 1, tile_scale=1.0, stats_width=0, want_dx=False, want_dy=False,
        symmetric=True,
    )  # fmt: skip
    return neighbor


def _unit_rows(x: Tensor, norm: Tensor) -> Tensor:
    return widen(x) / norm[:, None]


def _differences(u: Tensor, neighbor: Tensor, eps: float) -> Tensor:
    d = u[neighbor]
    return torch.sub(u, d, out=d).add_(eps)


@torch.library.custom_op(
    "ssl_kernels::koleo",
    mutates_args=(),
    schema="(Tensor x, float eps, str backend) -> (Tensor loss, Tensor neighbor, Tensor norm, Tensor distance)",
)
def _koleo(x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss of each row, and what its gradient takes beside x: [B] each."""
    with _checks.without_autocast(x):
        norm = torch.linalg.vector_norm(widen(x), dim=1).clamp_min_(eps)
        u = _unit_rows(x, norm)
        neighbor = nearest_neighbors(u, backend)
        distance = torch.linalg.vector_norm(_differences(u, neighbor, eps), dim=1)
        return -torch.log(distance + eps), neighbor, norm, distance


@_koleo.register_fake
def _(x: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = widen(x).new_empty(x.shape[0])
    return rows, torch.empty_like(rows, dtype=torch.int64), torch.empty_like(rows), torch.empty_like(rows)


@torch.library.custom_op(
    "ssl_kernels::koleo_gradient",
    mutates_args=(),
    schema="(Tensor upstream, Tensor x, Tensor neighbor, Tensor norm, Tensor distance, float eps) -> Tensor",
)
def koleo_gradient(upstream: Tensor, x: Tensor, neighbor: Tensor, norm: Tensor, distance: Tensor, eps: float) -> Tensor:
    """Gradient of x, given those of the losses of its rows.

    An op of its own, so that differentiating a gradient again meets an error instead of a wrong result.
    """
    u = _unit_rows(x, norm)
    pull = _differences(u, neighbor, eps)
    pull *= torch.where(distance > 0, upstream / (distance * (distance + eps)), 0 * upstream)[:, None]
    du = -pull
    _add_rows(du, neighbor, pull)
    with _checks.without_autocast(x):  # a backward pass inside autocast would round both factors
        radial = torch.linalg.vecdot(du, u)
    radial = torch.where(norm > eps, radial, 0)  # a row below eps is divided by a constant, not by its norm
    return du.addcmul_(u, radial[:, None], value=-1).div_(norm[:, None]).to(x.dtype)


def _add_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """out[index] += rows, always in the same order: on a GPU index_add_ adds with atomics, index_put_ sorts first."""
    if out.device.type == "cpu":
        out.index_add_(0, index, rows)
    else:
        out.index_put_((index,), rows, accumulate=True)


@koleo_gradient.register_fake
def _(upstream: Tensor, x: Tensor, neighbor: Tensor, norm: Tensor, distance: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


koleo_gradient.register_autograd(no_double_backward)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, ctx.eps, _ = inputs
    _, *rest = output
    ctx.mark_non_differentiable(*rest)
    ctx.save_for_backward(x, *rest)


def _backward(ctx: Any, upstream: Tensor, *_: Tensor | None) -> tuple[Tensor, None, None]:
    return koleo_gradient(upstream, *ctx.saved_tensors, ctx.eps), None, None


_koleo.register_autograd(_backward, setup_context=_setup_context)
