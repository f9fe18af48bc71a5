"""VICReg and Barlow Twins against their definitions in float64: what both share.

Each has two ways to its squared covariances, through the features and through the rows; the number of rows against that
of features decides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from contrastive import BACKENDS, FUSED, HALF_EPS, distance, dtypes, lay_out, layouts
from hypothesis import given
from hypothesis import strategies as st
from memory import linux_only, peak_mb, saved_bytes
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.distributed import ALONE
from ssl_kernels.ops import barlow_twins, covariance, vicreg
from ssl_kernels.ops.covariance import off_diagonal_squares

LOSSES = {"vicreg": K.vicreg_loss, "barlow_twins": K.barlow_twins_loss}
each_loss = pytest.mark.parametrize("name", LOSSES)
SHAPES = [(2, 1), (9, 7), (40, 12), (12, 40), (6, 12), (7, 13), (7, 14)]  # either way, and where they meet


class Result(NamedTuple):
    loss: Tensor
    da: Tensor
    db: Tensor


def views(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Correlated, and of features with means and variances of their own."""
    base = torch.randn(rows, width)
    spread, mean = torch.rand(width) + 0.5, torch.randn(width)
    za, zb = ((base + 0.5 * torch.randn(rows, width)) * spread + mean for _ in range(2))
    return za.to(dtype), zb.to(dtype)


def run(backend: str, loss: Callable[..., Tensor], za: Tensor, zb: Tensor, upstream: float = 1.0) -> Result:
    leaves = [z.detach().requires_grad_() for z in (za, zb)]
    with ssl_kernels.use_backend(backend):
        value = loss(*leaves)
        value.backward(torch.full_like(value, upstream))
    da, db = (leaf.grad for leaf in leaves)
    assert da is not None
    assert db is not None
    return Result(value.detach(), da, db)


def oracle(loss: Callable[..., Tensor], za: Tensor, zb: Tensor, upstream: float = 1.0) -> Result:
    return run("reference", loss, za.double(), zb.double(), upstream)


# ---- the squares off the diagonal


@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 60),
    same=st.booleans(),
    wants=st.tuples(st.booleans(), st.booleans()),
    workspace_mb=st.sampled_from([64, 0.01, 0.0005]),
    seed=st.integers(0, 2**16),
)
def test_both_ways_give_the_same(
    rows: int, width: int, same: bool, wants: tuple[bool, bool], workspace_mb: float, seed: int
) -> None:
    torch.manual_seed(seed)
    a = torch.randn(rows, width, dtype=torch.float64)
    b = a if same else torch.randn(rows, width, dtype=torch.float64)
    wants = (wants[0], wants[1] and not same)
    products = a.t() @ b
    others = products - products.diagonal().diag()
    total, *gradients = off_diagonal_squares(a, b, products.diagonal(), *wants, int(workspace_mb * 2**20), False)
    torch.testing.assert_close(total, others.square().sum())
    for want, gradient, expected in zip(wants, gradients, (b @ others.t(), a @ others), strict=True):
        assert (gradient is not None) == want
        if gradient is not None:
            torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("rows", [4, 32, 256])
@pytest.mark.parametrize("kind", ["random", "equal", "one feature"])
def test_what_the_diagonal_takes_away_leaves_enough(rows: int, kind: str, backend: str) -> None:
    """In float32, for features of one variance to 2e-6 of the value; at worst to as much of the squares of all."""
    x = torch.randn(rows, 512)
    if kind == "equal":
        x = torch.linalg.qr(torch.randn(512, rows))[0].t().contiguous()
    if kind == "one feature":
        x[:, 1:] *= 1e-3
    x -= x.mean(0)
    exact = x.double().t() @ x.double()
    others = exact - exact.diagonal().diag()
    total, gradient, _ = off_diagonal_squares(
        x, x, torch.linalg.vecdot(x, x, dim=0), True, False, 2**26, backend == "cpu"
    )
    assert gradient is not None
    scale = (exact if kind == "one feature" else others).square().sum()
    assert (others.square().sum() - total).abs() <= 2e-6 * scale
    expected = x.double() @ others
    size = (x.double() @ exact).norm() if kind == "one feature" else expected.norm()
    assert distance(gradient, expected) <= 2e-6 * size


def test_neither_matrix_is_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    product, shapes = covariance.matmul, []

    def spy(a: Tensor, b: Tensor) -> Tensor:
        shapes.append((a.shape[0], b.shape[1]))
        return product(a, b)

    monkeypatch.setattr(covariance, "matmul", spy)
    for rows, width, side in ((200, 500, 200), (500, 200, 200)):
        x = torch.randn(rows, width)
        off_diagonal_squares(x, x, torch.ones(width), True, False, 2**20 // 10, True)
        assert all(m * n * 4 <= 0.1 * 2**20 for m, n in shapes)
        assert sum(m for m, _ in shapes) == side
        shapes.clear()


# ---- values and gradients


@each_loss
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(
    rows=st.integers(3, 40),
    width=st.integers(1, 60),
    dtype=dtypes,
    layout=layouts,
    size=st.sampled_from([1e-2, 1.0, 10.0]),
    upstream=st.sampled_from([1.0, -1.7]),
    workspace_mb=st.sampled_from([64, 0.01, 0.0005]),
    seed=st.integers(0, 2**16),
)
def test_matches_the_float64_reference(
    name: str, backend: str, rows: int, width: int, dtype: torch.dtype, layout: str, size: float, upstream: float,
    workspace_mb: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    za, zb = ((size * z).to(dtype) for z in views(rows, width))
    za = lay_out(za, layout)
    loss = LOSSES[name]
    with ssl_kernels.use_workspace(workspace_mb):
        ours = run(backend, loss, za, zb, upstream)
    exact, eager = oracle(loss, za, zb, upstream), run("reference", loss, za.float(), zb.float(), upstream)
    assert ours.loss.dtype == torch.float32
    assert ours.da.dtype == ours.db.dtype == dtype
    # A view's mean is taken out of it, and its rounding stays; where nothing else is left, gradients are made of that.
    if layout == "expanded":
        assert all(t.isfinite().all() for t in ours)
        return
    for field in Result._fields:
        a, e, o = (getattr(r, field) for r in (ours, eager, exact))
        assert a.shape == o.shape
        eps = HALF_EPS.get(dtype, 5e-6) if field != "loss" else 5e-6
        subnormal = 2**-25 * a.numel() ** 0.5 if a.dtype == torch.float16 else 1e-6
        assert distance(a, o) <= 2 * distance(e, o) + eps * o.norm().item() + subnormal, field


@each_loss
@pytest.mark.parametrize(("rows", "width"), [(64, 512), (256, 300), (300, 128)])
def test_a_training_sized_batch_is_as_exact_as_plain_pytorch(name: str, rows: int, width: int) -> None:
    za, zb = views(rows, width)
    loss = LOSSES[name]
    results = run("cpu", loss, za, zb), run("reference", loss, za, zb), oracle(loss, za, zb)
    for a, e, o in zip(*results, strict=True):
        assert distance(a, o) <= 2 * distance(e, o) + 1e-6 * o.norm()


@each_loss
@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize(("rows", "width"), [(5, 3), (4, 9)])
def test_gradcheck(name: str, backend: str, rows: int, width: int) -> None:
    leaves = [z.double().requires_grad_() for z in views(rows, width)]
    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0002):
        assert torch.autograd.gradcheck(LOSSES[name], leaves)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(LOSSES[name], leaves)


@each_loss
def test_double_backward_is_refused(name: str) -> None:
    leaves = [z.requires_grad_() for z in views(6, 4)]
    (gradient,) = torch.autograd.grad(LOSSES[name](*leaves), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
        gradient.sum().backward()


@each_loss
def test_forward_mode_and_functional_transforms_are_refused(name: str) -> None:
    za, zb = views(6, 4)
    loss = LOSSES[name]
    for transform in (lambda: torch.func.jvp(loss, (za, zb), (za, zb)), lambda: torch.func.grad(loss)(za, zb)):
        with pytest.raises(NotImplementedError, match="use_backend\\('reference'\\)"):
            transform()


@each_loss
@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=2)))
def test_only_the_gradients_that_are_needed(name: str, needed: tuple[bool, bool], shape: tuple[int, int]) -> None:
    za, zb = views(*shape)
    exact = oracle(LOSSES[name], za, zb)
    leaves = [z.requires_grad_(need) for z, need in zip((za, zb), needed, strict=True)]
    with saved_bytes() as sizes:
        loss = LOSSES[name](*leaves)
    assert loss.requires_grad == any(needed)
    assert sum(sizes) == sum(needed) * za.numel() * 4
    torch.testing.assert_close(loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    if any(needed):
        loss.backward()
    for leaf, need, expected in zip(leaves, needed, exact[1:], strict=True):
        assert (leaf.grad is not None) == need
        if need:
            torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-6)


# ---- properties and numerics


@each_loss
@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_of_rows_and_of_features_does_not_matter(name: str, shape: tuple[int, int]) -> None:
    za, zb = views(*shape)
    rows, features = torch.randperm(shape[0]), torch.randperm(shape[1])
    plain = run("cpu", LOSSES[name], za, zb)
    mixed = run("cpu", LOSSES[name], za[rows][:, features], zb[rows][:, features])
    torch.testing.assert_close(mixed.loss, plain.loss, rtol=1e-5, atol=1e-5)
    for a, b in ((mixed.da, plain.da), (mixed.db, plain.db)):
        torch.testing.assert_close(a, b[rows][:, features], rtol=1e-3, atol=1e-3 if shape == (2, 1) else 1e-5)


@each_loss
@pytest.mark.parametrize("shape", [(60, 12), (12, 60)])
def test_a_shift_of_both_views_changes_nothing(name: str, shape: tuple[int, int]) -> None:
    za, zb = views(*shape)
    plain, shifted = run("cpu", LOSSES[name], za, zb), run("cpu", LOSSES[name], za + 64, zb + 64)
    for a, b in zip(shifted, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@each_loss
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_collapsed_batch(name: str, backend: str, shape: tuple[int, int]) -> None:
    """All rows equal: no covariance, no gradient but that of the invariance, and nothing infinite."""
    za, zb = (torch.randn(1, shape[1]).expand(shape) for _ in range(2))
    ours, exact = run(backend, LOSSES[name], za, zb), oracle(LOSSES[name], za, zb)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-5)
    for a, o in zip(ours[1:], exact[1:], strict=True):
        torch.testing.assert_close(a.double(), o, rtol=1e-4, atol=1e-3)


@each_loss
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("rows", [20, 300])
def test_a_mean_that_is_large_beside_the_deviations(name: str, backend: str, rows: int) -> None:
    za, zb = (1e4 + 0.02 * torch.randn(rows, 24) for _ in range(2))
    ours, exact = run(backend, LOSSES[name], za, zb), oracle(LOSSES[name], za, zb)
    for a, o in zip(ours, exact, strict=True):
        assert distance(a, o) <= 2e-6 * o.norm()


@each_loss
@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("view", [0, 1])
def test_non_finite_input_shows_in_the_loss(
    name: str, shape: tuple[int, int], backend: str, bad: float, view: int
) -> None:
    pair = views(*shape)
    pair[view][3, 2] = bad
    assert not run(backend, LOSSES[name], *pair).loss.isfinite()


@each_loss
def test_repeats_bit_for_bit(name: str) -> None:
    za, zb = views(100, 300)
    for a, b in zip(run("cpu", LOSSES[name], za, zb), run("cpu", LOSSES[name], za, zb), strict=True):
        assert torch.equal(a, b)


@each_loss
def test_fp16_features_whose_squares_overflow_fp16(name: str) -> None:
    za, zb = ((300 * z).half() for z in views(64, 40))
    ours, exact = run("cpu", LOSSES[name], za, zb), oracle(LOSSES[name], za, zb)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=0)
    if (exact.da.abs() < 6e4).all():
        assert distance(ours.da, exact.da) <= 2**-10 * exact.da.norm() + 2**-25 * 51


# ---- torch's machinery


@pytest.mark.parametrize("wants", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(9, 4), (4, 9)])
@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(wants: tuple[bool, bool], dtype: torch.dtype, shape: tuple[int, int], backend: str) -> None:
    za, zb = views(*shape, dtype)
    leaves = [z.requires_grad_(want) for z, want in zip((za.t().contiguous().t(), zb), wants, strict=True)]
    torch.library.opcheck(
        vicreg._op.in_graphs, (*leaves, 25.0, 25.0, 1.0, 1e-4, *wants, 2**26, backend == "cpu", *ALONE)
    )
    torch.library.opcheck(barlow_twins._op.in_graphs, (*leaves, 5e-3, *wants, 2**26, backend == "cpu", *ALONE))


@each_loss
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(name: str, compiler: str) -> None:
    torch._dynamo.reset()
    pair = views(33, 8)

    def loss(za: Tensor, zb: Tensor) -> Tensor:
        return LOSSES[name](za.sin(), zb.sin())

    def gradients(function: Any) -> list[Tensor]:
        leaves = [z.clone().requires_grad_() for z in pair]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for a, b in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_loss
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shape", [(64, 16), (16, 64)])
def test_autocast_has_no_effect(name: str, backend: str, shape: tuple[int, int]) -> None:
    pair = views(*shape)
    outside = run(backend, LOSSES[name], *pair)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(backend, LOSSES[name], *pair)
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


# ---- memory


@linux_only
@each_loss
def test_memory_is_linear(name: str) -> None:
    """[256, 8192] is 8 MB; a matrix of 8,192 features is 256 MB, and autograd holds several."""
    leaves = [torch.randn(256, 8192).requires_grad_() for _ in range(2)]
    LOSSES[name](*(leaf[:8, :32] for leaf in leaves)).backward()
    with ssl_kernels.use_workspace(16):
        assert peak_mb(lambda: LOSSES[name](*leaves).backward()) < 9 * leaves[0].nbytes / 2**20 + 40


# ---- errors


@each_loss
@pytest.mark.parametrize(
    ("za", "zb", "error", "message"),
    [
        ([1.0], torch.ones(3, 4), TypeError, "za: expected a tensor, got list"),
        (torch.ones(3), torch.ones(3), ValueError, r"za: expected 2 dimensions .* got shape \(3,\)"),
        (torch.ones(3, 4), torch.ones(3, 4).half(), TypeError, r"zb: expected the dtype of za .* got torch.float16"),
        (torch.ones(3, 4), torch.ones(3, 5), ValueError, "zb: expected 4 features as za has, got 5"),
        (torch.ones(3, 4), torch.ones(2, 4), ValueError, "zb: expected 3 rows as za has, got 2"),
        (torch.ones(1, 4), torch.ones(1, 4), ValueError, "za: expected at least 2 rows, .* got 1"),
        (torch.ones(0, 4), torch.ones(0, 4), ValueError, "za: expected at least 2 rows, .* got 0"),
        (torch.ones(3, 0), torch.ones(3, 0), ValueError, "za: expected at least 1 feature, got 0"),
    ],
)
def test_bad_views_are_named(name: str, za: Any, zb: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LOSSES[name](za, zb)


@each_loss
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_a_feature_that_holds_all_variance_does_not_round_the_others_away(name: str, backend: str) -> None:
    """By the rows it would be taken back out of a sum that is nothing else."""
    za, zb = (1e-3 * torch.randn(8, 64) for _ in range(2))
    za[:, 0] *= 1e6
    wide_views = [z.double().requires_grad_() for z in (za, zb)]
    single = [z.requires_grad_() for z in (za, zb)]
    with ssl_kernels.use_backend("reference"):
        expected = LOSSES[name](*wide_views)
    with ssl_kernels.use_backend(backend):
        loss = LOSSES[name](*single)
    gradients = [torch.autograd.grad(value, z) for value, z in ((expected, wide_views), (loss, single))]
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    for exact, gradient in zip(*gradients, strict=True):
        assert (gradient.double() - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize(
    ("loss", "option", "error", "message"),
    [
        (K.vicreg_loss, {"invariance_weight": "1"}, TypeError, "invariance_weight: expected a float, got str"),
        (K.vicreg_loss, {"covariance_weight": True}, TypeError, "covariance_weight: expected a float, got bool"),
        (K.vicreg_loss, {"eps": 0.0}, ValueError, "eps: expected a positive number, got 0.0"),
        (K.barlow_twins_loss, {"lambda_param": None}, TypeError, "lambda_param: expected a float, got NoneType"),
    ],
)
def test_bad_options_are_named(
    loss: Callable[..., Tensor], option: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        loss(*views(4, 3), **option)
