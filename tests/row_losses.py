"""What the tests of the softmax over rows share: random calls, with the differentiable arguments apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from contrastive import unit_rows
from torch import Tensor

import ssl_kernels.functional as K

Call = Callable[..., Tensor]


def call(
    rows: int,
    cols: int,
    width: int = 8,
    *,
    function: Callable[..., Tensor] = K.row_softmax_loss,
    scale: float = 10.0,
    dtype: torch.dtype = torch.float32,
    targets: bool = False,
    ids: int | None = None,
    bias: bool = False,
    weights: bool = False,
    guide: int | None = None,
    **options: Any,
) -> tuple[Call, list[Tensor]]:
    """A loss of queries, candidates, perhaps a bias, and the scale; and these arguments.

    Args:
        rows, cols, width: M, N, D.
        function: ``row_softmax_loss`` or ``row_lse``.
        scale: t.
        dtype: of the features.
        targets: random ones, some of which are none; else the default.
        ids: how many different ones there are.
        bias: whether there is one.
        weights: whether there are any.
        guide: the number of features of a guide.
        options: as they are passed on.
    """
    leaves = [unit_rows(rows, width, dtype), unit_rows(cols, width, dtype)]
    if bias:
        leaves.append(torch.randn(cols))
    if targets:
        options["target"] = torch.randint(-1, cols, (rows,))
    if ids is not None:
        options["query_ids"], options["candidate_ids"] = (
            torch.randint(ids, (rows,)),
            torch.randint(ids, (2 * cols,))[::2],
        )
    if weights:
        options["weights"] = torch.randn(rows)
    if guide is not None:
        options["guide_query"], options["guide_candidates"] = unit_rows(rows, guide), unit_rows(cols, guide)
    if function is K.row_lse and guide is not None:
        options["guide_threshold"] = torch.randn(rows) / 2
    return functools.partial(_call, function, bias, options), [*leaves, torch.tensor(scale)]


def _call(function: Callable[..., Tensor], bias: bool, options: dict[str, Any], *leaves: Tensor) -> Tensor:
    query, candidates, *rest, scale = leaves
    return function(query, candidates, scale, candidate_bias=rest[0] if bias else None, **options)
