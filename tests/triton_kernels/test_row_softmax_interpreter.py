"""The Triton kernels of the softmax over rows in the strict interpreter, against dense formulas in float64.

The oracle is given the operands that the kernel multiplies (16-bit as they are, fp32 cut to tf32 where that is
asked for), so that what is left is fp32 arithmetic: the bounds are tight.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from covering import covering
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from panels import DTYPES, TINY, UNIT, cut_to_tf32, features, rows_far_apart, shipped
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.kernels import row_softmax
from ssl_kernels.kernels.configs import CONFIGS, Config
from ssl_kernels.kernels.row_softmax import Guide, Pairs
from ssl_kernels.kernels.row_softmax_grad import row_softmax_grad
from ssl_kernels.kernels.row_softmax_stats import row_softmax_stats
from ssl_kernels.kernels.softmax_grad import gradient_scale
from ssl_kernels.kernels.tiles import operands

pytestmark = pytest.mark.usefixtures("strict")
INF = float("inf")
KINDS = ("plain", "ids", "positive", "hard", "bias", "guide", "guide positive bias")


def make_pairs(kind: str, m: int, n: int, scale: float = 10.0, guide_dtype: torch.dtype = torch.float32) -> Pairs:
    """Random targets, some of them none or beyond the panel, and what the kind names."""
    ids = None, None
    if kind != "plain" and kind != "bias" and kind != "guide":
        # Beyond 2^32, and equal in their low halves.
        ids = torch.randint(4, (m,)) * 2**33, torch.randint(4, (n,)) * 2**33
    bias = torch.randn(n) if "bias" in kind else None
    if bias is not None:
        bias[::5] = -INF
    scales = torch.tensor([scale, scale + 3, scale + 5] if kind == "hard" else 3 * [scale])
    guide = None
    if "guide" in kind:
        guide = Guide(features(m, 20, guide_dtype), features(n, 20, guide_dtype), torch.randn(m) / 4)
    same_id = 1 if "positive" in kind else 2 if kind == "hard" else 0
    target = torch.randint(-2, n + 2, (m,))
    return Pairs(target, *ids, same_id, scales, bias, kind == "hard" or bias is not None, guide)


@dataclass
class Dense:
    """What the kernels see of a panel, in float64."""

    s: Tensor
    v: Tensor
    unit: float
    positive: Tensor
    kept: Tensor


def dense(x: Tensor, y: Tensor, p: Pairs, is_tf32: bool = False) -> Dense:
    x, y = (cut_to_tf32(t) if is_tf32 else t for t in (x, y))
    s = x.double() @ y.double().t()
    positive = torch.arange(len(y)) == p.target[:, None]
    same, kept = torch.zeros_like(positive), torch.ones_like(positive)
    if p.x_ids is not None:
        same = p.x_ids[:, None] == p.y_ids
        kept = ~same | positive if p.same_id == 0 else kept
        positive = positive | same if p.same_id == 1 else positive
    if p.guide is not None:
        scores = p.guide.x.double() @ p.guide.y.double().t()
        kept = kept & (positive | (scores <= p.guide.threshold[:, None]))
    if p.bias is not None:
        kept = kept & (p.bias != -INF)
    positive = positive & kept
    if not p.logits:
        return Dense(s, s, p.scales[0].item(), positive, kept)
    t, of_same, of_others = p.scales.tolist()
    v = s * torch.where(positive, t, torch.where(same, of_same, of_others))
    return Dense(s, v if p.bias is None else v + p.bias.double().nan_to_num(neginf=0), 1.0, positive, kept)


def lse_of(stats: Tensor, unit: float) -> Tensor:
    return torch.where(stats[:, 1] == 0, -INF, unit * stats[:, 0] + stats[:, 1].log())


def check_stats(
    x: Tensor, y: Tensor, p: Pairs, *, width: int = 6, config: Config | None = None, is_tf32: bool = False
) -> None:
    stats = torch.rand(len(x), width, dtype=torch.float64) * 5 + 1
    stats[::3], stats[::3, 0] = 0, -INF
    before = stats.clone()
    row_softmax_stats(x, y, stats, p, config=config)
    d = dense(x, y, p, is_tf32)
    assert not stats.isnan().any()
    z = (d.unit * d.v).masked_fill(~d.kept, -INF)
    want = torch.logaddexp(lse_of(before, d.unit), z.logsumexp(1))
    got = lse_of(stats, d.unit)
    z_error = 4e-7 * (d.unit * d.v).abs().max().item() + 2e-6
    assert ((got - want).abs().masked_fill(got == want, 0) <= z_error).all()
    rounding = 2e-7 * (x.double().norm(dim=1).max() * y.double().norm(dim=1).max()).item() * d.v.abs().max() + 1e-6
    for k, mask in ((2, d.positive), (4, d.kept))[: width // 2 - 1]:
        error = (stats[:, k] - before[:, k] - (d.v * mask).sum(1)).abs()
        assert (error <= rounding * (1 + mask.sum(1))).all()
        assert torch.equal((stats[:, k + 1] - before[:, k + 1]).round(decimals=9), mask.sum(1).double())


def check_grad(
    x: Tensor,
    y: Tensor,
    p: Pairs,
    *,
    smoothed: bool = True,
    with_grad: bool = True,
    with_cols: bool = True,
    grad: Tensor | None = None,
    config: Config | None = None,
    is_tf32: bool = False,
) -> None:
    (m, _), n = x.shape, len(y)
    d = dense(x, y, p, is_tf32)
    z = (d.unit * d.v).masked_fill(~d.kept, -INF)
    lse = (z.logsumexp(1) + torch.rand(m)).float().double()  # there are more pairs than those of this panel
    weight = (2 * torch.rand(m) - 1) * (lse > -INF)
    weight[::7] = 0
    top = d.v.masked_fill(~d.kept, -INF).amax(1).masked_fill(weight == 0, 0).float()
    share = torch.where(weight == 0, 0, weight * torch.exp(d.unit * top.double() - lse)).float()
    targets, every = torch.rand(m) / 2, torch.rand(m) / 2 if smoothed else None
    if grad is None and with_grad:
        grad = torch.empty(m, n, dtype=x.dtype)
    moments, col_sums = torch.rand(m).double(), torch.rand(n).double() if with_cols else None
    before = moments.clone(), None if col_sums is None else col_sums.clone()
    row_softmax_grad(x, y, grad, moments, col_sums, p, top, share, targets, every, config=config)

    probability = torch.where((weight == 0)[:, None], 0, weight[:, None] * (z - lse[:, None]).exp())
    others = targets[:, None] * d.positive + (every[:, None] if smoothed else torch.zeros(m, 1)) * d.kept
    want = probability - others
    finite = lse[lse.isfinite()].abs().max().item() if lse.isfinite().any() else 0.0
    z_error = 4e-7 * ((d.unit * d.v).abs().max().item() + finite) + 5e-7
    error = z_error * probability.abs() + 4e-7 * others + 2**-65 * d.kept
    if grad is not None:
        bound = error + UNIT[x.dtype] * want.abs() + TINY[x.dtype] / gradient_scale(x.dtype)
        difference = (grad.double() / gradient_scale(x.dtype) - want).abs()
        assert (difference <= bound).all(), (difference / bound).max()
        assert (grad[~d.kept] == 0).all()
    s = d.s * d.kept
    summed = (error * s.abs()).sum(1) + 4e-7 * want.abs().sum(1) + 1e-13
    assert ((moments - before[0] - (want * s).sum(1)).abs() <= summed).all()
    if col_sums is not None and before[1] is not None:
        summed = error.sum(0) + 4e-7 * want.abs().sum(0) + 1e-13
        assert ((col_sums - before[1] - want.sum(0)).abs() <= summed).all()


def check(x: Tensor, y: Tensor, p: Pairs, **options: Any) -> None:
    check_stats(x, y, p, **options)
    check_grad(x, y, p, **options)


@covering(1, config=shipped(CONFIGS, "half"), kind=KINDS)
def test_every_config_in_16_bits(config, kind):
    m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 9
    dtype = torch.float16 if kind in ("plain", "guide") else torch.bfloat16
    x, y = features(m, d, dtype), features(n, d, dtype)
    check(x, y, make_pairs(kind, m, n, guide_dtype=dtype), config=config)


@covering(1, config=shipped(CONFIGS, "ieee"), kind=["plain", "guide positive bias"])
def test_every_config_in_ieee_fp32(config, kind):
    m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 9
    check(features(m, d, torch.float32), features(n, d, torch.float32), make_pairs(kind, m, n), config=config)


@pytest.mark.usefixtures("tf32")
@covering(1, config=shipped(CONFIGS, "tf32"), kind=["plain", "hard"])
def test_every_config_in_tf32(config, kind):
    m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 9
    x, y = features(m, d, torch.float32), features(n, d, torch.float32)
    check(x, y, make_pairs(kind, m, n), config=config, is_tf32=True)


@pytest.mark.parametrize("kind", ["plain", "guide"])
def test_descriptors(kind, monkeypatch):
    used = []
    for module in ("row_softmax", "row_softmax_stats", "row_softmax_grad"):
        seen = f"ssl_kernels.kernels.{module}.operands"
        monkeypatch.setattr(seen, lambda *args: used.append(operands(*args)) or used[-1])
    for config in dict.fromkeys(c for c in shipped(CONFIGS, "half") if c.descriptors):
        m, n, d = config.block_m + 3, config.block_n + 5, config.block_d + 16
        x, y = features(m, d, torch.bfloat16), features(n, d, torch.bfloat16)
        pairs = make_pairs(kind, m, n)
        if pairs.guide is not None:  # rows that are aligned
            pairs = pairs._replace(guide=Guide(features(m, 32, x.dtype), features(n, 32, x.dtype), torch.randn(m) / 4))
        wide = torch.full((m, 2 * config.block_n + 16), 7.0, dtype=torch.bfloat16)
        check_stats(x, y, pairs, config=config)
        check_grad(x, y, pairs, grad=wide[:, :n], config=config)
        assert (wide[:, n:] == 7).all()
    assert used
    assert all(isinstance(x, TensorDescriptor) for operand in used for x in operand if x is not None)


@covering(
    1,
    size=[(1, 1, 1), (3, 17, 5), (17, 3, 64), (65, 130, 33), (64, 64, 64)],
    kind=[*itertools.product(DTYPES, ["plain"]), *itertools.product([torch.float32], KINDS[1:])],
)
def test_sizes(size, kind):
    (m, n, d), (dtype, what) = size, kind
    check(features(m, d, dtype), features(n, d, dtype), make_pairs(what, m, n))


@covering(2, kind=KINDS, width=[4, 6], wanted=[(True, False), (False, True), (False, False)])
def test_only_what_is_wanted(kind, width, wanted):
    m, n = 33, 67
    x, y = features(m, 24, torch.bfloat16), features(n, 24, torch.bfloat16)
    pairs = make_pairs(kind, m, n)
    check_stats(x, y, pairs, width=width)
    check_grad(x, y, pairs, smoothed=width == 6, with_grad=wanted[0], with_cols=wanted[1])


@covering(1, kind=["plain", "ids", "bias"], scale=[0.0, 1.0, 100.0, 3000.0])
def test_scales(kind, scale):
    x, y = features(40, 32, torch.float32), features(75, 32, torch.float32)
    y[:30] = x[:30]
    check(x, y, make_pairs(kind, 40, 75, scale))


@pytest.mark.parametrize("kind", ["plain", "bias"])
def test_a_negative_scale_is_nan(kind):
    stats = torch.zeros(5, 4, dtype=torch.float64)
    stats[:, 0] = -INF
    x = features(5, 8, torch.float32)
    row_softmax_stats(x, x, stats, make_pairs(kind, 5, 5, -1.0))
    assert stats[:, 1].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_features_give_nan_and_only_where_they_belong(kind):
    m, n = 20, 70
    x, y = features(m, 12, torch.float32), features(n, 12, torch.float32)
    pairs = make_pairs(kind, m, n)
    x[3, 5] = float("nan")
    stats = torch.zeros(m, 4, dtype=torch.float64)
    stats[:, 0] = -INF
    row_softmax_stats(x, y, stats, pairs)
    assert torch.equal(stats[:, 1].isnan(), torch.arange(m) == 3)


def test_huge_similarities_are_left_out_with_a_guide_only():
    x, y = torch.tensor([[1e19], [1.0]]), torch.full((3, 1), -2e19)
    for guided in (False, True):
        stats = torch.zeros(2, 4, dtype=torch.float64)
        stats[:, 0] = -INF
        guide = Guide(torch.zeros(2, 1), torch.zeros(3, 1), torch.ones(2)) if guided else None
        scales = torch.full((3,), 1e-38)
        none = torch.full((2,), -1)
        row_softmax_stats(x, y, stats, Pairs(none, None, None, 0, scales, None, False, guide))
        assert stats[:, 1].tolist() == [0 if guided else 3, 3]


def test_strides_and_addresses_beyond_32_bits():
    m, n, d = 37, 41, 19
    transposed, every_other = features(d, m, torch.bfloat16).t(), torch.randn(n, 2 * d + 3).bfloat16()[:, 1::2][:, :d]
    check(transposed, every_other, make_pairs("plain", m, n, 1.0))
    x = rows_far_apart(4, 5).copy_(features(4, 5, torch.bfloat16))
    for one, other in ((x, features(3, 5, torch.bfloat16)), (features(3, 5, torch.bfloat16), x)):
        check(one, other, make_pairs("guide", len(one), len(other)))
    check_grad(x, x[:3], make_pairs("plain", 4, 3), grad=rows_far_apart(4, 3))
    wide = torch.full((m, 9), 7.0, dtype=torch.float64)
    wide[:, 1::2], wide[:, 1] = 0, -INF
    row_softmax_stats(transposed, every_other, wide[:, 1::2], make_pairs("plain", m, n))
    assert (wide[:, ::2] == 7).all()


def test_targets_beyond_32_bits_are_none():
    x, y = features(5, 8, torch.float32), features(9, 8, torch.float32)
    for kind in ("plain", "ids"):
        target = torch.tensor([2**32 + 3, -(2**62), 2**62, -1, 9])
        check(x, y, make_pairs(kind, 5, 9)._replace(target=target))


@pytest.mark.parametrize("kind", ["plain", "guide positive bias"])
def test_results_are_reproducible_bit_by_bit_and_independent_of_panels(kind):
    m, n = 100, 150
    x, y = features(m, 24, torch.float32), features(n, 24, torch.float32)
    pairs = make_pairs(kind, m, n)

    def fresh() -> Tensor:
        stats = torch.zeros(m, 6, dtype=torch.float64)
        stats[:, 0] = -INF
        return stats

    def part(r: slice, c: slice, j: int) -> Pairs:
        guide = pairs.guide and Guide(pairs.guide.x[r], pairs.guide.y[c], pairs.guide.threshold[r])
        ids = (None, None) if pairs.x_ids is None else (pairs.x_ids[r], pairs.y_ids[c])
        bias = None if pairs.bias is None else pairs.bias[c]
        return Pairs(pairs.target[r] - j, *ids, pairs.same_id, pairs.scales, bias, pairs.logits, guide)

    whole, again, pieces = fresh(), fresh(), fresh()
    row_softmax_stats(x, y, whole, pairs)
    row_softmax_stats(x, y, again, pairs)
    assert torch.equal(whole, again)
    for i, j in itertools.product(range(0, m, 50), range(0, n, 70)):
        r, c = slice(i, i + 50), slice(j, j + 70)
        row_softmax_stats(x[r], y[c], pieces[r], part(r, c, j))
    unit = pairs.unit().item()
    torch.testing.assert_close(lse_of(pieces, unit), lse_of(whole, unit), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(pieces[:, 2:], whole[:, 2:], rtol=1e-5, atol=1e-5)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    d=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(KINDS),
    scale=st.floats(0, 300, width=32),
    seed=st.integers(0, 2**31),
)
def test_any_panel(m, n, d, dtype, kind, scale, seed):
    torch.manual_seed(seed)
    check(features(m, d, dtype), features(n, d, dtype), make_pairs(kind, m, n, scale))


def test_guides_of_another_width_than_features_choose_what_fits(monkeypatch):
    chosen = []
    original = row_softmax.choose_config
    monkeypatch.setattr(row_softmax, "choose_config", lambda k, x, *a, **o: chosen.append(x) or original(k, x, *a, **o))
    x, y = features(40, 24, torch.bfloat16), features(50, 24, torch.bfloat16)
    for guide_dtype in (torch.bfloat16, torch.float32):
        pairs = make_pairs("guide", 40, 50, guide_dtype=guide_dtype)
        chosen.clear()
        check(x, y, pairs)
        assert all(c is (x if guide_dtype == torch.bfloat16 else pairs.guide.x) for c in chosen)


@covering(
    1,
    options=[
        {},
        {"candidate_bias": True, "ids": True, "label_smoothing": 0.1, "weights": True},
        {"dims": (4, 12), "dim_weights": (0.5, 2.0), "normalize": True, "guide": True},
        {"hardness": 3.0, "reduction": "none"},
        {"lse": True, "candidate_bias": True},
    ],
    dtype=[torch.float32, torch.float16],
)
def test_the_op_is_the_reference(options, dtype):
    """Through the public functions, by panels of a few rows."""
    options = dict(options)
    m, n = 20, 33
    leaves = [features(m, 12, dtype), features(n, 12, dtype), torch.tensor(9.0)]
    if options.pop("candidate_bias", False):
        leaves.append(torch.randn(n))
    if options.pop("ids", False):
        options |= {"query_ids": torch.randint(5, (m,)), "candidate_ids": torch.randint(5, (n,))}
    if options.pop("weights", False):
        options["weights"] = torch.rand(m)
    if options.pop("guide", False):
        options |= {"guide_query": features(m, 5, dtype), "guide_candidates": features(n, 5, dtype)}
    function = K.row_lse if options.pop("lse", False) else K.row_softmax_loss
    found = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64)):
        mine = [
            leaf.to(kind if leaf.dim() == 2 or kind == torch.float64 else leaf.dtype).requires_grad_()
            for leaf in leaves
        ]
        q, c, t, *bias = mine
        with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.002):
            value = function(q, c, t, candidate_bias=bias[0] if bias else None, **options)
            weight = torch.linspace(0.5, 2, value.numel(), dtype=value.dtype).view_as(value)
            gradients = torch.autograd.grad(value, mine, weight)
        found.append([value.detach(), *gradients])
    loose = 2e-3 if dtype == torch.float16 else 2e-6
    for ours, exact in zip(*found, strict=True):
        size = max(exact.norm().item(), 0.1)
        assert (ours.double() - exact).norm() <= (10 * loose if dtype == torch.float16 else 5 * loose) * size
