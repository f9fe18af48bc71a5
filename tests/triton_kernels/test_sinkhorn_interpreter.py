"""The Triton kernels of teacher assignments in the strict interpreter, against the dense formulas in float64."""

from __future__ import annotations

import pytest
import torch
from covering import covering
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from panels import DTYPES, rows_far_apart
from torch import Tensor

from ssl_kernels.kernels.sinkhorn import centered_softmax, column_lse, column_sums, row_stats

pytestmark = pytest.mark.usefixtures("strict")
INF, NAN = float("inf"), float("nan")


def dense(rows: Tensor, temp: float, center: Tensor | None) -> Tensor:
    return ((rows if center is None else rows - center) / temp).softmax(1)


def check(
    rows: Tensor,
    *,
    temp: float = 0.04,
    center: Tensor | None = None,
    splits: int | None = None,
    span: int | None = None,
) -> tuple[Tensor, ...]:
    tau = torch.tensor(temp)
    exact, temp = rows.double(), tau.item()
    some_center = torch.zeros(rows.shape[1]) if center is None else center

    p = centered_softmax(rows, tau, center, span=span)
    assert p.dtype == torch.float32
    assert p.is_contiguous()
    want = dense(exact, temp, None if center is None else center.double())
    eager = dense(rows.float(), temp, center)
    unit = 1e-6 + 2e-7 * (exact - some_center).abs().amax() / temp  # relative error of an exponential
    assert ((p - want).abs() <= unit * want + 1e-37).all()
    assert ((p - want).abs() <= 2 * (eager - want).abs() + unit * want + 1e-37).all()

    sums = column_sums(rows, tau, some_center, splits=splits)
    assert sums.dtype == torch.float32
    assert ((sums - want.sum(0)).abs() <= unit * want.sum(0) + 1e-36).all()
    assert ((sums - want.sum(0)).abs() <= 2 * (eager.sum(0) - want.sum(0)).abs() + unit * want.sum(0) + 1e-36).all()

    maximum, total = column_lse(rows, tau, splits=splits)
    assert maximum.dtype == total.dtype == torch.float32
    assert torch.equal(maximum, rows.amax(0).float())
    want_total = ((exact - exact.amax(0)) / temp).exp().sum(0)
    assert ((total - want_total).abs() <= 2e-6 * want_total).all()
    return p, sums, maximum, total


@covering(1, k=[1, 37, 1024, 2050, 4096, 4112, 8192], dtype=DTYPES, has_center=[False, True])
def test_dtypes_and_widths(dtype, k, has_center):
    check(torch.randn(11, k).to(dtype), center=torch.randn(k) if has_center else None)


@covering(1, n=[1, 7, 8, 9, 65], splits=[3, 1, 1000])
def test_any_number_of_splits(n, splits):
    rows = torch.randn(n, 33) + torch.linspace(-3, 3, n)[:, None]  # maxima that rise from split to split
    check(rows, splits=splits)
    check(rows.flip(0), splits=splits, center=torch.randn(33))


def test_more_blocks_than_are_merged_at_a_time():
    k = 17 * 1024 + 1
    check(torch.randn(2, k) + torch.linspace(-2, 2, k), center=torch.randn(k))


@pytest.mark.parametrize("span", [1, 2, 100])
def test_rows_of_a_program_change_nothing(span):
    torch.manual_seed(1)
    rows = torch.randn(9, 1500)
    assert torch.equal(check(rows, span=span)[0], check(rows)[0])


def test_the_same_bits_again():
    torch.manual_seed(2)
    rows, center = torch.randn(70, 300), torch.randn(300)
    for first, second in zip(check(rows, center=center), check(rows, center=center), strict=True):
        assert torch.equal(first, second)


@covering(1, temp=[0.007, 0.04, 1.0, 100.0], dtype=DTYPES)
def test_temperatures(temp, dtype):
    check((3 * torch.randn(20, 65)).to(dtype), temp=temp, center=torch.randn(65))


@pytest.mark.parametrize("height", [-200.0, 200.0])
def test_heights_beyond_the_range_of_exp(height):
    """Of 5000 in units of the temperature. Rows and columns are at heights of their own."""
    rows = torch.randint(-64, 64, (20, 70)) / 16 + height * torch.linspace(0, 1, 20)[:, None].round()
    check(rows)
    check(rows + torch.linspace(0, 2 * height, 70).round(), center=torch.linspace(0, 2 * height, 70).round())


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_strides(dtype):
    n, k = 21, 48
    center = torch.randn(k)
    check(torch.randn(k, n).to(dtype).t(), center=center)
    check(torch.randn(3 * n, 2 * k).to(dtype)[::3, 1::2], center=center)
    check(torch.randn(n, 3 * k).to(dtype)[:, k : 2 * k], center=center)
    check(torch.randn(1, k).to(dtype).expand(n, k), center=center)
    check(torch.randn(n, 1).to(dtype).expand(n, k), center=center)


def test_offsets_beyond_32_bits():
    n, k = 4, 5
    near, far = torch.randn(n, k).bfloat16(), rows_far_apart(n, k)
    far.copy_(near)
    for a, b in ((far, near), (far.t(), near.t())):
        for first, second in zip(check(a), check(b), strict=True):
            assert torch.equal(first, second)
    temp = torch.tensor(0.5)
    for first, second in zip(row_stats([far[:, None]], temp, None), row_stats([near[None]], temp, None), strict=True):
        assert torch.equal(first, second)


def test_statistics_over_several_blocks():
    blocks = [torch.randn(2, 3, 1100), torch.randn(3, 1100, 1).mT.expand(3, 3, 1100), torch.randn(1, 3, 1100)]
    blocks.insert(2, torch.randn(0, 3, 1100))
    shift, reciprocal = row_stats(blocks, torch.tensor(0.5), None)
    for i, row in enumerate(torch.cat(blocks).flatten(0, 1)):
        p = torch.exp((row - shift[i]) / 0.5) * reciprocal[i]
        torch.testing.assert_close(p, (row / 0.5).softmax(0), rtol=1e-5, atol=0)


def test_no_rows():
    nothing, temp = torch.empty(0, 6), torch.tensor(1.0)
    maximum, total = column_lse(nothing, temp)
    assert torch.equal(maximum, torch.full((6,), -INF))
    assert torch.equal(total, torch.zeros(6))
    assert torch.equal(column_sums(nothing, temp, torch.zeros(6)), torch.zeros(6))
    assert centered_softmax(nothing, temp, None).shape == (0, 6)
    assert row_stats([nothing[None]], temp, None)[0].shape == (0,)


def test_prototypes_that_are_ruled_out():
    """A whole column, whole blocks of a row, and the first rows of a column."""
    rows = torch.randn(20, 2100)
    rows[:, 7] = rows[3, 1000:] = rows[4, :1030] = rows[:9, 11] = -INF
    temp = torch.tensor(0.1)
    p = dense(rows.double(), 0.1, None)
    torch.testing.assert_close(centered_softmax(rows, temp, None), p.float(), rtol=2e-5, atol=1e-37)
    torch.testing.assert_close(column_sums(rows, temp, torch.zeros(2100)), p.sum(0).float(), rtol=2e-5, atol=1e-37)
    for splits in (1, 3):
        maximum, total = column_lse(rows, temp, splits=splits)
        assert torch.equal(maximum, rows.amax(0))
        assert total[7] == 0
        lse = (rows.double() / 0.1).logsumexp(0)
        torch.testing.assert_close(maximum / 0.1 + total.log(), lse.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("splits", [1, 3])
def test_nan_comes_out_and_only_where_it_belongs(value, splits):
    rows, temp, center = torch.randn(20, 1100), torch.tensor(0.1), torch.zeros(1100)
    rows[13, 1050] = value
    p = centered_softmax(rows, temp, center)
    assert p.isnan().any(1).nonzero().tolist() == p.isnan().all(1).nonzero().tolist() == [[13]]
    assert column_lse(rows, temp, splits=splits)[1].isnan().nonzero().tolist() == [[1050]]
    assert column_sums(rows, temp, center, splits=splits).isnan().all()
    assert centered_softmax(rows[:9], temp, center.index_fill(0, torch.tensor(5), NAN)).isnan().all()
    assert column_sums(rows[:9], torch.tensor(NAN), center).isnan().all()
    assert column_lse(rows[:9], torch.tensor(NAN))[1].isnan().all()
    columns = rows[:, 1050:1051].repeat(1, 4)
    columns[:, 2] = NAN
    assert column_lse(columns, temp, splits=splits)[1].isnan().all()


def test_three_iterations_of_sinkhorn_knopp():
    """As the algorithm is written down, on the matrix itself."""
    rows, tau = torch.randn(40, 300).bfloat16(), 0.05
    temp = torch.tensor(tau)
    q = (rows.double() / temp.item()).exp()
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    maximum, total = column_lse(rows, temp)
    center = maximum + temp * total.log()
    for _ in range(2):
        center = center + temp * column_sums(rows, temp, center).log()
    torch.testing.assert_close(centered_softmax(rows, temp, center), q.float(), rtol=5e-5, atol=1e-30)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 70),
    k=st.one_of(st.integers(1, 80), st.integers(1000, 1100), st.integers(60, 70).map(lambda i: 16 * i)),
    dtype=st.sampled_from(DTYPES),
    temp=st.floats(0.01, 10),
    has_center=st.booleans(),
    transposed=st.booleans(),
    splits=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_any_rows(n, k, dtype, temp, has_center, transposed, splits, seed):
    torch.manual_seed(seed)
    rows = (torch.randn(k, n).t() if transposed else torch.randn(n, k)).to(dtype)
    check(rows, temp=temp, center=torch.randn(k) if has_center else None, splits=splits)
