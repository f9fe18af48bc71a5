"""The panel driver: every contrastive loss as a loop over tiles of the similarity matrix that stay in cache.

For panels X_i [m, D] of the rows and Y_j [n, D] of the columns, the loss's ``panel`` function turns X_i Y_j^T into
per-row statistics and a gradient tile G [m, n]; two matrix products then add G Y_j to the gradient of X_i and
G^T X_i to that of Y_j, in fp32. Nothing of size M x N ever exists: the peak is one tile beside O((M + N) D).

Cost per element of M x N: 2 D FLOP for the tile, 2 D for each of the two gradients that is wanted, and the epilogue.
Where Y is X, the tiles below the diagonal mirror those above it and are not visited: half the cost.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssl_kernels.ops.matmul import add_matmul, onednn_is_faster
from ssl_kernels.ops.panel_shape import panel_shape

# (X_i [m, D], Y_j [n, D], stats of the rows [m, k], first row, first column) -> G [m, n], if a gradient is wanted; or
# one G after the other, each with the features whose gradients it makes
Tiles = Iterator[tuple[slice, Tensor]]
PanelFunction = Callable[[Tensor, Tensor, Tensor, int, int], Tensor | Tiles | None]


def _cut(size: int, step: int, seam: int = 0) -> list[slice]:
    """Panels of at most ``step`` rows, of which none lies across the row ``seam``."""
    starts = [*range(0, seam, step), *range(seam, size, step)]
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, size])]


def gradient_of_columns(new: Callable[..., Tensor], cols: int, width: int, device: torch.device) -> Tensor:
    """[cols, width] by ``new`` of a shape. On a GPU it is transposed in memory; on a CPU it lies as y does, so that the
    tensor that autograd gets is the one that a parameter keeps."""
    return new(cols, width) if device.type == "cpu" else new(width, cols).t()


def run_panels(
    panel: PanelFunction,
    x: Tensor,
    y: Tensor,
    *,
    compute_dtype: torch.dtype,
    workspace: int,
    tiles: int,
    stats_width: int,
    want_dx: bool,
    want_dy: bool,
    row_weight: Tensor | None = None,
    dx: Tensor | None = None,
    dy: Tensor | None = None,
    add: bool = False,
    symmetric: bool = False,
    seam: int = 0,
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-row statistics [M, stats_width], and the gradients sum_j G Y [M, D] and sum_i G^T (w X) [N, D] in fp32
    (float64 for float64 features; empty where not wanted).

    Features go to the panels in ``compute_dtype``; ``tiles`` is how many tiles of it ``panel`` holds at a time, 0 if
    its kernel keeps them in registers.
    ``row_weight`` [M] weighs the rows in the gradient of y; what is by rows is left for the caller to weigh. A ``dx``
    that is given receives the gradient of x; ``panel`` may rescale its rows before a tile after the first is added.
    So does a ``dy`` that an earlier call returned. With ``add`` gradients are added to what these hold.

    With ``symmetric``, ``y`` is ``x``, and only tiles on and above the diagonal are visited. One above it stands for
    its mirror image too: G must hold the gradient through both. On the diagonal ``panel`` is given the same tensor
    twice. Both gradients are then in the first, and the second is empty. No panel lies across the row ``seam``.

    A ``shape`` is the rows and columns of a panel, which are chosen here without it.
    """
    rows, cols, width = x.shape[0], y.shape[0], x.shape[1]
    device = x.device
    accumulate_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    stats_dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    stats = (torch.zeros if stats_width else torch.empty)(rows, stats_width, dtype=stats_dtype, device=device)
    make = torch.zeros if rows == 0 or cols == 0 else torch.empty
    if dx is None:
        dx = make(rows if want_dx else 0, width, dtype=accumulate_dtype, device=device)
    turned = False
    if dy is None:
        turned = want_dy and min(rows, cols) > 0 and _turn(device, accumulate_dtype)
        new = functools.partial(make, dtype=accumulate_dtype, device=device)
        dy = new(width, cols).t() if turned else gradient_of_columns(new, cols if want_dy else 0, width, device)
    if rows == 0 or cols == 0:
        return stats, dx, dy

    bytes_per_element = tiles * compute_dtype.itemsize
    panel_rows, panel_cols = shape or panel_shape(rows, cols, width, bytes_per_element, device, workspace, symmetric)
    row_panels, col_panels = _cut(rows, panel_rows, seam), _cut(cols, panel_cols, seam)
    mirrored = symmetric and want_dy and len(row_panels) > 1  # there are tiles above the diagonal
    if mirrored:
        dy[col_panels[0]] = 0  # nothing lies above the first tile
    for a, row_panel in enumerate(row_panels):
        i = row_panel.start
        x_i = _part(x, row_panel).to(compute_dtype)
        weighted: Tensor | None = None
        first_col = a if symmetric else 0
        for b in range(first_col, len(col_panels)):
            col_panel = col_panels[b]
            y_j = x_i if symmetric and a == b else _part(y, col_panel).to(compute_dtype)
            made = panel(x_i, y_j, _part(stats, row_panel), i, col_panel.start)
            if made is None:
                continue
            for features, tile in _tiles(made):
                if want_dx:
                    out, factor = _features(_part(dx, row_panel), features), _features(y_j, features)
                    add_matmul(out, tile, factor, first=b == first_col and not add)
                if want_dy and not (symmetric and a == b):
                    if weighted is None:
                        weight = None if row_weight is None else row_weight[row_panel]
                        weighted = _weighted(x_i, weight, accumulate_dtype, turned)
                    out, factor = _features(_part(dy, col_panel), features), _features(weighted, features)
                    _add_transposed(out, tile, factor, turned, first=a == 0 and not add)
            del made, tile  # before the next one is made
    if mirrored:
        dx += dy
    if symmetric:
        dy = gradient_of_columns(dy.new_empty, 0, width, device)
    return stats, dx, _turned_back(dy) if turned and not symmetric else dy


_ALL = slice(None)


def _tiles(made: Tensor | Tiles) -> Tiles | list[tuple[slice, Tensor]]:
    return [(_ALL, made)] if isinstance(made, Tensor) else made


def _features(t: Tensor, features: slice) -> Tensor:
    return t if features is _ALL else t[:, features]


def _part(t: Tensor, panel: slice) -> Tensor:
    """Rows of a panel, without the cost of a slice where that is all of them."""
    return t if panel.stop - panel.start == t.size(0) else t[panel]


def _turn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the gradient of y is transposed in memory meanwhile: oneDNN copies G unless it reads it along its rows,
    as in [D, m] x [m, n]."""
    return device.type == "cpu" and dtype == torch.float32 and onednn_is_faster()


def _turned_back(dy: Tensor) -> Tensor:
    """A copy that is contiguous, by all threads."""
    none, one, scalar, back = dy.new_empty(0, dy.shape[1]), dy.new_ones(3), dy.new_empty(()), dy.new_empty(dy.shape)
    torch.ops.ssl_kernels.finish_gradients_(None, one[0], one, none, dy, none, back, scalar, scalar)
    return back


def _weighted(x: Tensor, row_weight: Tensor | None, weighted_dtype: torch.dtype, turned: bool) -> Tensor:
    """x times the weights of its rows: they must not meet 16-bit features before the product, which is then one of
    fp32."""
    weighted = x if row_weight is None else x.to(weighted_dtype) * row_weight[:, None]
    return weighted.t().contiguous().t() if turned else weighted


def _add_transposed(out: Tensor, tile: Tensor, factor: Tensor, turned: bool, *, first: bool) -> None:
    """tile^T factor, as add_matmul does; as a product of the transposes where that is how the result lies in memory."""
    if out.device.type == "cpu" and not turned:
        add_matmul(out, tile.t(), factor, first=first)
    else:
        add_matmul(out.t(), factor.t(), tile, first=first)
