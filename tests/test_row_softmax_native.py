"""The torch-free kernels of a softmax over rows on NumPy arrays, on every instruction set of this machine."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

native = pytest.importorskip("ssl_kernels._native", reason="the wheel was built by another version of Python")
ISAS = native.build_info()["available_isas"]
IGNORED, POSITIVE, NEGATIVE = range(3)
LEFT_OUT = np.float32(-2e38)

OPTIONS = {
    "rows": st.integers(0, 140),
    "cols": st.integers(0, 150),
    "gap": st.integers(0, 5),
    "ids": st.sampled_from([None, 2, 30]),
    "same_id": st.sampled_from([IGNORED, POSITIVE, NEGATIVE]),
    "scales": st.sampled_from([(0.0,) * 3, (12.5,) * 3, (100.0,) * 3, (10.0, 17.0, 10.0), (10.0, 10.0, 13.0)]),
    "bias": st.booleans(),
    "factors": st.booleans(),
    "guided": st.booleans(),
    "smoothed": st.booleans(),
    "seed": st.integers(0, 2**16),
}


# What a bias removes, beside a share of the target for every pair, over more rows than one sum by column has.
REMOVED = example(
    rows=130, cols=70, gap=1, ids=None, same_id=IGNORED, scales=(12.5,) * 3, bias=True, factors=False, guided=False,
    smoothed=True, seed=1,
)  # fmt: skip


class Problem(NamedTuple):
    buffer: np.ndarray  # a tile of similarities from -1 to 1, with a gap behind each row
    tile: np.ndarray
    options: dict[str, Any]
    s: np.ndarray  # this and what follows in float64
    v: np.ndarray
    unit: float
    positive: np.ndarray
    ignored: np.ndarray
    factor: np.ndarray
    rng: np.random.Generator


def problem(
    rows: int, cols: int, gap: int, ids: int | None, same_id: int, scales: tuple[float, ...], bias: bool,
    factors: bool, guided: bool, seed: int,
) -> Problem:  # fmt: skip
    rng = np.random.default_rng(seed)
    buffer = rng.uniform(-1, 1, size=(rows, cols + gap)).astype(np.float32)
    tile = buffer[:, :cols]
    target = rng.integers(-3, cols + 3, size=rows)
    options: dict[str, Any] = {"target": target, "scales": scales, "same_id": same_id, "guided": guided}
    positive = np.arange(cols) == target[:, None]
    same, ignored = np.zeros_like(positive), np.zeros_like(positive)
    if guided:
        ignored = (rng.random(size=tile.shape) < 0.3) & ~positive
    if ids is not None:
        options["row_ids"], options["col_ids"] = rng.integers(ids, size=rows), rng.integers(ids, size=cols)
        same = options["row_ids"][:, None] == options["col_ids"]
        ignored = ignored | (same & ~positive if same_id == IGNORED else False)
        positive = (positive | (same if same_id == POSITIVE else False)) & ~ignored
    raw = tile.astype(np.float64)
    if guided:
        tile[ignored] = LEFT_OUT
    factor = np.ones_like(raw)
    if factors:
        options["row_factors"], options["col_factors"] = (
            rng.uniform(0.5, 2, size=(1, n)).astype(np.float32) for n in raw.shape
        )
        factor = options["row_factors"].T.astype(np.float64) * options["col_factors"]
    s = raw * factor
    v, unit = s, scales[0]
    if bias or factors or len(set(scales)) > 1:
        v, unit = s * np.where(positive, scales[0], np.where(same, scales[1], scales[2])), 1.0
    if bias:
        options["bias"] = (5 * rng.normal(size=cols)).astype(np.float32)
        options["bias"][rng.random(size=cols) < 0.1] = -np.inf
        removed = np.isneginf(options["bias"])
        ignored, positive = ignored | removed, positive & ~removed
        v = v + np.where(removed, 0, options["bias"]).astype(np.float64)
    return Problem(buffer, tile, options, s, v, unit, positive, ignored, factor, rng)


def fresh(rows: int, width: int) -> np.ndarray:
    stats = np.zeros((rows, width))
    stats[:, 0] = -np.inf
    return stats


def lse_of(v: np.ndarray, unit: float, ignored: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(ignored, -np.inf, unit * v)
        top = z.max(1, initial=-np.inf)
        return np.where(np.isneginf(top), -np.inf, top + np.log(np.exp(z - top[:, None]).sum(1)))


def finished(stats: np.ndarray, unit: float) -> np.ndarray:
    """The running maximum and sum as a log-sum-exp."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(stats[:, 1] == 0, -np.inf, unit * stats[:, 0] + np.log(stats[:, 1]))


@pytest.mark.parametrize("isa", ISAS)
@given(**OPTIONS)
@REMOVED
def test_statistics_match_the_definition(isa: str, smoothed: bool, **options: Any) -> None:
    p = problem(**options)
    before, width = p.buffer.copy(), 6 if smoothed else 4
    results = []
    for parts in (1, 3):
        stats = fresh(len(p.tile), width)
        native.row_softmax_stats([p.tile], stats[None], **p.options, parts=parts, isa=isa)
        results.append(stats)
    stats = results[0]
    assert np.array_equal(*results)
    assert np.array_equal(p.buffer, before)
    np.testing.assert_allclose(finished(stats, p.unit), lse_of(p.v, p.unit, p.ignored), rtol=2e-6, atol=2e-5)
    for column, mask in ((2, p.positive), (4, ~p.ignored))[: width // 2 - 1]:
        np.testing.assert_allclose(stats[:, column], np.where(mask, p.v, 0).sum(1), rtol=2e-6, atol=5e-4)
        assert np.array_equal(stats[:, column + 1], mask.sum(1))


@pytest.mark.parametrize("isa", ISAS)
@given(cuts=st.lists(st.integers(1, 89), max_size=3), seed=st.integers(0, 999), bias=st.booleans())
def test_tiles_of_one_matrix_merge_in_any_order(isa: str, cuts: list[int], seed: int, bias: bool) -> None:
    p = problem(90, 90, 0, 9, POSITIVE, (30.0,) * 3, bias, False, False, seed)
    panels = list(itertools.pairwise(sorted({0, *cuts, 90})))
    tiles = list(itertools.product(panels, panels))
    p.rng.shuffle(tiles)
    stats = fresh(90, 6)
    for (top, bottom), (left, right) in tiles:
        part = {name: p.options[name][left:right] for name in ("col_ids", "bias") if name in p.options}
        part |= {"target": p.options["target"][top:bottom] - left, "row_ids": p.options["row_ids"][top:bottom]}
        native.row_softmax_stats([p.tile[top:bottom, left:right]], stats[None, top:bottom], **p.options | part, isa=isa)
    np.testing.assert_allclose(finished(stats, p.unit), lse_of(p.v, p.unit, p.ignored), rtol=2e-6, atol=2e-5)
    assert np.array_equal(stats[:, 3], p.positive.sum(1))


@pytest.mark.parametrize("isa", ISAS)
@given(**OPTIONS)
@REMOVED
def test_gradients_match_the_definition(isa: str, smoothed: bool, **options: Any) -> None:
    p = problem(**options)
    rows, cols = p.tile.shape
    lse = lse_of(p.v, p.unit, p.ignored)
    top = np.where(np.isneginf(lse), 0, np.where(p.ignored, -np.inf, p.v).max(1, initial=-np.inf)).astype(np.float32)
    side = p.rng.normal(size=(5 if smoothed else 4, rows)).astype(np.float32)
    side[0], side[1] = top, np.where(np.isneginf(lse), np.inf, lse - p.unit * top.astype(np.float64))
    log_sum = np.where(np.isneginf(lse), np.inf, lse)[:, None]
    grad = side[2][:, None] * np.exp(np.where(p.ignored, -np.inf, p.unit * p.v - log_sum))
    grad -= np.where(p.positive, side[3][:, None], 0) + (side[4][:, None] if smoothed else 0)
    grad = np.where(p.ignored, 0, grad)
    products = grad * p.s

    before, results = p.buffer.copy(), []
    for parts, write, planes in ((2, False, 0), (1, True, 1), (3, True, 2)):
        p.buffer[:] = before
        moments = np.ones((rows, 2))[:, :1]
        by_column = np.full((1, planes, -(-rows // 64), cols), np.nan, np.float32)
        native.row_softmax_grad(
            [p.tile], moments, by_column, side[None], **p.options, write=write, parts=parts, isa=isa
        )
        if not write:
            assert np.array_equal(p.buffer, before)
        results.append((moments[:, 0], by_column[0], p.tile.copy()))
    largest = np.abs(np.where(p.ignored, 0, p.unit * p.v)).max(initial=0)  # logits are rounded to fp32
    error = 2e-7 * (10 + largest) * (np.abs(side[2])[:, None] + np.abs(grad))
    for (moments, by_column, tile), write in zip(results, (False, True, True), strict=True):
        assert (np.abs(moments - 1 - products.sum(1)) <= (error * np.abs(p.s)).sum(1) + 1e-5).all()
        found = (grad, 1), (products, np.abs(p.s))
        if len(by_column) == 1 and "row_factors" in p.options:
            found = found[1:]
        for summed, (exact, scope) in zip(by_column, found, strict=False):  # of 64 rows each
            for chunk, first in enumerate(range(0, rows, 64)):
                of = slice(first, first + 64)
                allowed = (error * scope)[of].sum(0) + 1e-5
                assert (np.abs(summed[chunk] - exact[of].sum(0)) <= allowed).all()
        if write:
            assert (np.abs(tile - grad * p.factor) <= error * p.factor + 1e-6).all()
    assert np.array_equal(p.buffer[:, cols:], before[:, cols:])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("same_id", [IGNORED, POSITIVE, NEGATIVE])
@given(rows=st.integers(0, 20), cols=st.integers(0, 70), gap=st.integers(0, 3), seed=st.integers(0, 999))
def test_a_guide_leaves_out_what_it_scores_above_the_threshold(
    isa: str, same_id: int, rows: int, cols: int, gap: int, seed: int
) -> None:
    p = problem(rows, cols, gap, 4, same_id, (1.0,) * 3, False, False, False, seed)
    scores = p.rng.uniform(-1, 1, size=(rows, cols)).astype(np.float32)
    threshold = p.rng.uniform(-1, 1, size=rows).astype(np.float32)
    before = p.buffer.copy()
    scores[:, ::7] = threshold[:, None]  # as high, and not above it
    options = {name: p.options[name] for name in ("target", "row_ids", "col_ids", "same_id")}
    native.row_softmax_guide(p.tile, scores, threshold, **options, isa=isa)
    left_out = (scores > threshold[:, None]) & ~p.positive
    assert np.array_equal(p.tile, np.where(left_out, LEFT_OUT, before[:, :cols]))
    assert np.array_equal(p.buffer[:, cols:], before[:, cols:])


@pytest.mark.parametrize("isa", ISAS)
def test_a_target_that_has_all_of_the_probability_leaves_nothing(isa: str) -> None:
    for cols in (1, 5, 64, 67):
        tile = np.linspace(-1, -0.5, 9 * cols, dtype=np.float32).reshape(9, cols)
        target = np.arange(9) % cols
        tile[np.arange(9), target] = 0.83
        stats = fresh(9, 4)
        native.row_softmax_stats([tile], stats[None], target, (100.0,) * 3, isa=isa)
        side = np.stack([stats[:, 0], np.log(stats[:, 1]), np.ones(9), np.ones(9)]).astype(np.float32)
        native.row_softmax_grad(
            [tile], np.zeros((9, 1)), np.zeros((1, 0, 1, cols), np.float32), side[None], target, (100.0,) * 3, isa=isa
        )
        assert np.abs(tile).max() < 1e-30


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 3, 16, 37])
def test_padding_is_never_a_maximum(isa: str, cols: int) -> None:
    stats = fresh(5, 4)
    native.row_softmax_stats([np.full((5, cols), -0.9, np.float32)], stats[None], np.full(5, -1), (200.0,) * 3, isa=isa)
    assert (stats[:, 0] == np.float32(-0.9)).all()
    np.testing.assert_allclose(stats[:, 1], cols, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("alone", [False, True])
def test_nan_comes_through(isa: str, alone: bool) -> None:
    for cols, col in ((1, 0), (5, 2), (64, 63), (67, 65)):
        tile = np.zeros((3, cols), np.float32)
        tile[1, col] = np.nan
        tile[1] = np.nan if alone else tile[1]
        stats = fresh(3, 4)
        for piece in (tile, np.ones((3, cols), np.float32)):
            native.row_softmax_stats([piece], stats[None], np.zeros(3, np.int64), (10.0,) * 3, isa=isa)
            assert np.isnan(finished(stats, 10.0)[1])  # and later tiles do not cover it
            assert np.isfinite(finished(stats, 10.0)[[0, 2]]).all()


@pytest.mark.parametrize("isa", ISAS)
@given(**OPTIONS)
def test_prefixes_are_what_each_is_alone(isa: str, smoothed: bool, **options: Any) -> None:
    """Each of three adds similarities to those of the one before, and receives its gradient and those of all longer."""
    p = problem(**options)
    shape, width = p.tile.shape, 6 if smoothed else 4
    pieces = [p.tile.copy(), *p.rng.uniform(-1, 1, size=(2, *shape)).astype(np.float32)]
    sums = list(itertools.accumulate(pieces))
    known, factors = dict(p.options), {}
    for name, size in zip(("row_factors", "col_factors"), shape, strict=True):
        if name in known:
            factors[name] = known[name] = p.rng.uniform(0.5, 2, size=(3, size)).astype(np.float32)

    tiles, stats = [piece.copy() for piece in pieces], np.stack([fresh(shape[0], width) for _ in pieces])
    native.row_softmax_stats(tiles, stats, **known, isa=isa, parts=2)
    assert all(np.array_equal(*pair) for pair in zip(tiles, sums, strict=True))
    sides = p.rng.normal(size=(3, 5 if smoothed else 4, shape[0])).astype(np.float32)
    empty = stats[:, :, 1] == 0
    sides[:, 0] = np.where(empty, 0, stats[:, :, 0])
    sides[:, 1] = np.where(empty, np.inf, np.log(np.where(empty, 1, stats[:, :, 1])))
    results = []
    for given_tiles, summed in ((tiles, True), ([piece.copy() for piece in pieces], False)):
        moments, by_column = np.zeros((shape[0], 3)), np.zeros((3, 2, -(-shape[0] // 64), shape[1]), np.float32)
        native.row_softmax_grad(given_tiles, moments, by_column, sides, **known, summed=summed, parts=2, isa=isa)
        results.append((given_tiles, moments, by_column))
    total = np.zeros(shape, np.float32)
    for k in (2, 1, 0):
        alone = known | {name: both[k : k + 1] for name, both in factors.items()}
        tile, moments, expected = sums[k].copy(), np.zeros((shape[0], 1)), fresh(shape[0], width)
        by_column = np.zeros((1, 2, -(-shape[0] // 64), shape[1]), np.float32)
        native.row_softmax_stats([tile], expected[None], **alone, isa=isa)
        native.row_softmax_grad([tile], moments, by_column, sides[k : k + 1], **alone, isa=isa)
        assert np.array_equal(stats[k], expected, equal_nan=True)
        total = tile + total
        for made, made_moments, made_columns in results:
            np.testing.assert_allclose(made[k], total, rtol=1e-5, atol=1e-5 * (1 + np.abs(tile).max(initial=0)))
            np.testing.assert_array_equal(made_moments[:, k], moments[:, 0])
            np.testing.assert_array_equal(made_columns[k], by_column[0])


@pytest.mark.parametrize("isa", ISAS)
@given(**OPTIONS, prefixes=st.integers(1, 3), weighted=st.booleans(), write=st.booleans())
def test_a_visit_is_both_passes(
    isa: str, smoothed: bool, prefixes: int, weighted: bool, write: bool, **options: Any
) -> None:
    p = problem(**options)
    (rows, cols), known = p.tile.shape, dict(p.options)
    pieces = [p.tile.copy(), *p.rng.uniform(-1, 1, size=(2, rows, cols)).astype(np.float32)][:prefixes]
    for name, size in (("row_factors", rows), ("col_factors", cols)):
        if name in known:
            known[name] = p.rng.uniform(0.5, 2, size=(prefixes, size)).astype(np.float32)
    shares, smoothing, weights = [1.0, -0.5, 0.0][:prefixes], 0.3 if smoothed else 0.0, np.ones(rows, np.float32)
    if weighted:
        weights[:] = p.rng.normal(size=rows)
        weights[::3] = 0
    largest = np.abs(weights).max(initial=0) or 1.0

    def empty() -> tuple[Any, ...]:
        stats = np.stack([fresh(rows, 6 if smoothed else 4) for _ in pieces])
        by_column = np.full((prefixes, 2, -(-rows // 64), cols), np.nan, np.float32)
        return [piece.copy() for piece in pieces], stats, np.ones((rows, prefixes)), by_column

    tiles, stats, moments, by_column = empty()
    native.row_softmax_stats(tiles, stats, **known, isa=isa)
    weight = np.array(shares)[:, None] * np.where(stats[:, :, 3] > 0, weights / largest, 0)
    positives, every = (np.maximum(stats[:, :, min(i, stats.shape[2] - 1)], 1) for i in (3, 5))
    sides = np.zeros((prefixes, 5 if smoothed else 4, rows), np.float32)
    with np.errstate(divide="ignore"):
        sides[:, 0] = np.where(weight == 0, 0, stats[:, :, 0])
        sides[:, 1] = np.where(weight == 0, np.inf, np.log(stats[:, :, 1]))
    sides[:, 2], sides[:, 3] = weight, (1 - smoothing) * weight / positives
    if smoothed:
        sides[:, 4] = smoothing * weight / every
    native.row_softmax_grad(tiles, moments, by_column, sides, **known, write=write, isa=isa)

    visited = empty()
    native.row_softmax_visit(
        *visited, **known, weights=weights if weighted else None, largest=largest, shares=shares,
        label_smoothing=smoothing, write=write, parts=2, isa=isa,
    )  # fmt: skip
    np.testing.assert_array_equal(visited[1], stats)
    size = 1 + max((np.abs(piece).max(initial=0) for piece in pieces), default=0)
    for one, other in zip((*visited[0], *visited[2:]), (*tiles, moments, by_column), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-4 * size)


def test_bad_arrays_are_named() -> None:
    tile, stats, target, t = np.zeros((2, 3), np.float32), fresh(2, 4)[None], np.zeros(2, np.int64), (1.0,) * 3
    ids = np.zeros(2, np.int64)
    for arguments, options, message in (
        (([tile[:, ::2]], stats, target, t), {}, "tile: expected unit stride along columns, got 2"),
        (([tile], stats[:, :1], target, t), {}, "stats: expected size 2 in dimension 1, got 1"),
        (([tile], stats, target[:1], t), {}, "target: expected size 2 in dimension 0, got 1"),
        (([tile], stats, target, (-1.0,) * 3), {}, "scale: expected a number >= 0, got -1"),
        (([tile], stats, target, t), {"row_ids": ids}, "row_ids, col_ids: expected both or neither"),
        (([tile], stats, target, t), {"same_id": 3}, "same_id: expected 0, 1 or 2, got 3"),
        (([tile], stats, target, t), {"bias": np.zeros(2, np.float32)}, "bias: expected size 3 in dimension 0, got 2"),
        (
            ([tile], stats, target, t),
            {"row_factors": np.ones((1, 2), np.float32)},
            "row_factors, col_factors: expected",
        ),
        (([tile], stats, target, t), {"parts": 0}, "parts: expected at least 1, got 0"),
        (([tile], stats, target, t), {"isa": "avx1024"}, "instruction set: got 'avx1024'"),
    ):
        with pytest.raises(ValueError, match=message):
            native.row_softmax_stats(*arguments, **options)
    zeros = functools.partial(np.zeros, dtype=np.float32)
    good = {"moments": np.zeros((2, 1)), "col_sums": zeros((1, 1, 1, 3)), "sides": zeros((1, 4, 2))}
    for change, message in (
        ({"sides": zeros((1, 3, 2))}, "sides: expected 4 or 5 vectors, got 3"),
        ({"sides": zeros((1, 4, 4))[:, :, ::2]}, "sides: expected vectors that are contiguous in memory"),
        ({"moments": np.zeros(2)}, "moments: expected 2 dimensions, got 1"),
        ({"col_sums": zeros((1, 1, 2, 3))}, "col_sums: expected size 1 in dimension 2, got 2"),
        ({"col_sums": zeros((1, 3, 1, 3))}, "col_sums: expected at most 2 planes, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            native.row_softmax_grad([tile], **good | change, target=target, scales=t)
    with pytest.raises(ValueError, match="scores: expected size 3 in dimension 1, got 2"):
        native.row_softmax_guide(tile, np.zeros((2, 2), np.float32), np.zeros(2, np.float32), target)
