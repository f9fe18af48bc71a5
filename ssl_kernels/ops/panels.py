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

from ssl_kernels.ops.matmul import add_matmul, onednn_is_faster, takes_16_bits
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
    # What no tile is to make anew. Factors are converted once, too, where that takes no more than a panel may.
    factor_dtype = compute_dtype if takes_16_bits(device, accumulate_dtype) else accumulate_dtype
    y_parts = _Parts(y, col_panels, compute_dtype, workspace)
    y_factors = y_parts
    if want_dx and factor_dtype != compute_dtype:
        y_factors = _Parts(y_parts.whole, col_panels, factor_dtype, workspace)
    across = turned or device.type != "cpu"  # dy lies in memory as [D, N], and is multiplied so
    dy_parts = [_part(dy, col_panel) for col_panel in col_panels] if want_dy else []
    if across:
        dy_parts = [part.t() for part in dy_parts]
    for a, row_panel in enumerate(row_panels):
        i = row_panel.start
        x_i, stats_i = _part(x, row_panel).to(compute_dtype), _part(stats, row_panel)
        dx_i = _part(dx, row_panel) if want_dx else dx
        x_factor: Tensor | None = None
        first_col = a if symmetric else 0
        for b in range(first_col, len(col_panels)):
            on_diagonal = symmetric and a == b
            y_j = x_i if on_diagonal else y_parts[b]
            made = panel(x_i, y_j, stats_i, i, col_panels[b].start)
            if made is None:
                continue
            for features, tile in _tiles(made):
                if want_dx:
                    factor = _features(y_j if y_j.dtype == factor_dtype else y_factors[b], features)
                    tile = _as(tile, factor_dtype)
                    add_matmul(_features(dx_i, features), tile, factor, first=b == first_col and not add)
                if want_dy and not on_diagonal:
                    if x_factor is None:
                        weight = None if row_weight is None else row_weight[row_panel]
                        x_factor = _weighted(x_i, weight, accumulate_dtype, factor_dtype, across)
                    tile, is_first = _as(tile, x_factor.dtype), a == 0 and not add
                    if across:
                        whole = features is _ALL
                        out, factor = (dy_parts[b], x_factor) if whole else (dy_parts[b][features], x_factor[features])
                        add_matmul(out, factor, tile, first=is_first)
                    else:
                        out, factor = _features(dy_parts[b], features), _features(x_factor, features)
                        add_matmul(out, tile.t(), factor, first=is_first)
            del made, tile  # before the next one is made
    if mirrored:
        dx += dy
    if symmetric:
        dy = gradient_of_columns(dy.new_empty, 0, width, device)
    return stats, dx, _turned_back(dy) if turned and not symmetric else dy


class _Parts:
    """The panels of y in a dtype: views, made once. Where that is a conversion, y is converted whole if it is no larger
    than a panel may be; on a CPU only if it is one panel, for those of several are read from the cache."""

    def __init__(self, y: Tensor, panels: list[slice], dtype: torch.dtype, workspace: int) -> None:
        is_small = y.numel() * dtype.itemsize <= workspace
        self.whole = y.to(dtype) if is_small and (y.device.type != "cpu" or len(panels) == 1) else y
        self._panels, self._dtype = panels, dtype
        self._views = [_part(self.whole, panel) for panel in panels]

    def __getitem__(self, b: int) -> Tensor:
        return _as(self._views[b], self._dtype)


_ALL = slice(None)


def _tiles(made: Tensor | Tiles) -> Tiles | list[tuple[slice, Tensor]]:
    return [(_ALL, made)] if isinstance(made, Tensor) else made


def _features(t: Tensor, features: slice) -> Tensor:
    return t if features is _ALL else t[:, features]


def _part(t: Tensor, panel: slice) -> Tensor:
    """Rows of a panel, without the cost of a slice where that is all of them."""
    return t if panel.stop - panel.start == t.size(0) else t[panel]


def _as(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In a dtype, without the cost of a call where that is its own."""
    return t if t.dtype == dtype else t.to(dtype)


def _turn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the gradient of y is transposed in memory meanwhile: oneDNN copies G unless it reads it along its rows,
    as in [D, m] x [m, n]."""
    return device.type == "cpu" and dtype == torch.float32 and onednn_is_faster()


def _turned_back(dy: Tensor) -> Tensor:
    """A copy that is contiguous, by all threads."""
    none, one, scalar, back = dy.new_empty(0, dy.shape[1]), dy.new_ones(3), dy.new_empty(()), dy.new_empty(dy.shape)
    torch.ops.ssl_kernels.finish_gradients_(None, one[0], one, none, dy, none, back, scalar, scalar)
    return back


def _weighted(
    x: Tensor, row_weight: Tensor | None, weighted_dtype: torch.dtype, dtype: torch.dtype, across: bool
) -> Tensor:
    """x in a dtype; or times the weights of its rows: they must not meet 16-bit features before the product, which is
    then one of fp32. Transposed if the product is."""
    weighted = _as(x, dtype) if row_weight is None else x.to(weighted_dtype) * row_weight[:, None]
    if not across:
        return weighted
    return weighted.t().contiguous() if x.device.type == "cpu" else weighted.t()
