"""The torch-free kernel of the softmax over keys on NumPy arrays, on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python

native = pytest.importorskip("ssl_kernels._native", reason="the wheel was built by another version of Python")
ISAS = native.build_info()["available_isas"]


def start(rows: int) -> np.ndarray:
    return np.tile([-np.inf, 0.0], (rows, 1))


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.integers(0, 9),
    widths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    features=st.integers(0, 40),
    gap=st.integers(0, 5),
    scale=st.sampled_from([0.0, 1.0, 30.0, -7.0]),
    seed=st.integers(0, 2**16),
)
def test_tiles_one_after_the_other_match_the_definition(
    isa: str, rows: int, widths: list[int], features: int, gap: int, scale: float, seed: int
) -> None:
    """Whatever the earlier tiles have weighed is brought to the maximum of all so far."""
    rng = np.random.default_rng(seed)
    stats, mean = start(rows), np.zeros((rows, features + gap), np.float32)
    before = np.zeros((rows, features))
    z = np.empty((rows, 0))
    for cols in widths:
        buffer = rng.normal(size=(rows, cols + gap)).astype(np.float32)
        tile, untouched = buffer[:, :cols], buffer[:, cols:].copy()
        keys = rng.normal(size=(cols, features))
        z_tile = scale * tile.astype(np.float64)
        z = np.concatenate([z, z_tile], 1)
        top = z.max(1, keepdims=True, initial=-np.inf)
        unwritten, stats_alone = tile.copy(), stats.copy()
        native.key_softmax_panel(unwritten, stats_alone, None, scale, isa=isa)
        native.key_softmax_panel(tile, stats, mean[:, :features], scale, isa=isa)
        assert np.array_equal(buffer[:, cols:], untouched)
        assert np.array_equal(unwritten.astype(np.float64) * scale, z_tile)
        assert np.array_equal(stats_alone, stats)
        assert np.array_equal(abs(scale) * stats[:, :1], top) or scale == 0
        np.testing.assert_allclose(stats[:, 1], np.exp(z - top).sum(1), rtol=2e-5)
        np.testing.assert_allclose(tile, np.exp(z_tile - top), rtol=2e-5, atol=1e-37)
        before = before * np.exp(z[:, :-cols].max(1, keepdims=True, initial=-np.inf) - top)
        np.testing.assert_allclose(mean[:, :features], before, rtol=1e-4, atol=1e-5)
        before += np.exp(z_tile - top) @ keys
        mean[:, :features] = before
        assert not mean[:, features:].any()


@pytest.mark.parametrize("isa", ISAS)
def test_the_exponential_over_its_whole_range(isa: str) -> None:
    z = np.linspace(-87, 0, 200_001, dtype=np.float32)[None]
    tile = z.copy()
    native.key_softmax_panel(tile, start(1), np.zeros((1, 0), np.float32), 1.0, isa=isa)
    np.testing.assert_allclose(tile, np.exp(z.astype(np.float64)), rtol=5e-7)
    far = np.array([[-1e30, -500.0, 0.0]], np.float32)
    native.key_softmax_panel(far, start(1), np.zeros((1, 0), np.float32), 1.0, isa=isa)
    assert (far[0, :2] < 2e-38).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 5, 64, 131])
def test_nan_and_infinity_come_through(isa: str, cols: int) -> None:
    for bits in (0x7FC00000, 0x7FC00001, 0xFFC12345, 0x7F800001):  # NaNs of several payloads
        for col in range(cols):
            tile, stats = np.zeros((2, cols), np.float32), start(2)
            tile[0, col] = np.array(bits, np.uint32).view(np.float32)
            native.key_softmax_panel(tile, stats, np.zeros((2, 1), np.float32), 1.0, isa=isa)
            assert np.isnan(tile[0, col])
            assert np.isnan(stats[0, 1])
            assert np.isfinite(stats[1]).all()
    for col in range(cols):
        tile, stats = np.full((1, cols), 900, np.float32), start(1)
        tile[0, col] = np.inf
        native.key_softmax_panel(tile, stats, None, 1.0, isa=isa)
        native.key_softmax_panel(np.zeros((1, 3), np.float32), stats, None, 1.0, isa=isa)
        assert (stats == np.inf).all()
    stats = start(1)
    native.key_softmax_panel(np.full((1, cols), -np.inf, np.float32), stats, None, 1.0, isa=isa)
    assert stats[0, 0] == -np.inf
    native.key_softmax_panel(np.zeros((1, 3), np.float32), stats, None, 1.0, isa=isa)
    assert np.array_equal(stats, [[0, 3]])


@pytest.mark.parametrize("isa", ISAS)
def test_long_rows_do_not_drift(isa: str) -> None:
    tile, stats = np.full((1, 2**22 + 3), 0.5, np.float32), start(1)
    tile[0, 7] = 0.7
    native.key_softmax_panel(tile, stats, None, 1.0, isa=isa)
    np.testing.assert_allclose(stats[0, 1], 1 + (2**22 + 2) * np.exp(np.float64(np.float32(0.5)) - 0.7), rtol=6e-7)


def test_bad_arrays_are_named() -> None:
    tile, stats, mean = np.zeros((2, 3), np.float32), start(2), np.zeros((2, 4), np.float32)
    for arguments, message in (
        ((tile[:, ::2], stats, mean), "tile: expected unit stride along columns, got 2"),
        ((tile, stats[:1], mean), "stats: expected size 2 in dimension 0, got 1"),
        ((tile, stats[:, :1].copy(), mean), "stats: expected size 2 in dimension 1, got 1"),
        ((tile, stats, mean[:1]), "mean: expected size 2 in dimension 0, got 1"),
        ((tile, stats, mean[:, ::2]), "mean: expected unit stride along columns, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            native.key_softmax_panel(*arguments, 1.0)
    with pytest.raises(ValueError, match="tile: expected dtype Float, got Double"):
        native.key_softmax_panel(tile.astype(np.float64), stats, mean, 1.0)


@pytest.mark.parametrize("isa", ISAS)
def test_the_op_itself_on_each_instruction_set(isa: str) -> None:
    code = """
import torch, ssl_kernels, ssl_kernels.functional as K
torch.manual_seed(0)
query, keys = torch.randn(70, 9, requires_grad=True), torch.randn(450, 9)
ours = torch.autograd.grad(K.key_softmax(query, keys, 2.0)[0].sum(), query)[0]
with ssl_kernels.use_backend("reference"):
    exact = torch.autograd.grad(K.key_softmax(query, keys, 2.0)[0].sum(), query)[0]
torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
print(ssl_kernels._C.active_isa())
"""
    result = run_python(code, SSL_KERNELS_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa
