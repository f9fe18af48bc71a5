"""The Triton kernel of the sigmoid loss in the strict interpreter, against the dense formula in float64.

The interpreter multiplies exactly what a GPU multiplies (16-bit operands as they are, fp32 cut to tf32 where that
is asked for), so the oracle is given the same operands and what is left is fp32 arithmetic: the bounds are tight.
Beside them stands the project's rule: an error of at most twice that of the eager formula in the same dtype, plus a
tolerance.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from panels import (
    DTYPES,
    IDS,
    NOWHERE,
    TINY,
    UNIT,
    assert_only_padding_is_overwritten,
    cut_to_tf32,
    features,
    make_ids,
    pair_masks,
    rows_far_apart,
    shipped,
    tile_with_padding,
)
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ssl_kernels.kernels import sigmoid
from ssl_kernels.kernels.configs import is_aligned
from ssl_kernels.kernels.sigmoid import CONFIGS, Config, gradient_scale, sigmoid_panel
from ssl_kernels.kernels.tiles import gradient_tile, operands, suited

pytestmark = pytest.mark.usefixtures("strict")


def dense(
    x: Tensor, y: Tensor, scale: Tensor, bias: Tensor, ids: tuple[Tensor, Tensor] | None, ignored: bool, diagonal: int
) -> tuple[Tensor, Tensor]:
    """G and the row sums of loss, G raw and G, in the dtype of the arguments."""
    raw = x @ y.t()
    z = scale.to(x.dtype) * raw + bias.to(x.dtype)
    positive, counted = pair_masks(*z.shape, ids, ignored, diagonal, NOWHERE)
    s = torch.where(positive, -z, z)
    loss = torch.where(counted, s.clamp(min=0) + torch.log1p(torch.exp(-s.abs())), 0)
    g = torch.where(positive, -torch.sigmoid(s), torch.sigmoid(s))
    g = torch.where(counted, g, 0)
    return g, torch.stack([loss.sum(1), torch.where(counted, g * raw, 0).sum(1), g.sum(1)], dim=1)


def check(
    x: Tensor,
    y: Tensor,
    *,
    scale: float = 10.0,
    bias: float = -10.0,
    ids: tuple[Tensor, Tensor] | None = None,
    ignore_same_id: bool = False,
    diagonal: int = 0,
    with_grad: bool = True,
    loss_only: bool = False,
    grad: Tensor | None = None,
    config: Config | None = None,
    is_tf32: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """Run one panel and compare all that it wrote; returns (G, stats)."""
    m, n = x.shape[0], y.shape[0]
    if grad is None and with_grad:
        grad = torch.empty(m, n, dtype=x.dtype)
    before = torch.rand(m, 1 if loss_only else 3, dtype=torch.float64)
    stats = before.clone()
    t, b = torch.tensor(scale), torch.tensor(bias)
    sigmoid_panel(x, y, grad, stats, t, b, *(ids or (None, None)), ignore_same_id, diagonal, config=config)

    exact_x, exact_y = (cut_to_tf32(x), cut_to_tf32(y)) if is_tf32 else (x, y)
    options = (ids, ignore_same_id, diagonal)
    want_g, want = dense(exact_x.double(), exact_y.double(), t.double(), b.double(), *options)
    eager_g, eager = dense(x, y, t, b, *options)
    got = stats - before
    # fp32 products of unit vectors err by 1e-7 or so; scale and bias magnify that in the exponent.
    z_error = 3e-7 * (scale + abs(bias))
    tolerance = (z_error + 4e-7) * torch.stack([want[:, 0], want_g.abs().sum(1), want_g.abs().sum(1)], 1) + 1e-14
    columns = 1 if loss_only else 3
    for k in range(columns):
        error, eager_error = (got[:, k] - want[:, k]).abs(), (eager[:, k].double() - want[:, k]).abs()
        assert (error <= tolerance[:, k]).all(), (k, (error / tolerance[:, k]).max())
        assert (error <= 2 * eager_error + tolerance[:, k]).all()
    if with_grad and not loss_only:
        assert grad is not None
        stored = grad.double() / gradient_scale(x.dtype)
        error, eager_error = (stored - want_g).abs(), (eager_g.double() - want_g).abs()
        bound = (z_error + 4e-7 + UNIT[x.dtype]) * want_g.abs() + TINY[x.dtype]
        assert (error <= bound).all(), (error / bound).max()
        assert (error <= 2 * eager_error + bound).all()
    return grad, got


@covering(1, config=shipped(CONFIGS, "half"), ids=IDS, dtype=[torch.bfloat16, torch.float16])
def test_every_config_in_16_bits(config, ids, dtype):
    m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 9
    check(
        features(m, d, dtype), features(n, d, dtype), config=config, diagonal=config.block_n // 2 - 3,
        ids=make_ids(ids, m, n), ignore_same_id=ids == "ignore",
    )  # fmt: skip


@covering(1, config=shipped(CONFIGS, "ieee"), ids=IDS)
def test_every_config_in_ieee_fp32(config, ids):
    m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 9
    check(
        features(m, d, torch.float32), features(n, d, torch.float32), config=config, diagonal=-3,
        ids=make_ids(ids, m, n), ignore_same_id=ids == "ignore",
    )  # fmt: skip


@pytest.mark.usefixtures("tf32")
@covering(1, config=shipped(CONFIGS, "tf32"), ids=IDS)
def test_every_config_in_tf32(config, ids):
    m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 9
    check(
        features(m, d, torch.float32), features(n, d, torch.float32), config=config, diagonal=4, is_tf32=True,
        ids=make_ids(ids, m, n), ignore_same_id=ids == "ignore",
    )  # fmt: skip


@pytest.mark.usefixtures("tf32")
@covering(1, kind=["half", "tf32"], ids=IDS)
def test_descriptors(kind, ids, monkeypatch):
    used = []
    monkeypatch.setattr(sigmoid, "operands", lambda *args: used.append(operands(*args)) or used[-1])
    dtype = torch.bfloat16 if kind == "half" else torch.float32
    for config in dict.fromkeys(c for c in shipped(CONFIGS, kind) if c.descriptors):
        m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 16
        tile = tile_with_padding(m, n, dtype)
        ids_of = make_ids(ids, m, n)
        check(
            features(m, d, dtype), features(n, d, dtype), config=config, diagonal=config.block_n // 2 - 3,
            ids=ids_of, ignore_same_id=ids == "ignore", grad=tile, is_tf32=kind == "tf32",
        )  # fmt: skip
        assert_only_padding_is_overwritten(tile)
        check(
            features(m, d, dtype), features(n, d, dtype), config=config, with_grad=False, loss_only=True,
            is_tf32=kind == "tf32",
        )  # fmt: skip
    assert used
    assert all(isinstance(x, TensorDescriptor) for operand in used for x in operand if x is not None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 7, 16, 33])
def test_rows_of_a_gradient_tile_end_in_padding(dtype, columns):
    tile = gradient_tile(torch.zeros(3, 5, dtype=dtype), columns)
    assert (tile.shape, tile.dtype) == ((3, columns), dtype)
    assert is_aligned(tile)
    whole = -(-columns * tile.itemsize // 16) * 16  # bytes that a row's store writes
    assert tile.stride(0) * tile.itemsize >= whole
    assert tile.untyped_storage().nbytes() >= 2 * tile.stride(0) * tile.itemsize + whole


@pytest.mark.parametrize("shape", ["upon each other", "empty"])
def test_rows_that_cannot_be_described(shape):
    x = torch.zeros(1, 64).expand(40, 64) if shape == "upon each other" else torch.zeros(40, 64)[:, :0]
    config = next(c for c in shipped(CONFIGS, "tf32") if c.descriptors)
    assert not suited(config, x, x).descriptors
    assert operands(suited(config, x, x), x, x, None)[0] is x


@pytest.mark.parametrize("bias", [10.0, 40.0, 80.0, -80.0])
def test_rows_whose_product_is_beyond_the_range(bias):
    m, n = 70, 130  # 130 factors of 1 + exp(10) are beyond fp32, and so are two of 1 + exp(80)
    x, y = features(m, 8, torch.float32), features(n, 8, torch.float32)
    x[3] = 0
    check(x, y, scale=5.0, bias=bias)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_products_follow_the_matmul_precision(precision):
    torch.set_float32_matmul_precision(precision)
    try:
        check_products_are_tf32(precision != "highest")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_fp32_products_follow_the_newer_setting(precision):
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        check_products_are_tf32(precision == "tf32")
    finally:
        torch.set_float32_matmul_precision("highest")


def check_products_are_tf32(is_tf32: bool) -> None:
    x, y = features(40, 70, torch.float32), features(50, 70, torch.float32)
    check(x, y, is_tf32=is_tf32)
    with pytest.raises(AssertionError):
        check(x, y, is_tf32=not is_tf32)


@covering(
    1,
    size=[(1, 1, 1), (3, 17, 5), (17, 3, 64), (65, 130, 33), (130, 65, 1), (64, 64, 64), (5, 7, 0)],
    dtype=DTYPES,
    ids=IDS,
)
def test_sizes(size, dtype, ids):
    m, n, d = size
    check(features(m, d, dtype), features(n, d, dtype), ids=make_ids(ids, m, n), ignore_same_id=ids == "ignore")


@covering(1, diagonal=[1, -1, 63, -64, 129, 130, -69, -70, 131, 2**31, -(2**31), 2**63 - 1, -(2**63)], ids=IDS)
def test_diagonals(diagonal, ids):
    m, n = 70, 130
    x, y = features(m, 8, torch.float32), features(n, 8, torch.float32)
    check(x, y, diagonal=diagonal, ids=make_ids(ids, m, n), ignore_same_id=ids == "ignore")


@pytest.mark.parametrize("ignore_same_id", [False, True])
@pytest.mark.parametrize("values", [1, 10**6])
def test_all_ids_equal_and_all_distinct(values, ignore_same_id):
    m, n = 20, 70
    x, y = features(m, 16, torch.float32), features(n, 16, torch.float32)
    check(x, y, ids=make_ids("some", m, n, values), ignore_same_id=ignore_same_id, diagonal=50)


@pytest.mark.parametrize("diagonal", [1000, 69])
def test_nothing_is_left_of_ignored_pairs_even_if_they_are_nan(diagonal):
    x, y = features(5, 16, torch.bfloat16), features(70, 16, torch.bfloat16)
    x[2] = float("nan")
    ids = torch.full((5,), 7), torch.full((70,), 7)
    grad, stats = torch.empty(5, 70, dtype=torch.bfloat16), torch.zeros(5, 3, dtype=torch.float64)
    sigmoid_panel(x, y, grad, stats, torch.tensor(10.0), torch.tensor(0.0), *ids, True, diagonal)
    if diagonal == 69:  # all that is counted is the first row's positive, in the last column
        assert (stats[0] != 0).all()
        assert grad[0, 69] < 0
        grad[0, 69] = 0
        stats[0] = 0
    assert not grad.any()
    assert not stats.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(dtype):
    m, n, d = 37, 41, 19
    transposed = features(d, m, dtype).t()
    every_other = torch.randn(n, 2 * d + 3).to(dtype)[:, 1::2][:, :d]
    spaced_rows = torch.randn(3 * n, d).to(dtype)[::3]
    one_row = features(1, d, dtype).expand(m, d)
    for x, y in itertools.product([transposed, one_row], [every_other * 0.2, spaced_rows * 0.2]):
        check(x, y)
    for y in (every_other, spaced_rows):  # as they are, not copied by the product above
        check(transposed, y, scale=1.0, bias=-1.0)


def test_only_the_tile_of_a_wide_gradient_buffer_is_written():
    m, n = 66, 70
    buffer = torch.full((m + 2, 128), 7.0)
    check(features(m, 8, torch.float32), features(n, 8, torch.float32), grad=buffer[1 : m + 1, 5 : n + 5])
    buffer[1 : m + 1, 5 : n + 5] = 7.0
    assert (buffer == 7.0).all()


@covering(1, ids=IDS, dtype=DTYPES)
def test_only_what_is_wanted(dtype, ids):
    m, n = 33, 67
    x, y = features(m, 24, dtype), features(n, 24, dtype)
    options = {"ids": make_ids(ids, m, n), "ignore_same_id": ids == "ignore", "diagonal": 9}
    _, full = check(x, y, **options)
    _, sums = check(x, y, with_grad=False, **options)
    _, loss = check(x, y, loss_only=True, with_grad=False, **options)
    untouched = torch.full((m, n), 7.0, dtype=dtype)
    check(x, y, loss_only=True, grad=untouched, **options)
    assert (untouched == 7).all()
    torch.testing.assert_close(sums, full, rtol=0, atol=1e-14)
    torch.testing.assert_close(loss[:, 0], full[:, 0], rtol=0, atol=1e-14)


@covering(1, where=["row", "column"], ids=IDS)
def test_nan_features_give_nan_and_only_where_they_belong(where, ids):
    m, n = 20, 70
    x, y = features(m, 12, torch.float32), features(n, 12, torch.float32)
    pair = make_ids(ids, m, n, 10**6) or (None, None)
    (x if where == "row" else y)[3, 5] = float("nan")
    grad, stats = torch.empty(m, n), torch.zeros(m, 3, dtype=torch.float64)
    sigmoid_panel(x, y, grad, stats, torch.tensor(10.0), torch.tensor(-10.0), *pair, ids == "ignore", 0)
    touched = torch.zeros(m, n, dtype=torch.bool)
    touched[(3, slice(None)) if where == "row" else (slice(None), 3)] = True
    assert torch.equal(grad.isnan(), touched)
    assert torch.equal(stats.isnan(), touched.any(1, keepdim=True).expand(m, 3))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's word for the infinities meant here
@pytest.mark.parametrize("n", [64, 70])
def test_infinite_logits_saturate(n):
    x, y = torch.tensor([[1e30]]), torch.full((n, 1), 1e30)
    y[1::2] *= -1
    grad, stats = torch.empty(1, n), torch.zeros(1, 1, dtype=torch.float64)
    sigmoid_panel(x, y, None, stats, torch.tensor(1.0), torch.tensor(0.0), None, None, False, 1000)
    assert stats.item() == float("inf")
    stats = torch.zeros(1, 3, dtype=torch.float64)
    sigmoid_panel(x, y, grad, stats, torch.tensor(1.0), torch.tensor(0.0), None, None, False, 1000)
    assert torch.equal(grad, (y.t() > 0).float())
    assert stats[0, 2] == grad.sum()


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
@pytest.mark.parametrize("n", [64, 70])
def test_infinite_features_give_what_the_formula_gives(n):
    """In the columns that only fill the last tile, infinity meets zero."""
    x, y = torch.tensor([[float("inf")]]), torch.ones(n, 1)
    grad, stats = torch.empty(1, n), torch.zeros(1, 3, dtype=torch.float64)
    sigmoid_panel(x, y, grad, stats, torch.tensor(1.0), torch.tensor(0.0), None, None, False, 1000)
    assert (grad == 1).all()
    assert stats[0].tolist() == [float("inf"), float("inf"), n]


@covering(1, scale=[0.0, 1.0, 60.0, 100.0, 3000.0], dtype=DTYPES)
def test_scales(dtype, scale):
    """Up to what makes every pair confident: relative precision holds for the smallest of the losses."""
    x, y = features(20, 32, dtype), features(30, 32, dtype)
    check(x, y, scale=scale, bias=-0.5 * scale)
    check(x, x, scale=scale, bias=-0.5 * scale)


@pytest.mark.parametrize("z", [-87.0, -60.0, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 20.0, 60.0, 87.0])
@pytest.mark.parametrize("positive", [False, True])
def test_confident_pairs_keep_their_relative_precision(z, positive):
    """A loss of e^-60 is e^-60, not zero and not what is left of 60 - 60."""
    one = torch.ones(1, 1)
    grad, stats = torch.empty(1, 1), torch.zeros(1, 3, dtype=torch.float64)
    sigmoid_panel(one, one, grad, stats, torch.tensor(z), torch.tensor(0.0), None, None, False, 0 if positive else 1)
    s = -z if positive else z
    exact = torch.tensor(float(torch.tensor(s)), dtype=torch.float64)
    loss, sigma = F.softplus(exact, threshold=1e9), torch.sigmoid(exact)
    sign = -1 if positive else 1
    torch.testing.assert_close(stats[0], torch.stack([loss, sign * sigma, sign * sigma]), rtol=8e-6, atol=0)
    torch.testing.assert_close(grad[0, 0].double(), sign * sigma, rtol=8e-6, atol=0)


def test_offsets_beyond_32_bits():
    m, n, d = 4, 3, 5
    x = rows_far_apart(m, d).copy_(features(m, d, torch.bfloat16))
    check(x, features(n, d, torch.bfloat16))
    check(features(n, d, torch.bfloat16), x, with_grad=False)
    check(features(m, d, torch.bfloat16), features(n, d, torch.bfloat16), grad=rows_far_apart(m, n))


def test_results_are_reproducible_bit_by_bit_and_independent_of_panels():
    m, n = 100, 150
    x, y = features(m, 24, torch.float32), features(n, 24, torch.float32)
    scale, bias = torch.tensor(10.0), torch.tensor(-10.0)

    def whole() -> tuple[Tensor, Tensor]:
        grad, stats = torch.empty(m, n), torch.zeros(m, 3, dtype=torch.float64)
        sigmoid_panel(x, y, grad, stats, scale, bias, None, None, False, 7)
        return grad, stats

    grad, stats = whole()
    again = whole()
    assert torch.equal(grad, again[0])
    assert torch.equal(stats, again[1])
    pieces, sums = torch.empty(m, n), torch.zeros(m, 3, dtype=torch.float64)
    for i, j in itertools.product(range(0, m, 50), range(0, n, 70)):
        rows, cols = slice(i, i + 50), slice(j, j + 70)
        sigmoid_panel(x[rows], y[cols], pieces[rows, cols], sums[rows], scale, bias, None, None, False, 7 + i - j)
    # NumPy sums a product in an order that depends on its shape; on a GPU the tile decides.
    torch.testing.assert_close(pieces, grad, rtol=1e-5, atol=0)
    torch.testing.assert_close(sums, stats, rtol=1e-5, atol=1e-9)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    d=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(IDS),
    values=st.integers(1, 100),
    diagonal=st.integers(-100, 100),
    scale=st.floats(0, 100, width=32),
    bias=st.floats(-20, 20, width=32),
    seed=st.integers(0, 2**31),
)
def test_any_panel(m, n, d, dtype, kind, values, diagonal, scale, bias, seed):
    torch.manual_seed(seed)
    check(
        features(m, d, dtype), features(n, d, dtype), scale=scale, bias=bias, diagonal=diagonal,
        ids=make_ids(kind, m, n, values), ignore_same_id=kind == "ignore",
    )  # fmt: skip
