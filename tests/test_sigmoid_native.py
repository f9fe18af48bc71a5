"""The torch-free kernel on NumPy arrays, on every instruction set of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python

native = pytest.importorskip("ssl_kernels._native", reason="the wheel was built by another version of Python")
INFO = native.build_info()
ISAS = INFO["available_isas"]


def definition(
    tile: np.ndarray, scale: float, bias: float, same: np.ndarray | None, ignore: bool, diagonal: int
) -> tuple[np.ndarray, np.ndarray]:
    """G and the row statistics in float64."""
    raw = tile.astype(np.float64)
    row, col = np.indices(raw.shape)
    positive = col - row == diagonal
    ignored = np.zeros_like(positive)
    if same is not None:
        ignored = same & ~positive & ignore
        positive = positive | (same & (not ignore))
    z = np.where(positive, -1, 1) * (scale * raw + bias)
    loss = np.where(ignored, 0, np.logaddexp(0, z))
    grad = np.where(positive, -1, 1) * np.exp(-np.logaddexp(0, -z))
    grad = np.where(ignored, 0, grad)
    return grad, np.stack([loss.sum(1), (grad * raw).sum(1), grad.sum(1)], 1)


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.integers(0, 9),
    cols=st.integers(0, 90),
    gap=st.integers(0, 5),
    ids=st.sampled_from([None, 2, 30]),
    ignore=st.booleans(),
    diagonal=st.integers(-12, 95),
    seed=st.integers(0, 2**16),
)
def test_matches_the_definition(
    isa: str, rows: int, cols: int, gap: int, ids: int | None, ignore: bool, diagonal: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    buffer = rng.normal(size=(rows, cols + gap)).astype(np.float32)
    tile, untouched = buffer[:, :cols], buffer[:, cols:].copy()
    scale, bias = 12.5, -3.25
    named: dict[str, Any] = {}
    same = None
    if ids is not None:
        named = {"row_ids": rng.integers(ids, size=rows), "col_ids": rng.integers(ids, size=cols)}
        same = named["row_ids"][:, None] == named["col_ids"][None, :]
    grad, expected = definition(tile, scale, bias, same, ignore, diagonal)
    options = {"ignore_same_id": ignore, "diagonal": diagonal, "isa": isa, **named}

    loss_only = np.ones((rows, 1))
    before = tile.copy()
    native.sigmoid_panel(tile, loss_only, scale, bias, write_grad=False, **options)
    stats = np.ones((rows, 3))
    native.sigmoid_panel(tile, stats, scale, bias, write_grad=False, **options)
    assert np.array_equal(tile, before)
    assert np.array_equal(loss_only[:, 0], stats[:, 0])
    np.testing.assert_allclose(stats - 1, expected, rtol=2e-6, atol=2e-6 * (1 + cols) ** 0.5)

    native.sigmoid_panel(tile, stats, scale, bias, **options)
    np.testing.assert_allclose(tile, grad, rtol=5e-6, atol=1e-37)
    np.testing.assert_allclose(stats - 1, 2 * expected, rtol=2e-6, atol=4e-6 * (1 + cols) ** 0.5)
    assert np.array_equal(buffer[:, cols:], untouched)


@pytest.mark.parametrize("isa", ISAS)
def test_the_special_functions_over_their_whole_range(isa: str) -> None:
    """Relative error of log1p(exp(z)) and of the sigmoid from z = -87 to 87, against float64."""
    z = np.linspace(-87, 87, 400_001, dtype=np.float32)[:, None]
    tile, stats = z.copy(), np.zeros((len(z), 3))
    native.sigmoid_panel(tile, stats, 1.0, 0.0, isa=isa, diagonal=-len(z))
    wide = z[:, 0].astype(np.float64)
    np.testing.assert_allclose(stats[:, 0], np.logaddexp(0, wide), rtol=5e-7)
    np.testing.assert_allclose(tile[:, 0], np.exp(-np.logaddexp(0, -wide)), rtol=5e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 5, 64])
def test_nan_and_infinity_come_through(isa: str, cols: int) -> None:
    for bits in (0x7FC00000, 0x7FC00001, 0xFFC12345, 0x7F800001):  # NaNs of several payloads
        for col in range(cols):
            tile = np.zeros((2, cols), np.float32)
            tile[0, col] = np.array(bits, np.uint32).view(np.float32)
            stats = np.zeros((2, 3))
            native.sigmoid_panel(tile, stats, 1.0, 0.0, isa=isa, diagonal=-5)
            assert np.isnan(tile[0, col])
            assert np.isnan(stats[0]).all()
            assert np.isfinite(stats[1]).all()
    tile, stats = np.full((1, cols), np.inf, np.float32), np.zeros((1, 3))
    native.sigmoid_panel(tile, stats, 1.0, 0.0, isa=isa, diagonal=-5)
    assert stats[0, 0] == np.inf


def test_bad_arrays_are_named() -> None:
    tile, stats = np.zeros((2, 3), np.float32), np.zeros((2, 3))
    ids = np.zeros(2, np.int64)
    for arguments, options, message in (
        ((tile[:, ::2], stats), {}, "tile: expected unit stride along columns, got 2"),
        ((tile, stats[:1]), {}, "stats: expected size 2 in dimension 0, got 1"),
        ((tile, stats[:, :1].copy()), {}, "stats: expected 3 columns .* got 1"),
        ((tile, stats), {"row_ids": ids}, "row_ids, col_ids: expected both or neither"),
        ((tile, stats), {"row_ids": ids, "col_ids": ids}, "col_ids: expected size 3 in dimension 0, got 2"),
        ((tile, stats), {"isa": "avx1024"}, "instruction set: got 'avx1024', expected one of: baseline"),
    ):
        with pytest.raises(ValueError, match=message):
            native.sigmoid_panel(*arguments, 1.0, 0.0, **options)
    with pytest.raises(ValueError, match="tile: expected dtype Float, got Double"):
        native.sigmoid_panel(tile.astype(np.float64), stats, 1.0, 0.0)


@pytest.mark.parametrize("isa", ISAS)
def test_the_environment_overrides_the_instruction_set(isa: str) -> None:
    """The op itself runs on each, in a process of its own, and agrees with the reference."""
    code = """
import torch, ssl_kernels, ssl_kernels.functional as K
torch.manual_seed(0)
x, y = torch.randn(70, 9, requires_grad=True), torch.randn(45, 9)
ours = torch.autograd.grad(K.sigmoid_contrastive_loss(x, y, 2.0, -1.0), x)[0]
with ssl_kernels.use_backend("reference"):
    exact = torch.autograd.grad(K.sigmoid_contrastive_loss(x, y, 2.0, -1.0), x)[0]
torch.testing.assert_close(ours, exact)
print(ssl_kernels._C.active_isa())
"""
    result = run_python(code, SSL_KERNELS_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa


def test_an_unknown_instruction_set_is_reported_on_import() -> None:
    result = run_python("import ssl_kernels", SSL_KERNELS_ISA="mmx")
    assert result.returncode != 0
    assert "SSL_KERNELS_ISA: instruction set: got 'mmx', expected one of: baseline" in result.stderr
