"""The Triton kernels of the softmax losses in the strict interpreter, against dense formulas in float64.

The oracle is given the operands that the kernel multiplies (16-bit as they are, fp32 cut to tf32 where that is
asked for), so that what is left is fp32 arithmetic: the bounds are tight. Beside them stands the project's rule: an
error of at most twice that of the eager formula in fp32, plus the same tolerance.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
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

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.kernels.configs import CONFIGS, Config
from ssl_kernels.kernels.softmax_grad import gradient_scale, softmax_grad
from ssl_kernels.kernels.softmax_stats import softmax_stats
from ssl_kernels.kernels.tiles import operands

pytestmark = pytest.mark.usefixtures("strict")
INF = float("inf")


def empty_stats(size: int, width: int) -> Tensor:
    stats = torch.zeros(size, width, dtype=torch.float64)
    stats[:, 0] = -INF
    return stats


def some_stats(size: int, width: int) -> Tensor:
    """What an earlier panel may have left, or, in every third row, did not."""
    stats = torch.rand(size, width, dtype=torch.float64) * 5 + 1
    stats[::3] = empty_stats(len(stats[::3]), width)
    return stats


def lse_of(stats: Tensor, scale: float = 1.0) -> Tensor:
    return torch.where(stats[:, 1] == 0, -INF, scale * stats[:, 0] + stats[:, 1].log())


def dense_stats(raw: Tensor, scale: float, positive: Tensor, kept: Tensor) -> Tensor:
    """Log-sum-exp of the rows, and the sums that follow it, in the dtype of raw."""
    columns = [
        (raw * scale).masked_fill(~kept, -INF).logsumexp(1),
        raw.masked_fill(~positive, 0).sum(1),
        positive.sum(1).to(raw.dtype),
        raw.masked_fill(~kept, 0).sum(1),
        kept.sum(1).to(raw.dtype),
    ]
    return torch.stack(columns, dim=1)


def check_stats(
    x: Tensor,
    y: Tensor,
    *,
    scale: float = 10.0,
    ids: tuple[Tensor, Tensor] | None = None,
    ignore_same_id: bool = False,
    positive: int = 0,
    excluded: int = NOWHERE,
    width: int = 4,
    with_cols: bool = True,
    config: Config | None = None,
    is_tf32: bool = False,
) -> None:
    m, n = x.shape[0], y.shape[0]
    running = [some_stats(m, width), some_stats(n, width) if with_cols else None]
    before = [None if r is None else r.clone() for r in running]
    options = (*(ids or (None, None)), ignore_same_id, positive, excluded)
    softmax_stats(x, y, *running, torch.tensor(scale), *options, config=config)

    is_positive, kept = pair_masks(m, n, ids, ignore_same_id, positive, excluded)
    exact = (cut_to_tf32(x) if is_tf32 else x).double() @ (cut_to_tf32(y) if is_tf32 else y).double().t()
    eager = x.float() @ y.float().t()
    z_error = 3e-7 * abs(scale) * exact.abs().max().item() + 1e-6
    norms = 2e-7 * (x.double().norm(dim=1).max() * y.double().norm(dim=1).max()).item()
    for after, start, transposed in zip(running, before, (False, True), strict=True):
        if after is None or start is None:
            continue
        masks = (is_positive.t(), kept.t()) if transposed else (is_positive, kept)
        want = dense_stats(exact.t() if transposed else exact, float(torch.tensor(scale)), *masks)
        rough = dense_stats(eager.t() if transposed else eager, scale, *masks).double()
        assert not after.isnan().any()
        # The maximum, and with it the sum, is a matter of choice within bounds.
        assert ((after[:, 1] > 0) == (after[:, 0] > -INF)).all()
        lse = torch.logaddexp(lse_of(start, scale), want[:, 0])
        same = lse == lse_of(after, scale)  # -inf included
        error = (lse_of(after, scale) - lse).abs().masked_fill(same, 0)
        rough_error = (torch.logaddexp(lse_of(start, scale), rough[:, 0]) - lse).abs().masked_fill(same, 0)
        assert (error <= z_error).all(), (error / z_error).max()
        assert (error <= 2 * rough_error + z_error).all()
        for k in (2, 4)[: width // 2 - 1]:
            error = (after[:, k] - start[:, k] - want[:, k - 1]).abs()
            scope = masks[k // 4]
            tolerance = 1e-6 * ((exact.t() if transposed else exact).abs() * scope).sum(1) + norms * scope.sum(1)
            assert (error <= tolerance).all(), (k, (error / tolerance).max())
            assert torch.equal((after[:, k + 1] - start[:, k + 1]).round(decimals=9), want[:, k])


def share_of(kept: Tensor, scale: float, lse: Tensor, weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maxima, and weights over the sums of exponentials against them: log-sum-exps as the kernel takes them."""
    top = kept.amax(dim).masked_fill(weight == 0, 0).float()
    return top, torch.where(weight == 0, 0, weight * torch.exp(scale * top.double() - lse)).float()


def check_grad(
    x: Tensor,
    y: Tensor,
    *,
    scale: float = 10.0,
    ids: tuple[Tensor, Tensor] | None = None,
    ignore_same_id: bool = False,
    positive: int = 0,
    excluded: int = NOWHERE,
    uniform: bool = True,
    with_grad: bool = True,
    grad: Tensor | None = None,
    lse: tuple[Tensor, Tensor] | None = None,
    config: Config | None = None,
    is_tf32: bool = False,
) -> tuple[Tensor | None, Tensor]:
    """Run one panel and compare all that it wrote; returns (G, stats)."""
    m, n = x.shape[0], y.shape[0]
    is_positive, kept = pair_masks(m, n, ids, ignore_same_id, positive, excluded)
    exact = (cut_to_tf32(x) if is_tf32 else x).double() @ (cut_to_tf32(y) if is_tf32 else y).double().t()
    eager = x.float() @ y.float().t()
    t = float(torch.tensor(scale))
    z = (t * exact).masked_fill(~kept, -INF)
    # The rows and columns have more pairs than those of this panel.
    row_lse, col_lse = lse or ((z.logsumexp(1) + torch.rand(m)).float(), (z.logsumexp(0) + torch.rand(n)).float())
    vectors = {
        "row_weight": (2 * torch.rand(m) - 1) * (row_lse > -INF),
        "col_weight": (2 * torch.rand(n) - 1) * (col_lse > -INF),
        "row_target": torch.rand(m) / 2,
        "col_target": torch.rand(n) / 2,
        "row_uniform": torch.rand(m) / 2 if uniform else None,
        "col_uniform": torch.rand(n) / 2 if uniform else None,
    }
    if grad is None and with_grad:
        grad = torch.empty(m, n, dtype=x.dtype)
    before = torch.rand(m, 1, dtype=torch.float64)
    stats = before.clone()
    options = (*(ids or (None, None)), ignore_same_id, positive, excluded)
    given = {k: v for k, v in vectors.items() if "weight" not in k}
    for side, lse_of_side, dim in (("row", row_lse, 1), ("col", col_lse, 0)):
        top, share = share_of(exact.masked_fill(~kept, -INF), t, lse_of_side, vectors[f"{side}_weight"], dim)
        given |= {f"{side}_top": top, f"{side}_share": share}
    softmax_grad(x, y, grad, stats, torch.tensor(scale), *options, **given, config=config)

    def terms(raw: Tensor) -> list[Tensor]:
        kind = raw.dtype
        row, col = (
            {k[4:]: v.to(kind) for k, v in vectors.items() if v is not None and k[:3] == s} for s in ("row", "col")
        )
        z = raw * t
        made = [
            (row["weight"] * torch.ones(n, 1, dtype=kind)).t() * (z - row_lse.to(kind)[:, None]).exp(),
            col["weight"] * torch.ones(m, 1, dtype=kind) * (z - col_lse.to(kind)).exp(),
            -(row["target"][:, None] + col["target"]) * is_positive,
        ]
        if uniform:
            made.append(-(row["uniform"][:, None] + col["uniform"]).expand(m, n))
        made[0] = torch.where((row["weight"] == 0)[:, None], 0, made[0])  # whatever the log-sum-exp is
        made[1] = torch.where(col["weight"] == 0, 0, made[1])
        return [torch.where(kept, term, 0) for term in made]

    row_term, col_term, *others = terms(exact)
    want = row_term + col_term + sum(others)
    rough = sum(terms(eager)).double()
    finite = [v[v.isfinite()].abs().max().item() if v.isfinite().any() else 0.0 for v in (row_lse, col_lse)]
    z_error = 3e-7 * (abs(t) * exact.abs().max().item() + max(finite)) + 4e-7
    # A product of two factors, one of them at most 2^60, whose other may be flushed to zero.
    g_error = z_error * (row_term.abs() + col_term.abs()) + 4e-7 * sum(term.abs() for term in others) + 2**-65 * kept
    bound = g_error + UNIT[x.dtype] * want.abs() + TINY[x.dtype] / gradient_scale(x.dtype)
    if with_grad:
        assert grad is not None
        error = (grad.double() / gradient_scale(x.dtype) - want).abs()
        assert (error <= bound).all(), (error / bound).max()
        assert (error <= 2 * (rough - want).abs() + bound).all()
    got = (stats - before)[:, 0]
    want_sum = (want * exact.masked_fill(~kept, 0)).sum(1)
    tolerance = ((g_error + 4e-7 * want.abs()) * exact.abs()).sum(1) + 3e-7 * want.abs().sum(1) + 1e-14
    error = (got - want_sum).abs()
    assert (error <= tolerance).all(), (error / tolerance).max()
    return grad, stats - before


def check(x: Tensor, y: Tensor, **options: object) -> None:
    check_stats(x, y, width=6, **options)
    check_grad(x, y, **options)


@covering(1, config=shipped(CONFIGS, "half"), kind=[(torch.float16, "none"), (torch.bfloat16, "positive")])
def test_every_config_in_16_bits(config, kind):
    dtype, ids = kind
    m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 9
    check(
        features(m, d, dtype), features(n, d, dtype), config=config, positive=config.block_n // 2 - 3, excluded=4,
        ids=make_ids(ids, m, n), ignore_same_id=ids == "ignore",
    )  # fmt: skip


@pytest.mark.parametrize("config", shipped(CONFIGS, "ieee"), ids=str)
def test_every_config_in_ieee_fp32(config):
    m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 9
    check(
        features(m, d, torch.float32), features(n, d, torch.float32), config=config, positive=-3, excluded=60,
        ids=make_ids("ignore", m, n), ignore_same_id=True,
    )  # fmt: skip


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("config", shipped(CONFIGS, "tf32"), ids=str)
def test_every_config_in_tf32(config):
    m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 9
    check(
        features(m, d, torch.float32), features(n, d, torch.float32), config=config, positive=4, excluded=-2,
        ids=make_ids("ignore", m, n), ignore_same_id=True, is_tf32=True,
    )  # fmt: skip


@pytest.mark.parametrize("ids", ["none", "positive"])
def test_descriptors(ids, monkeypatch):
    used = []
    for module in ("softmax_stats", "softmax_grad"):
        seen = f"ssl_kernels.kernels.{module}.operands"
        monkeypatch.setattr(seen, lambda *args: used.append(operands(*args)) or used[-1])
    for config in dict.fromkeys(c for c in shipped(CONFIGS, "half") if c.descriptors):
        m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 16
        x, y = features(m, d, torch.bfloat16), features(n, d, torch.bfloat16)
        options = {"config": config, "positive": config.block_n // 2 - 3, "excluded": 4, "ids": make_ids(ids, m, n)}
        tile = tile_with_padding(m, n, torch.bfloat16)
        check_stats(x, y, width=6, **options)
        check_grad(x, y, grad=tile, **options)
        assert_only_padding_is_overwritten(tile)
    assert used
    assert all(isinstance(x, TensorDescriptor) for operand in used for x in operand if x is not None)


@covering(
    1,
    size=[(1, 1, 1), (3, 17, 5), (17, 3, 64), (65, 130, 33), (64, 64, 64)],
    kind=[*itertools.product(DTYPES, ["none"]), *itertools.product([torch.float32], IDS[1:])],
)
def test_sizes(size, kind):
    (m, n, d), (dtype, ids) = size, kind
    check(features(m, d, dtype), features(n, d, dtype), ids=make_ids(ids, m, n), ignore_same_id=ids == "ignore")


MEETING = [(1, 0), (0, 0), (63, -64)]
PASSING_BY = [(129, 130), (-69, 129), (130, -70), (-70, -69), (2**31, 7), (9, -(2**63)), (2**63 - 1, 1)]


@covering(1, diagonals=[*MEETING, *PASSING_BY], ids=IDS)
def test_diagonals(diagonals, ids):
    (positive, excluded), m, n = diagonals, 70, 130
    x, y = features(m, 8, torch.float32), features(n, 8, torch.float32)
    check(x, y, positive=positive, excluded=excluded, ids=make_ids(ids, m, n), ignore_same_id=ids == "ignore")


@covering(2, ids=IDS, width=[4, 6], with_cols=[False, True])
def test_only_the_statistics_that_are_wanted(with_cols, width, ids):
    m, n = 33, 67
    x, y = features(m, 24, torch.float32), features(n, 24, torch.float32)
    options = {"ids": make_ids(ids, m, n), "ignore_same_id": ids == "ignore", "positive": 9, "excluded": 3}
    check_stats(x, y, width=width, with_cols=with_cols, **options)


@covering(1, ids=IDS, uniform=[False, True])
def test_only_the_gradients_that_are_wanted(uniform, ids):
    m, n = 33, 67
    x, y = features(m, 24, torch.bfloat16), features(n, 24, torch.bfloat16)
    options = {"ids": make_ids(ids, m, n), "ignore_same_id": ids == "ignore", "positive": 9, "excluded": 3}
    for with_grad in (True, False):
        check_grad(x, y, uniform=uniform, with_grad=with_grad, **options)


@covering(1, dtype=DTYPES, scale=[0.0, 1.0, 100.0, 3000.0])
def test_rows_and_columns_that_are_far_below_their_tile(scale, dtype):
    """At 3000 nearly every row and column underflows against the largest logit of its tile."""
    x, y = features(40, 32, dtype), features(75, 32, dtype)
    y[:30] = x[:30]
    check(x, y, scale=scale)
    check_stats(x, y, scale=scale, with_cols=False)


def test_a_negative_scale_is_nan():
    stats = empty_stats(5, 4)
    x = features(5, 8, torch.float32)
    softmax_stats(x, x, stats, None, torch.tensor(-1.0), None, None, False, 0, NOWHERE)
    assert stats[:, 1].isnan().all()


def test_logits_of_random_features_at_a_temperature_of_a_hundredth():
    x, y = features(70, 384, torch.bfloat16), features(66, 384, torch.bfloat16)
    check(x, y, scale=100.0)
    check(x, x[:66], scale=100.0, excluded=0, positive=1)


@covering(1, which=["row", "col"], far=[50.0, 80.0, 300.0])
def test_one_row_or_column_is_far_below_the_others(which, far):
    """Just within, just beyond and far beyond what one exponential can serve."""
    x, y = torch.ones(66, 1), torch.ones(70, 1)
    y[::2] *= -1
    lonely = x if which == "row" else y
    lonely[5] = 0
    check_stats(x, y, scale=far)
    lse = torch.full((66,), far), torch.full((70,), far)
    lse[which == "col"][5] = 0
    x[lse[0] == 0], y[lse[1] == 0] = 0.0, 0.0
    check_grad(x, y, scale=far, lse=lse, uniform=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_softmax_that_is_spread_over_many_keeps_its_relative_precision(dtype):
    """Probabilities of 2^-30 would be nothing in fp16 as they are."""
    x, y = features(20, 16, dtype), features(30, 16, dtype)
    lse = torch.full((20,), 12.0 + 20.0), torch.full((30,), 12.0 + 20.5)
    check_grad(x, y, lse=lse, positive=NOWHERE, uniform=False)


@pytest.mark.parametrize("positive", [NOWHERE, 69])
def test_nothing_is_left_of_ignored_pairs_even_if_they_are_nan(positive):
    m, n = 5, 70
    x, y = features(m, 16, torch.bfloat16), features(n, 16, torch.bfloat16)
    x[2] = float("nan")
    ids = torch.full((m,), 7), torch.full((n,), 7)
    rows, cols = empty_stats(m, 6), empty_stats(n, 6)
    scale = torch.tensor(10.0)
    softmax_stats(x, y, rows, cols, scale, *ids, True, positive, NOWHERE)
    tops, shares = (torch.zeros(m), torch.zeros(n)), (torch.zeros(m), torch.zeros(n))
    if positive == 69:  # all that is kept is the first row's positive, in the last column
        raw = (x[0].double() @ y[69].double()).item()
        for stats, at in ((rows, 0), (cols, 69)):
            want = torch.tensor([raw, 1, raw, 1, raw, 1], dtype=torch.float64)
            torch.testing.assert_close(stats[at], want, rtol=1e-6, atol=1e-6)
            stats[at] = empty_stats(1, 6)[0]
        tops[0][0] = tops[1][69] = raw
        shares[0][0] = shares[1][69] = 1.0
    assert torch.equal(rows, empty_stats(m, 6))
    assert torch.equal(cols, empty_stats(n, 6))
    grad, stats = torch.empty(m, n, dtype=torch.bfloat16), torch.zeros(m, 1, dtype=torch.float64)
    vectors = (*tops, *shares, torch.rand(m), torch.rand(n), torch.rand(m), torch.rand(n))
    softmax_grad(x, y, grad, stats, scale, *ids, True, positive, NOWHERE, *vectors)
    if positive == 69:
        assert grad[0, 69] != 0
        grad[0, 69], stats[0] = 0, 0
    assert not grad.any()
    assert not stats.any()


@pytest.mark.parametrize("spread", [0.0, 100.0])
def test_a_row_without_any_kept_pair_takes_no_part(spread):
    """Weight 0 means no row term, not 0 times infinity, whatever the others are."""
    x, y = features(6, 8, torch.float32), features(7, 8, torch.float32)
    row_lse, col_lse = torch.full((6,), -INF), 12 + torch.rand(7) * spread
    check_grad(x, y, lse=(row_lse, col_lse), uniform=False)
    row_lse[::2] = 12 - torch.rand(3) * 0.1
    check_grad(x, y, lse=(row_lse, col_lse), uniform=False)
    check_grad(y, x, lse=(col_lse, row_lse), uniform=False)


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@covering(1, where=["row", "column"], ids=IDS)
def test_nan_features_give_nan_and_only_where_they_belong(where, ids):
    m, n = 20, 70
    x, y = features(m, 12, torch.float32), features(n, 12, torch.float32)
    pair = make_ids(ids, m, n, 10**6) or (None, None)
    (x if where == "row" else y)[3, 5] = float("nan")
    touched = torch.zeros(m, n, dtype=torch.bool)
    touched[(3, slice(None)) if where == "row" else (slice(None), 3)] = True
    for cols in (empty_stats(n, 6), None):
        rows = empty_stats(m, 6)
        softmax_stats(x, y, rows, cols, torch.tensor(10.0), *pair, ids == "ignore", 0, 1)
        kept = touched.clone()
        kept[range(m), range(1, m + 1)] = False
        for stats, want in ((rows, kept.any(1)), (cols, kept.any(0))):
            if stats is not None:
                assert torch.equal(stats[:, 1].isnan(), want)
                assert torch.equal(stats[:, 4].isnan(), want)
    grad, stats = torch.empty(m, n), torch.zeros(m, 1, dtype=torch.float64)
    ones = torch.ones(m), torch.ones(n)
    softmax_grad(x, y, grad, stats, torch.tensor(10.0), *pair, ids == "ignore", 0, NOWHERE, *3 * ones, None, None)
    assert torch.equal(grad.isnan(), touched)
    assert torch.equal(stats[:, 0].isnan(), touched.any(1))


@covering(1, name=[f"{side}_{k}" for side in ("row", "col") for k in ("top", "share")], far=[1.0, 20.0, 200.0])
def test_nan_in_a_vector_comes_out(name, far):
    m, n = 20, 70
    x, y = features(m, 12, torch.float32), features(n, 12, torch.float32)
    kinds = ("top", "share", "target")
    vectors = {f"{side}_{k}": torch.ones(s) for k in kinds for side, s in (("row", m), ("col", n))}
    vectors["col_top"] *= far
    vectors[name][3] = float("nan")
    grad, stats = torch.empty(m, n), torch.zeros(m, 1, dtype=torch.float64)
    options = (torch.tensor(10.0), None, None, False, 0, NOWHERE)
    softmax_grad(x, y, grad, stats, *options, **vectors, row_uniform=None, col_uniform=None)
    touched = torch.zeros(m, n, dtype=torch.bool)
    touched[(3, slice(None)) if name[:3] == "row" else (slice(None), 3)] = True
    assert torch.equal(grad.isnan(), touched)
    assert torch.equal(stats[:, 0].isnan(), touched.any(1))


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy's word for the infinities meant here
@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("n", [64, 70])
def test_infinite_logits_are_not_lost(n):
    """In the columns that only fill the last tile, infinity meets zero."""
    x, y = torch.ones(5, 1), torch.ones(n, 1)
    x[2] = INF
    rows, cols = empty_stats(5, 4), empty_stats(n, 4)
    softmax_stats(x, y, rows, cols, torch.tensor(1.0), None, None, False, NOWHERE, NOWHERE)
    assert torch.equal(rows[:, 1].isnan(), torch.tensor([False, False, True, False, False]))
    assert cols[:, 1].isnan().all()
    torch.testing.assert_close(lse_of(rows)[0].item(), 1 + math.log(n), rtol=1e-6, atol=0)
    x[2] = -INF
    rows, cols = empty_stats(5, 4), empty_stats(n, 4)
    softmax_stats(x, y, rows, cols, torch.tensor(1.0), None, None, False, NOWHERE, NOWHERE)
    torch.testing.assert_close(lse_of(cols), torch.full((n,), 1 + math.log(4)).double(), rtol=1e-6, atol=0)
    assert lse_of(rows)[2] == -INF


def test_strides():
    m, n, d = 37, 41, 19
    for dtype in (torch.float32, torch.bfloat16):
        transposed = features(d, m, dtype).t()
        every_other = torch.randn(n, 2 * d + 3).to(dtype)[:, 1::2][:, :d]
        one_row = features(1, d, dtype).expand(m, d)
        for x in (transposed, one_row):
            check(x, every_other, scale=1.0)
            check(every_other, x, scale=1.0)
    x, y = features(m, d, torch.float32), features(n, d, torch.float32)
    wide = torch.full((m, 9), 7.0, dtype=torch.float64)
    wide[:, 1::2] = empty_stats(m, 4)
    softmax_stats(x, y, wide[:, 1::2], None, torch.tensor(1.0), None, None, False, 0, NOWHERE)
    torch.testing.assert_close(lse_of(wide[:, 1::2]), (x.double() @ y.double().t()).logsumexp(1), rtol=1e-6, atol=0)
    assert (wide[:, ::2] == 7).all()


def test_only_the_tile_of_a_wide_gradient_buffer_is_written():
    m, n = 66, 70
    buffer = torch.full((m + 2, 128), 7.0)
    check_grad(features(m, 8, torch.float32), features(n, 8, torch.float32), grad=buffer[1 : m + 1, 5 : n + 5])
    buffer[1 : m + 1, 5 : n + 5] = 7.0
    assert (buffer == 7.0).all()


def test_offsets_beyond_32_bits():
    m, n, d = 4, 3, 5
    x = rows_far_apart(m, d).copy_(features(m, d, torch.bfloat16))
    check(x, features(n, d, torch.bfloat16))
    check(features(n, d, torch.bfloat16), x)
    check_grad(features(m, d, torch.bfloat16), features(n, d, torch.bfloat16), grad=rows_far_apart(m, n))


def test_more_blocks_than_are_merged_at_a_time():
    """Row maxima that rise and fall over 35 blocks."""
    x, y = (
        features(3, 4, torch.float32),
        features(2240, 4, torch.float32) * torch.linspace(-3, 3, 35).repeat(64)[:, None],
    )
    config = Config(64, 64, 32, 4, 2)
    check_stats(x, y, scale=100.0, config=config, width=6)


@pytest.mark.parametrize("ids", ["none", "ignore"])
def test_results_are_reproducible_bit_by_bit_and_independent_of_panels(ids):
    m, n = 100, 150
    x, y = features(m, 24, torch.float32), features(n, 24, torch.float32)
    scale, pair = torch.tensor(100.0), make_ids(ids, m, n, 20) or (None, None)
    rest = (ids == "ignore", 7, 9)

    def whole() -> tuple[Tensor, Tensor]:
        rows, cols = empty_stats(m, 6), empty_stats(n, 6)
        softmax_stats(x, y, rows, cols, scale, *pair, *rest)
        return rows, cols

    rows, cols = whole()
    for once, again in zip((rows, cols), whole(), strict=True):
        assert torch.equal(once, again)
    row_sums, col_sums = empty_stats(m, 6), empty_stats(n, 6)
    for i, j in itertools.product(range(0, m, 50), range(0, n, 70)):
        r, c = slice(i, i + 50), slice(j, j + 70)
        part = (None, None) if pair[0] is None else (pair[0][r], pair[1][c])
        softmax_stats(x[r], y[c], row_sums[r], col_sums[c], scale, *part, rest[0], 7 + i - j, 9 + i - j)
    for pieces, stats in ((row_sums, rows), (col_sums, cols)):
        torch.testing.assert_close(lse_of(pieces, 100.0), lse_of(stats, 100.0), rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(pieces[:, 2:], stats[:, 2:], rtol=1e-5, atol=1e-6)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    d=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(IDS),
    values=st.integers(1, 100),
    positive=st.integers(-100, 100),
    excluded=st.integers(-100, 100),
    scale=st.floats(0, 300, width=32),
    seed=st.integers(0, 2**31),
)
def test_any_panel(m, n, d, dtype, kind, values, positive, excluded, scale, seed):
    torch.manual_seed(seed)
    check(
        features(m, d, dtype), features(n, d, dtype), scale=scale, positive=positive, excluded=excluded,
        ids=make_ids(kind, m, n, values), ignore_same_id=kind == "ignore",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # in factors that are not used there
def test_logits_of_a_million_of_a_matrix_that_is_symmetric():
    """The log-sum-exps of rows are those of columns, and differences of 1 are to be seen."""
    x, ids = 300 * torch.randn(10, 63), torch.arange(10) // 2
    gradients = []
    for backend, rows in (("triton", x), ("reference", x.double())):
        rows = rows.clone().requires_grad_()
        with ssl_kernels.use_backend(backend):
            loss = K.sup_con_loss(rows, ids, 0.07)
        gradients += torch.autograd.grad(loss, rows)
    ours, exact = gradients
    assert (ours - exact).norm() <= 1e-5 * exact.norm()
