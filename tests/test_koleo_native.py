"""The torch-free kernels of the search for nearest neighbours on NumPy arrays, on every instruction set here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python

native = pytest.importorskip("ssl_kernels._native", reason="the wheel was built by another version of Python")
ISAS = native.build_info()["available_isas"]


def start(size: int) -> tuple[np.ndarray, np.ndarray]:
    return np.full(size, -np.inf, np.float32), np.full(size, -1, np.int64)


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.integers(0, 40),
    cols=st.integers(0, 300),
    gap=st.integers(0, 5),
    values=st.sampled_from([2, 50, 10**6]),
    seed=st.integers(0, 2**16),
)
def test_rows_and_columns_of_a_tile(isa: str, rows: int, cols: int, gap: int, values: int, seed: int) -> None:
    """The first of equals wins, among few values as among many; what lies between the rows is not read."""
    rng = np.random.default_rng(seed)
    buffer = np.full((rows, cols + gap), np.inf, np.float32)
    tile = buffer[:, :cols]
    tile[:] = rng.integers(-values, values, (rows, cols))
    best, neighbor = start(rows + 3 + cols)
    native.koleo_panel(tile, best, neighbor, 1, rows + 3, isa=isa)
    expected, whose = start(rows + 3 + cols)
    if rows and cols:
        expected[1 : 1 + rows], whose[1 : 1 + rows] = tile.max(1), rows + 3 + tile.argmax(1)
        expected[rows + 3 :], whose[rows + 3 :] = tile.max(0), 1 + tile.argmax(0)
    assert np.array_equal(best, expected)
    assert np.array_equal(neighbor, whose)


@pytest.mark.parametrize("isa", ISAS)
def test_a_later_tile_needs_a_larger_similarity(isa: str) -> None:
    best, neighbor = start(6)
    first, second = np.array([[5, 2], [3, 7]], np.float32), np.array([[5, 1], [4, 9]], np.float32)
    native.koleo_panel(first, best, neighbor, 0, 2, isa=isa)
    native.koleo_panel(second, best, neighbor, 0, 4, isa=isa)
    assert best.tolist() == [5, 9, 5, 7, 5, 9]
    assert neighbor.tolist() == [2, 5, 0, 1, 0, 1]


@pytest.mark.parametrize("isa", ISAS)
def test_a_tile_on_the_diagonal_is_searched_along_its_rows_only(isa: str) -> None:
    best, neighbor = start(3)
    tile = np.array([[7, 1, 2], [8, 9, 3], [9, 4, 10]], np.float32)
    native.koleo_panel(tile, best, neighbor, 0, 0, isa=isa)
    assert best.tolist() == [2, 8, 9]
    assert neighbor.tolist() == [2, 0, 0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("cols", [1, 5, 64, 131])
def test_nan_and_minus_infinity_are_never_taken(isa: str, cols: int) -> None:
    best, neighbor = start(2 + cols)
    tile = np.full((2, cols), -np.inf, np.float32)
    tile[0] = np.nan
    native.koleo_panel(tile, best, neighbor, 0, 2, isa=isa)
    assert (best == -np.inf).all()
    assert (neighbor == -1).all()
    tile[1, -1] = -3e38
    native.koleo_panel(tile, best, neighbor, 0, 2, isa=isa)
    assert neighbor.tolist() == [-1, 1 + cols, *[-1] * (cols - 1), 1]


def test_bad_arrays_are_named() -> None:
    tile, (best, neighbor) = np.zeros((2, 3), np.float32), start(5)
    for arguments, message in (
        ((tile[:, ::2], best, neighbor, 0, 2), "tile: expected unit stride along columns, got 2"),
        ((tile, best, neighbor[:4], 0, 2), "neighbor: expected size 5 in dimension 0, got 4"),
        ((tile, best[::2], neighbor[:3], 0, 2), "best: expected a contiguous tensor"),
        ((tile, best, neighbor, 4, 2), "first_row: expected 0 to 3, got 4"),
        ((tile, best, neighbor, 0, -1), "first_col: expected 0 to 2, got -1"),
        ((tile, best, neighbor, 1, 1), "tile: expected a square one on the diagonal, got 2 rows and 3 columns"),
    ):
        with pytest.raises(ValueError, match=message):
            native.koleo_panel(*arguments)
    with pytest.raises(ValueError, match="tile: expected dtype Float, got Double"):
        native.koleo_panel(tile.astype(np.float64), best, neighbor, 0, 2)


@pytest.mark.parametrize("isa", ISAS)
def test_the_op_itself_on_each_instruction_set(isa: str) -> None:
    code = """
import torch, ssl_kernels, ssl_kernels.functional as K
torch.manual_seed(0)
x = torch.randn(700, 9, requires_grad=True)
ours = torch.autograd.grad(K.koleo_loss(x), x)[0]
with ssl_kernels.use_backend("reference"):
    exact = torch.autograd.grad(K.koleo_loss(x), x)[0]
torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-6)
print(ssl_kernels._C.active_isa())
"""
    result = run_python(code, SSL_KERNELS_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa
