"""The torch-free softmax kernels on NumPy arrays, on every instruction set of this machine."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

native = pytest.importorskip("ssl_kernels._native", reason="the wheel was built by another version of Python")
ISAS = native.build_info()["available_isas"]
NONE = 2**62  # a diagonal that meets no tile


def fresh(size: int, width: int = 4) -> np.ndarray:
    stats = np.zeros((size, width))
    stats[:, 0] = -np.inf
    return stats


def masks(
    shape: tuple[int, ...], ids: dict[str, Any], ignore: bool, positive: int, excluded: int
) -> tuple[np.ndarray, np.ndarray]:
    row, col = np.indices(shape)
    positives, ignored = col - row == positive, col - row == excluded
    if ids:
        same = ids["row_ids"][:, None] == ids["col_ids"][None, :]
        if ignore:
            ignored = ignored | (same & ~positives)
        else:
            positives = positives | same
    return positives & ~ignored, ignored


def definition(raw: np.ndarray, scale: float, positives: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """[rows, 5] in float64: log-sum-exp, sum and number of positives, sum and number of the pairs that count."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.where(ignored, -np.inf, scale * raw)
        top = z.max(1, initial=-np.inf, keepdims=True)
        lse = np.where(np.isneginf(top[:, 0]), -np.inf, top[:, 0] + np.log(np.exp(z - top).sum(1)))
    sums = [np.where(m, v, 0).sum(1) for m in (positives, ~ignored) for v in (raw, np.ones_like(raw))]
    return np.stack([lse, *sums], 1)


def finish(stats: np.ndarray, scale: float = 10.0) -> np.ndarray:
    """Running maximum and sum become the log-sum-exp."""
    with np.errstate(divide="ignore", invalid="ignore"):
        top = np.where(np.isneginf(stats[:, :1]), -np.inf, scale * stats[:, :1])
        return np.concatenate([top + np.log(stats[:, 1:2]), stats[:, 2:]], 1)


def split(lse: np.ndarray, raw: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The largest similarities of the rows, 0 where all are left out, and what the log-sum-exp is beyond them."""
    top = np.where(np.isinf(lse), 0, raw.max(1, initial=-np.inf)).astype(np.float32)
    return top, (lse - scale * top.astype(np.float64)).astype(np.float32)


OPTIONS = {
    "rows": st.integers(0, 140),
    "cols": st.integers(0, 150),
    "gap": st.integers(0, 5),
    "ids": st.sampled_from([None, 2, 30]),
    "ignore": st.booleans(),
    "positive": st.one_of(st.integers(-145, 155), st.sampled_from([0, NONE])),
    "excluded": st.one_of(st.integers(-145, 155), st.sampled_from([0, NONE])),
    "uniform": st.booleans(),
    "scale": st.sampled_from([0.0, 1.0, 12.5, 100.0]),
    "seed": st.integers(0, 2**16),
}


def problem(rows: int, cols: int, gap: int, ids: int | None, seed: int) -> tuple[Any, np.ndarray, dict[str, Any]]:
    """Random state, a tile of similarities from -1 to 1 with a gap behind each row, and ids."""
    rng = np.random.default_rng(seed)
    buffer = rng.uniform(-1, 1, size=(rows, cols + gap)).astype(np.float32)
    named = {} if ids is None else {"row_ids": rng.integers(ids, size=rows), "col_ids": rng.integers(ids, size=cols)}
    return rng, buffer, named


@pytest.mark.parametrize("isa", ISAS)
@given(**OPTIONS)
def test_statistics_match_the_definition(
    isa: str, rows: int, cols: int, gap: int, ids: int | None, ignore: bool, positive: int, excluded: int,
    uniform: bool, scale: float, seed: int,
) -> None:  # fmt: skip
    _, buffer, named = problem(rows, cols, gap, ids, seed)
    tile, before = buffer[:, :cols], buffer.copy()
    options = {"ignore_same_id": ignore, "positive": positive, "excluded": excluded, "isa": isa, **named}
    width = 6 if uniform else 4
    row_stats, col_stats, alone = fresh(rows, width), fresh(cols, width), fresh(rows, width)
    native.softmax_stats(tile, row_stats, col_stats, scale, **options)
    native.softmax_stats(tile, alone, None, scale, **options)
    assert np.array_equal(buffer, before)
    assert np.array_equal(alone, row_stats)

    pairs = masks(tile.shape, named, ignore, positive, excluded)
    raw = tile.astype(np.float64)
    for got, expected in (
        (row_stats, definition(raw, scale, *pairs)),
        (col_stats, definition(raw.T, scale, *(m.T for m in pairs))),
    ):
        np.testing.assert_allclose(finish(got, scale), expected[:, : width - 1], rtol=2e-6, atol=1e-5)
        assert np.array_equal(got[:, 3], expected[:, 2])


@pytest.mark.parametrize("isa", ISAS)
@given(**OPTIONS)
def test_statistics_do_not_depend_on_how_the_work_is_split(
    isa: str, rows: int, cols: int, gap: int, ids: int | None, ignore: bool, positive: int, excluded: int,
    uniform: bool, scale: float, seed: int,
) -> None:  # fmt: skip
    _, buffer, named = problem(rows, cols, gap, ids, seed)
    options = {"ignore_same_id": ignore, "positive": positive, "excluded": excluded, "isa": isa, **named}
    results = []
    for parts in (1, 2, 7):
        sides = fresh(rows, 6 if uniform else 4), fresh(cols, 6 if uniform else 4)
        native.softmax_stats(buffer[:, :cols], *sides, scale, **options, parts=parts)
        results.append(sides)
    for sides in results[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(sides, results[0], strict=True))


@pytest.mark.parametrize("isa", ISAS)
@given(cuts=st.lists(st.integers(1, 89), max_size=3), seed=st.integers(0, 999), scale=st.sampled_from([3.0, 100.0]))
def test_tiles_of_one_matrix_merge_in_any_order(isa: str, cuts: list[int], seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    raw = rng.uniform(-1, 1, size=(90, 90)).astype(np.float32)
    ids = {"row_ids": rng.integers(9, size=90), "col_ids": rng.integers(9, size=90)}
    panels = list(itertools.pairwise(sorted({0, *cuts, 90})))
    tiles = list(itertools.product(panels, panels))
    rng.shuffle(tiles)
    row_stats, col_stats = fresh(90, 6), fresh(90, 6)
    for (top, bottom), (left, right) in tiles:
        native.softmax_stats(
            raw[top:bottom, left:right], row_stats[top:bottom], col_stats[left:right], scale,
            ids["row_ids"][top:bottom], ids["col_ids"][left:right], positive=top - left, excluded=4 + top - left,
            isa=isa,
        )  # fmt: skip
    pairs = masks(raw.shape, ids, False, 0, 4)
    wide = raw.astype(np.float64)
    expected = definition(wide, scale, *pairs), definition(wide.T, scale, *(m.T for m in pairs))
    for got, exact in zip((row_stats, col_stats), expected, strict=True):
        np.testing.assert_allclose(finish(got, scale), exact, rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [50.0, 100.0, 200.0])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("rows", [3, 64, 65, 200])
def test_columns_that_underflow_next_to_the_best_pair(isa: str, scale: float, named: bool, rows: int) -> None:
    """Some of a vector of columns, whole vectors, and the last ones."""
    rng = np.random.default_rng(0)
    raw = rng.uniform(-1, -0.6, size=(rows, 53)).astype(np.float32)
    raw[rows // 2, 7] = 1
    raw[0, 16:32] = rng.uniform(-1, 1, size=16)
    ids = {"row_ids": np.arange(rows) % 5, "col_ids": np.arange(53) % 5} if named else {}
    row_stats, col_stats = fresh(rows), fresh(53)
    native.softmax_stats(raw, row_stats, col_stats, scale, **ids, ignore_same_id=True, positive=3, excluded=1, isa=isa)
    pairs = masks(raw.shape, ids, True, 3, 1)
    wide = raw.astype(np.float64)
    np.testing.assert_allclose(finish(row_stats, scale), definition(wide, scale, *pairs)[:, :3], rtol=2e-6)
    expected = definition(wide.T, scale, *(m.T for m in pairs))[:, :3]
    np.testing.assert_allclose(finish(col_stats, scale), expected, rtol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 3, 16, 37])
def test_padding_is_never_a_maximum(isa: str, cols: int) -> None:
    tile = np.full((5, cols), -0.9, np.float32)
    row_stats, col_stats = fresh(5), fresh(cols)
    native.softmax_stats(tile, row_stats, col_stats, 200.0, positive=NONE, isa=isa)
    for stats, size in ((row_stats, cols), (col_stats, 5)):
        assert (stats[:, 0] == np.float32(-0.9)).all()
        np.testing.assert_allclose(stats[:, 1], size, rtol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
@given(**OPTIONS)
def test_gradients_match_the_definition(
    isa: str, rows: int, cols: int, gap: int, ids: int | None, ignore: bool, positive: int, excluded: int,
    uniform: bool, scale: float, seed: int,
) -> None:  # fmt: skip
    rng, buffer, named = problem(rows, cols, gap, ids, seed)
    tile, behind = buffer[:, :cols], buffer[:, cols:].copy()
    raw = tile.astype(np.float64)
    positives, ignored = masks(tile.shape, named, ignore, positive, excluded)
    lse = [definition(r, scale, p, i)[:, 0] for r, p, i in ((raw, positives, ignored), (raw.T, positives.T, ignored.T))]
    lse = [np.where(np.isneginf(side), np.inf, side) for side in lse]  # a row that is left out weighs nothing
    vectors = [rng.normal(size=(3 if uniform else 2, size)).astype(np.float32) for size in (rows, cols)]
    with np.errstate(over="ignore"):
        grad = vectors[0][0][:, None] * np.exp(scale * raw - lse[0][:, None])
        grad += vectors[1][0] * np.exp(scale * raw - lse[1])
    grad -= np.where(positives, vectors[0][1][:, None] + vectors[1][1], 0)
    if uniform:
        grad -= vectors[0][2][:, None] + vectors[1][2]
    grad = np.where(ignored, 0, grad)

    options = {"ignore_same_id": ignore, "positive": positive, "excluded": excluded, "isa": isa, **named}
    counted = np.where(ignored, -np.inf, raw)
    parts = [split(side, r, scale) for side, r in zip(lse, (counted, counted.T), strict=True)]
    options["row_side"], options["col_side"] = (np.stack([*a, *b]) for a, b in zip(parts, vectors, strict=True))
    before, stats = buffer.copy(), np.ones((rows, 1))
    native.softmax_grad(tile, stats, scale, write=False, **options)
    assert np.array_equal(buffer, before)
    np.testing.assert_allclose(stats[:, 0] - 1, (grad * raw).sum(1), rtol=5e-6, atol=2e-6 * (1 + cols) ** 0.5)
    native.softmax_grad(tile, stats, scale, **options)
    np.testing.assert_allclose(tile, grad, rtol=5e-6, atol=2e-6)
    np.testing.assert_allclose(stats[:, 0] - 1, 2 * (grad * raw).sum(1), rtol=5e-6, atol=4e-6 * (1 + cols) ** 0.5)
    assert np.array_equal(buffer[:, cols:], behind)


@pytest.mark.parametrize("isa", ISAS)
def test_probabilities_keep_their_relative_precision(isa: str) -> None:
    """exp(z - lse) at the scale where a single float for lse would cost 1e-5, from e^0 to e^-78."""
    raw = np.linspace(1, 0.22, 50_001, dtype=np.float32)[:, None]
    tile, third = raw.copy(), np.float32(1 / 3)
    row_side = np.zeros((4, len(raw)), np.float32)
    row_side[1] = np.inf
    col_side = np.float32([[1], [third], [1], [0]])
    native.softmax_grad(
        tile, np.zeros((len(raw), 1)), 100.0, row_side=row_side, col_side=col_side, positive=NONE, isa=isa
    )
    z = 100.0 * (raw.astype(np.float64) - 1) - third
    assert (np.abs(tile / np.exp(z) - 1) <= 3e-7 + 2e-7 * np.abs(z)).all()  # z itself is rounded to fp32


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 5, 64])
@pytest.mark.parametrize("alone", [False, True])
def test_nan_comes_through(isa: str, cols: int, alone: bool) -> None:
    """Beside numbers or in a row, or column, that holds nothing else; other rows and columns never see it."""
    for bits in (0x7FC00000, 0x7FC00001, 0xFFC12345, 0x7F800001):  # NaNs of several payloads
        nan = np.array(bits, np.uint32).view(np.float32)
        for col in range(cols):
            tile = np.zeros((3, cols), np.float32)
            tile[1, col] = nan
            if alone:
                tile[1] = tile[:, col] = nan
            row_stats, col_stats = fresh(3), fresh(cols)
            native.softmax_stats(tile, row_stats, col_stats, 10.0, positive=NONE, isa=isa)
            assert np.isnan(finish(row_stats)[1, 0])
            assert np.isnan(finish(col_stats)[col, 0])
            assert alone or np.isfinite(finish(row_stats)[[0, 2], 0]).all()
            assert alone or np.isfinite(np.delete(finish(col_stats)[:, 0], col)).all()
            native.softmax_stats(np.ones((3, cols), np.float32), row_stats, col_stats, 10.0, positive=NONE, isa=isa)
            assert np.isnan(finish(row_stats)[1, 0])  # and later tiles do not cover it
            assert np.isnan(finish(col_stats)[col, 0])


@pytest.mark.parametrize("isa", ISAS)
def test_infinity_comes_through(isa: str) -> None:
    for cols, col in ((1, 0), (5, 2), (64, 63)):
        tile = np.zeros((3, cols), np.float32)
        tile[1, col] = np.inf
        row_stats, col_stats = fresh(3), fresh(cols)
        native.softmax_stats(tile, row_stats, col_stats, 10.0, positive=NONE, isa=isa)
        assert not np.isfinite(finish(row_stats)[1, 0])
        assert not np.isfinite(finish(col_stats)[col, 0])
        tile = np.full((3, cols), -np.inf, np.float32)
        row_stats, col_stats = fresh(3), fresh(cols)
        native.softmax_stats(tile, row_stats, col_stats, 10.0, positive=NONE, isa=isa)
        assert np.isneginf(finish(row_stats)[:, 0]).all()
        assert np.isneginf(finish(col_stats)[:, 0]).all()


def test_bad_arrays_are_named() -> None:
    tile, rows, cols = np.zeros((2, 3), np.float32), fresh(2), fresh(3)
    ids = np.zeros(2, np.int64)
    for arguments, options, message in (
        ((tile[:, ::2], rows, cols), {}, "tile: expected unit stride along columns, got 2"),
        ((tile, rows[:1], cols), {}, "row_stats: expected size 2 in dimension 0, got 1"),
        ((tile, fresh(2, 6), cols), {}, "col_stats: expected size 6 in dimension 1, got 4"),
        ((tile, rows, cols[::-1]), {}, "col_stats: expected a contiguous tensor"),
        ((tile, rows, cols), {"row_ids": ids}, "row_ids, col_ids: expected both or neither"),
        ((tile, rows, cols), {"row_ids": ids, "col_ids": ids}, "col_ids: expected size 3 in dimension 0, got 2"),
        ((tile, rows, cols), {"parts": 0}, "parts: expected at least 1, got 0"),
        ((tile, rows, cols), {"isa": "avx1024"}, "instruction set: got 'avx1024', expected one of: baseline"),
    ):
        with pytest.raises(ValueError, match=message):
            native.softmax_stats(*arguments, 1.0, **options)
    with pytest.raises(ValueError, match="scale: expected a number >= 0, got -1"):
        native.softmax_stats(tile, rows, cols, -1.0)
    with pytest.raises(ValueError, match="tile: expected dtype Float, got Double"):
        native.softmax_stats(tile.astype(np.float64), rows, cols, 1.0)

    good = {"row_side": np.zeros((4, 2), np.float32), "col_side": np.zeros((4, 3), np.float32)}
    for options, message in (
        ({"row_side": np.zeros((4, 3), np.float32)}, "row_side: expected size 2 in dimension 1, got 3"),
        ({side: good[side][:3] for side in good}, "row_side: expected 4 or 5 vectors, got 3"),
        ({"row_side": np.zeros((5, 2), np.float32)}, "row_side, col_side: expected the same number of vectors"),
        ({"row_side": np.zeros((4, 2))}, "row_side: expected dtype Float, got Double"),
        ({"row_side": np.zeros((4, 4), np.float32)[:, ::2]}, "row_side: expected vectors that are contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            native.softmax_grad(tile, np.zeros((2, 1)), 1.0, **good | options)
    with pytest.raises(ValueError, match="stats: expected 2 dimensions, got 1"):
        native.softmax_grad(tile, np.zeros(2), 1.0, **good)
