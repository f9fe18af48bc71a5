"""The arguments of a softmax over rows, checked and completed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssl_kernels.ops import _checks
from ssl_kernels.ops.row_strips import NO_TARGET

_TIE = 2e-6  # of the norms in a guide score: by so much a target's and its duplicate's may differ by rounding


class Call(NamedTuple):
    query: Tensor  # [M, D]
    candidates: Tensor  # [N, D]
    scale: Tensor
    candidate_bias: Tensor | None  # [N]
    target: Tensor  # [M]; negative for none
    query_ids: Tensor | None  # [M]
    candidate_ids: Tensor | None  # [N]
    weights: Tensor | None  # [M]
    guide_query: Tensor | None  # [M, E]
    guide_candidates: Tensor | None  # [N, E]
    guide_threshold: Tensor | None  # [M]


class Rules(NamedTuple):
    same_id: str
    hardness: float
    hardened: str
    dims: Sequence[int]  # of prefixes, ascending; the last is D
    dim_weights: Sequence[float]
    normalize: bool  # each prefix is divided by its norm


def checked(
    query: Tensor,
    candidates: Tensor,
    scale: Tensor | float,
    *,
    target: Tensor | None,
    target_is_row: bool,  # by default; else there is none
    candidate_bias: Tensor | None,
    query_ids: Tensor | None,
    candidate_ids: Tensor | None,
    weights: Tensor | None,
    guide_query: Tensor | None,
    guide_candidates: Tensor | None,
    guide_threshold: Tensor | None,
    same_id: str,
    hardness: float,
    hardened: str,
    dims: Sequence[int] | None,
    dim_weights: Sequence[float] | None,
    normalize: bool,
) -> tuple[Call, Rules]:
    query, candidates = _checks.autocast_features(query, candidates)
    _checks.check_features(query=query, candidates=candidates)
    lengths, shares = _prefixes(dims, dim_weights, query.shape[1])
    if lengths[-1] < query.shape[1]:
        query, candidates = query[:, : lengths[-1]], candidates[:, : lengths[-1]]
    _check_ids(query, candidates, query_ids, candidate_ids, hardened)
    _checks.check_choice("same_id", same_id, ("ignore", "positive", "negative"))
    _checks.check_numbers(hardness=hardness)
    if not 0 <= hardness < float("inf"):
        raise ValueError(f"hardness: expected a number >= 0, got {hardness}")
    target = _target(target, target_is_row, query, candidates)
    guides = _guide(query, candidates, target, guide_query, guide_candidates, guide_threshold)
    call = Call(
        query,
        candidates,
        _checks.as_softmax_scale("scale", scale, query),
        _vector("candidate_bias", candidate_bias, candidates),
        target,
        query_ids,
        candidate_ids,
        _vector("weights", weights, query, constant=True),
        *guides,
    )
    return call, Rules(same_id, float(hardness), hardened, lengths, shares, normalize)


def _check_ids(
    query: Tensor, candidates: Tensor, query_ids: Tensor | None, candidate_ids: Tensor | None, hardened: str
) -> None:
    if (query_ids is None) != (candidate_ids is None):
        missing = "query_ids" if query_ids is None else "candidate_ids"
        raise ValueError(f"{missing}: expected ids for both queries and candidates, or for neither")
    for name, ids, features in (("query_ids", query_ids, query), ("candidate_ids", candidate_ids, candidates)):
        if ids is not None:
            _checks.check_row_ids(name, ids, features)
    _checks.check_choice("hardened", hardened, ("all", "same_id", "other_ids"))
    if hardened != "all" and query_ids is None:
        raise ValueError(f"hardened: expected 'all' without query_ids and candidate_ids, got {hardened!r}")


def _target(target: Tensor | None, is_row: bool, query: Tensor, candidates: Tensor) -> Tensor:
    rows = query.shape[0]
    if target is None and is_row:
        if candidates.shape[0] < rows:
            raise ValueError(
                f"candidates: expected at least {rows} rows, one to a query, or a target, got {candidates.shape[0]}"
            )
        return torch.arange(rows, device=query.device)
    if target is None:
        return torch.full((rows,), NO_TARGET, dtype=torch.int64, device=query.device)
    _checks.check_row_ids("target", target, query)
    return target.contiguous()


def _vector(name: str, value: Tensor | None, rows: Tensor, *, constant: bool = False) -> Tensor | None:
    """A number to each row, in the accumulation dtype."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating tensor, got {got}")
    if value.shape != rows.shape[:1]:
        raise ValueError(f"{name}: expected shape ({rows.shape[0]},), got {tuple(value.shape)}")
    if value.device != rows.device:
        raise ValueError(f"{name}: expected device {rows.device}, got {value.device}")
    if constant:
        _checks.check_constant(name, value)
    return value.to(_checks.accumulation_dtype(rows.dtype))


def _guide(
    query: Tensor,
    candidates: Tensor,
    target: Tensor,
    guide_query: Tensor | None,
    guide_candidates: Tensor | None,
    threshold: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if guide_query is None or guide_candidates is None:
        given = {"guide_query": guide_query, "guide_candidates": guide_candidates, "guide_threshold": threshold}
        for name in given:
            if any(t is not None for t in given.values()) and name != "guide_threshold" and given[name] is None:
                raise ValueError(f"{name}: expected guide features for both queries and candidates, or for neither")
        return None, None, None
    _checks.check_features(guide_query=guide_query, guide_candidates=guide_candidates)
    for name, guide, rows in (("guide_query", guide_query, query), ("guide_candidates", guide_candidates, candidates)):
        _checks.check_constant(name, guide)
        if guide.shape[0] != rows.shape[0]:
            raise ValueError(f"{name}: expected {rows.shape[0]} rows, got {guide.shape[0]}")
        if guide.device != rows.device:
            raise ValueError(f"{name}: expected device {rows.device}, got {guide.device}")
    if threshold is None:
        threshold = _scores_of_targets(guide_query, guide_candidates, target)
    return guide_query, guide_candidates, _vector("guide_threshold", threshold, query, constant=True)


def _scores_of_targets(query: Tensor, candidates: Tensor, target: Tensor) -> Tensor:
    """And no threshold where there is no target. A target that does not exist is told of later."""
    wide = _checks.accumulation_dtype(query.dtype)
    if len(candidates) == 0:
        return torch.full(target.shape, torch.inf, dtype=wide, device=query.device)
    query, theirs = query.to(wide), candidates[target.clamp(0, len(candidates) - 1)].to(wide)
    with _checks.without_autocast(query):
        norms = torch.linalg.vector_norm(query, dim=1) * torch.linalg.vector_norm(theirs, dim=1)
        return (torch.linalg.vecdot(query, theirs) + _TIE * norms).masked_fill(target < 0, torch.inf)


def _prefixes(dims: Sequence[int] | None, weights: Sequence[float] | None, width: int) -> tuple[list[int], list[float]]:
    """Ascending lengths, and their weights."""
    if dims is None:
        if weights is not None:
            raise ValueError("dim_weights: expected None without dims")
        return [width], [1.0]
    lengths: list[Any] = list(dims)
    if not lengths or len(set(lengths)) < len(lengths):
        raise ValueError(f"dims: expected lengths that differ, at least one, got {lengths}")
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"dims: expected ints, got {type(length).__name__}")
        if not 1 <= length <= width:
            raise ValueError(f"dims: expected lengths from 1 to {width}, the number of features, got {length}")
    shares = [1.0] * len(lengths) if weights is None else list(weights)
    if len(shares) != len(lengths):
        raise ValueError(f"dim_weights: expected {len(lengths)} numbers, one to a length, got {len(shares)}")
    for share in shares:
        _checks.check_numbers(dim_weights=share)
    paired = sorted(zip(lengths, shares, strict=True))
    return [length for length, _ in paired], [float(share) for _, share in paired]
