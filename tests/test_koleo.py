"""KoLeo against its definition in float64, and beside lightly's.

Where two neighbours are equally near but for rounding, float32 and float64 may choose differently. The choice is
therefore judged by its similarity, and loss and gradient against float64 with the neighbours that were chosen.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from contrastive import BACKENDS, FUSED, HALF_EPS, distance, dtypes, lay_out, layouts, losses_of_a_run, workspaces_mb
from hypothesis import given
from hypothesis import strategies as st
from memory import linux_only, peak_mb, saved_bytes
from peers import assert_same, assert_same_signature, value_and_gradients
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import KoLeoLoss
from ssl_kernels.ops import koleo
from ssl_kernels.ops.koleo import nearest_neighbors
from ssl_kernels.settings import workspace_bytes

EPS = 1e-8


class Result(NamedTuple):
    loss: Tensor
    gradient: Tensor


def run(backend: str, x: Tensor, weight: Tensor | None = None, **options: Any) -> Result:
    """Loss and gradient; ``weight`` is the upstream gradient."""
    x = x.detach().requires_grad_()
    with ssl_kernels.use_backend(backend):
        loss = K.koleo_loss(x, **options)
        loss.backward(torch.ones_like(loss) if weight is None else weight.to(loss.dtype))
    assert x.grad is not None
    return Result(loss.detach(), x.grad)


def given_neighbors(x: Tensor, neighbor: Tensor, weight: Tensor, reduction: str, eps: float = EPS) -> Result:
    """The formula in the dtype of x, by autograd."""
    x = x.detach().requires_grad_()
    u = F.normalize(x, dim=1, eps=eps)
    loss = -torch.log(F.pairwise_distance(u, u[neighbor], 2, eps) + eps)
    loss = {"mean": loss.mean, "sum": loss.sum, "none": lambda: loss}[reduction]()
    (gradient,) = torch.autograd.grad(loss, x, weight.to(loss.dtype))
    return Result(loss.detach(), gradient)


def neighbors_of(x: Tensor, backend: str, eps: float = EPS) -> Tensor:
    _, neighbor, _, _ = koleo._op.in_graphs(x, eps, "none", workspace_bytes(x.device), backend)
    return neighbor


def similarities(x: Tensor, eps: float = EPS) -> Tensor:
    u = F.normalize(x.double(), dim=1, eps=eps)
    return (u @ u.t()).fill_diagonal_(-math.inf)


def spread_rows(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows of different lengths."""
    return (torch.randn(rows, width) * torch.rand(rows, 1).add(0.1)).to(dtype)


# ---- values and gradients


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(
    rows=st.integers(2, 70),
    width=st.integers(1, 40),
    dtype=dtypes,
    layout=layouts,
    copies=st.integers(0, 3),
    size=st.sampled_from([1e-2, 1.0, 300.0]),
    eps=st.sampled_from([1e-8, 1e-4]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    workspace_mb=workspaces_mb,
    seed=st.integers(0, 2**16),
)
def test_matches_the_float64_formula(
    backend: str, rows: int, width: int, dtype: torch.dtype, layout: str, copies: int, size: float, eps: float,
    reduction: str, workspace_mb: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x = (size * spread_rows(rows, width)).to(dtype)
    x[torch.randint(rows, (copies,))] = x[0].clone()
    x = lay_out(x, layout)
    weight = torch.randn(rows) if reduction == "none" else torch.tensor(-1.7)
    with ssl_kernels.use_workspace(workspace_mb):
        ours = run(backend, x, weight, eps=eps, reduction=reduction)
        neighbor = neighbors_of(x, backend, eps)
    assert ours.loss.dtype == torch.float32
    assert ours.gradient.dtype == dtype

    similarity = similarities(x, eps)
    assert (similarity.gather(1, neighbor[:, None])[:, 0] >= similarity.amax(1) - 1e-6).all()
    exact = given_neighbors(x.double(), neighbor, weight, reduction, eps)
    eager = given_neighbors(x.float(), neighbor, weight, reduction, eps)
    assert distance(ours.loss, exact.loss) <= 2 * distance(eager.loss, exact.loss) + 1e-6 * exact.loss.norm() + 1e-6
    # What each row adds to a gradient, of which the sum may leave little: of equal rows it is about 1 / eps.
    u = F.normalize(x.double(), dim=1, eps=eps)
    push = 1 / (F.pairwise_distance(u, u[neighbor], 2, eps) + eps) / x.double().norm(dim=1).clamp_min(eps)
    terms = (push * weight).norm() / (rows if reduction == "mean" else 1)
    if dtype == torch.float16 and (exact.gradient.abs() > 6e4).any():
        assert not ours.gradient.isnan().any()
        return
    rounding = HALF_EPS.get(dtype, 1e-6) * exact.gradient.norm() + 2**-25 * x.numel() ** 0.5
    error = distance(ours.gradient, exact.gradient)
    assert error <= 2 * distance(eager.gradient, exact.gradient) + rounding + 2e-6 * terms


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("rows", "width"), [(600, 384), (1100, 64), (300, 1152)])
def test_a_training_sized_batch(backend: str, rows: int, width: int) -> None:
    x, one = spread_rows(rows, width), torch.ones(())
    neighbor = neighbors_of(x, backend)
    assert torch.equal(neighbor, similarities(x).argmax(1))
    ours, exact = run(backend, x), given_neighbors(x.double(), neighbor, one, "mean")
    eager = given_neighbors(x, neighbor, one, "mean")
    for a, e, o in zip(ours, eager, exact, strict=True):
        assert distance(a, o) <= 2 * distance(e, o) + 1e-6 * o.norm()


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(backend: str, reduction: str) -> None:
    x = spread_rows(9, 4).double().requires_grad_()
    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0005):
        assert torch.autograd.gradcheck(lambda x: K.koleo_loss(x, reduction=reduction), (x,))
        if backend == "reference":
            assert torch.autograd.gradgradcheck(lambda x: K.koleo_loss(x, reduction=reduction), (x,))


@pytest.mark.parametrize("backend", FUSED)
def test_double_backward_is_refused(backend: str) -> None:
    x = spread_rows(5, 3).requires_grad_()
    with ssl_kernels.use_backend(backend):
        (gradient,) = torch.autograd.grad(K.koleo_loss(x), x, create_graph=True)
        with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
            gradient.sum().backward()


def test_forward_mode_and_functional_transforms_are_refused() -> None:
    x = spread_rows(5, 3)
    for transform in (lambda: torch.func.jvp(K.koleo_loss, (x,), (x,)), lambda: torch.func.grad(K.koleo_loss)(x)):
        with pytest.raises(NotImplementedError, match="use_backend\\('reference'\\)"):
            transform()
    with ssl_kernels.use_backend("reference"):
        torch.testing.assert_close(torch.func.grad(K.koleo_loss)(x), run("cpu", x).gradient)


# ---- the neighbour


@pytest.mark.parametrize("backend", FUSED)
@given(
    rows=st.integers(2, 90),
    width=st.integers(1, 6),
    workspace_mb=st.sampled_from([64, 0.004, 0.0005]),
    seed=st.integers(0, 2**16),
)
def test_of_equal_similarities_the_first_is_taken(
    backend: str, rows: int, width: int, workspace_mb: float, seed: int
) -> None:
    """Small integers have exact products, and many equal ones, in tiles before and after the diagonal."""
    torch.manual_seed(seed)
    u = torch.randint(-1, 2, (rows, width)).float()
    with ssl_kernels.use_workspace(workspace_mb):
        neighbor = nearest_neighbors(u, workspace_bytes(u.device), backend)
    assert torch.equal(neighbor, (u @ u.t()).fill_diagonal_(-math.inf).argmax(1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("workspace_mb", [64, 0.0005])
def test_a_collapsed_batch(backend: str, workspace_mb: float) -> None:
    """All rows equal: the loss is that of a distance of eps in every feature, and no gradient is infinite or NaN."""
    x = spread_rows(1, 12).expand(50, 12)
    with ssl_kernels.use_workspace(workspace_mb):
        ours = run(backend, x)
    torch.testing.assert_close(ours.loss.item(), -math.log(EPS * (math.sqrt(12) + 1)), rtol=1e-5, atol=0)
    assert ours.gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_duplicates_leave_loss_and_gradient_finite(backend: str, dtype: torch.dtype) -> None:
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("no float64 kernels")
    x = spread_rows(40, 16, dtype)
    x[7], x[31], x[12] = x[3], x[3], 2 * x[9]
    ours = run(backend, x, torch.ones(40), reduction="none")
    assert ours.loss.isfinite().all()
    assert ours.gradient.isfinite().all()
    for row in (3, 7, 9, 12, 31):
        torch.testing.assert_close(ours.loss[row].item(), -math.log(EPS * 5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros(backend: str) -> None:
    """Similar to none, 0: not the neighbour of rows that have a nearer one. As |x| < eps, they are divided by eps."""
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    ours = run(backend, x, torch.ones(4), reduction="none")
    expected = given_neighbors(x.double(), torch.tensor([1, 2, 1, 0]), torch.ones(4), "none")
    torch.testing.assert_close(ours.loss.double(), expected.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.gradient.double(), expected.gradient, rtol=1e-5, atol=1e-6)
    assert ours.gradient[0].abs().max() > 1e7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_nan_and_nobody_s_neighbor(backend: str, bad: float) -> None:
    x = spread_rows(60, 4)
    x[17, 2] = bad
    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.001):
        rows = K.koleo_loss(x, reduction="none")
        assert K.koleo_loss(x).isnan()
    rest = torch.arange(60) != 17
    assert rows[17].isnan()
    assert rows[rest].isfinite().all()
    with ssl_kernels.use_backend(backend):
        torch.testing.assert_close(rows[rest], K.koleo_loss(x[rest], reduction="none"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite_is_at_a_right_angle_to_the_others(backend: str) -> None:
    """Nearer than a row that points the other way."""
    with ssl_kernels.use_backend(backend):
        assert K.koleo_loss(torch.tensor([[math.nan, 0.0], [1.0, 0.0], [-1.0, 0.0]]), reduction="none").isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_shorter_than_eps_is_divided_by_a_constant(backend: str) -> None:
    x, weight = torch.tensor([[0.03, 0.01], [1.0, 0.5], [-1.0, 0.3]]), torch.tensor([1.0, -2.0, 0.5])
    ours = run(backend, x, weight, eps=0.1, reduction="none")
    expected = given_neighbors(x.double(), similarities(x, 0.1).argmax(1), weight, "none", 0.1)
    torch.testing.assert_close(ours.loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.gradient.double(), expected.gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_nan(backend: str) -> None:
    ours = run(backend, torch.full((5, 3), math.nan))
    assert ours.loss.isnan()
    assert ours.gradient.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_rows_and_one_feature(backend: str) -> None:
    for x, expected in (([[3.0], [-0.5]], -math.log(2)), ([[3.0], [0.5]], -math.log(2 * EPS))):
        torch.testing.assert_close(run(backend, torch.tensor(x)).loss.item(), expected, rtol=1e-6, atol=0)
    with ssl_kernels.use_backend(backend):
        assert K.koleo_loss(torch.ones(3, 0), reduction="sum").item() == pytest.approx(-3 * math.log(EPS))


# ---- properties


@pytest.mark.parametrize("backend", FUSED)
def test_the_order_of_the_rows_and_their_lengths_do_not_matter(backend: str) -> None:
    x, order = spread_rows(80, 16), torch.randperm(80)
    plain = run(backend, x, torch.ones(80), reduction="none")
    permuted = run(backend, x[order], torch.ones(80), reduction="none")
    torch.testing.assert_close(permuted.loss, plain.loss[order])
    torch.testing.assert_close(permuted.gradient, plain.gradient[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(run(backend, 4 * x, torch.ones(80), reduction="none").loss, plain.loss)


@pytest.mark.parametrize("backend", FUSED)
def test_the_size_of_a_panel_does_not_matter(backend: str) -> None:
    x = spread_rows(300, 16)
    expected = run(backend, x)
    for workspace_mb in (0.05, 0.01, 0.001):
        with ssl_kernels.use_workspace(workspace_mb):
            for a, b in zip(run(backend, x), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    """The products are exact in small integers; tiles are large enough to be shared out."""
    u = torch.randint(-2, 3, (1500, 16)).float()
    expected = (u @ u.t()).fill_diagonal_(-math.inf).argmax(1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(nearest_neighbors(u, 2**26, "cpu"), expected)
    finally:
        torch.set_num_threads(before)


def test_repeats_bit_for_bit() -> None:
    x = spread_rows(900, 48)
    for a, b in zip(run("cpu", x), run("cpu", x), strict=True):
        assert torch.equal(a, b)


def test_only_tiles_on_and_above_the_diagonal_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    product, elements = koleo.matmul, []

    def spy(a: Tensor, b: Tensor) -> Tensor:
        elements.append(a.shape[0] * b.shape[1])
        return product(a, b)

    monkeypatch.setattr(koleo, "matmul", spy)
    K.koleo_loss(spread_rows(4096, 4))
    assert sum(elements) <= 0.57 * 4096**2


# ---- torch's machinery


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(backend: str, dtype: torch.dtype, reduction: str) -> None:
    x = spread_rows(9, 4, dtype)
    torch.library.opcheck(koleo._op.in_graphs, (x.requires_grad_(), EPS, reduction, 2**26, backend))
    loss, *rest = koleo._op.in_graphs(x.detach(), EPS, reduction, 2**26, backend)
    arguments = (torch.randn_like(loss), x.detach(), *rest, EPS, reduction == "mean", backend)
    torch.library.opcheck(koleo.gradient.in_graphs, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(compiler: str) -> None:
    torch._dynamo.reset()
    x = torch.randn(33, 8)

    def loss(x: Tensor) -> Tensor:
        return KoLeoLoss()(x.sin())

    def gradients(function: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        return [value.detach(), *torch.autograd.grad(value, leaf)]

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for a, b in zip(gradients(compiled), gradients(loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_has_no_effect(backend: str) -> None:
    x = spread_rows(200, 32)
    outside = run(backend, x)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(backend, x)
    assert torch.equal(inside.loss, outside.loss)
    assert torch.equal(inside.gradient, outside.gradient)


def test_no_gradient_is_made_where_none_is_wanted() -> None:
    x = spread_rows(9, 4)
    assert not K.koleo_loss(x).requires_grad
    with torch.no_grad():
        assert not K.koleo_loss(x.requires_grad_()).requires_grad


# ---- memory


def test_between_forward_and_backward_the_features_alone_are_kept() -> None:
    x = spread_rows(512, 64).requires_grad_()
    with saved_bytes() as sizes:
        K.koleo_loss(x)
    assert sum(sizes) <= 512 * 64 * 4 + 6 * 512 * 8


@linux_only
def test_memory_is_linear_in_the_batch() -> None:
    """Similarities of 16,384 rows would be 1 GB; a tile is at most 4 MB and [B, D] here 4."""
    x = spread_rows(16_384, 64).requires_grad_()
    K.koleo_loss(x[:64]).backward()
    assert peak_mb(lambda: K.koleo_loss(x).backward(), calls=3) < 60


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.ones(3)}, ValueError, r"x: expected 2 dimensions .* got shape \(3,\)"),
        ({"x": torch.ones(3, 4).int()}, TypeError, "x: expected dtype float32, .* got torch.int32"),
        ({"x": torch.ones(1, 4)}, ValueError, "x: expected at least 2 rows, .* got 1"),  # the modules take it
        ({"x": torch.ones(0, 4)}, ValueError, "x: expected at least 2 rows, .* got 0"),
        ({"eps": 0.0}, ValueError, "eps: expected a positive number, got 0.0"),
        ({"eps": math.nan}, ValueError, "eps: expected a positive number, got nan"),
        ({"eps": "1"}, TypeError, "eps: expected a float, got str"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        K.koleo_loss(**({"x": torch.ones(3, 4)} | change))


def test_the_module_knows_one_norm() -> None:
    with pytest.raises(ValueError, match="p: expected 2, the only norm that is implemented, got 1"):
        KoLeoLoss(p=1)


def test_the_kernel_checks_its_own_arguments() -> None:
    op = torch.ops.ssl_kernels.koleo_panel_
    tile, best, neighbor = torch.zeros(2, 3), torch.zeros(5), torch.zeros(5, dtype=torch.int64)
    for arguments, message in (
        ((tile.double(), best, neighbor, 0, 2), "tile: expected dtype Float, got Double"),
        ((torch.zeros(3, 2).t(), best, neighbor, 0, 2), "tile: expected unit stride"),
        ((tile, best.double(), neighbor, 0, 2), "best: expected dtype Float, got Double"),
        ((tile, best, neighbor.int(), 0, 2), "neighbor: expected dtype Long, got Int"),
        ((tile, best, neighbor[:4], 0, 2), "neighbor: expected size 5 in dimension 0, got 4"),
        ((tile, torch.zeros(10)[::2], neighbor, 0, 2), "best: expected a contiguous tensor"),
        ((tile, best, neighbor, 4, 2), "first_row: expected 0 to 3, got 4"),
        ((tile, best, neighbor, -1, 2), "first_row: expected 0 to 3, got -1"),
        ((tile, best, neighbor, 0, 3), "first_col: expected 0 to 2, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments)


def test_the_kernels_of_the_rows_check_their_own_arguments() -> None:
    ops, x, loss = torch.ops.ssl_kernels, torch.zeros(3, 4), torch.zeros(())
    norm, neighbor, distance = torch.zeros(3), torch.tensor([1, 2, 0]), torch.zeros(3)
    for call, message in (
        (
            lambda: ops.koleo_unit_rows_(x.double(), EPS, norm, x),
            "x: expected dtype Float, BFloat16 or Half",
        ),
        (
            lambda: ops.koleo_unit_rows_(x.t(), EPS, torch.zeros(4), x.t()),
            "x: expected unit stride",
        ),
        (lambda: ops.koleo_unit_rows_(x, EPS, norm[:2], x), "norm: expected size 3 in dimension 0, got 2"),
        (lambda: ops.koleo_unit_rows_(x, EPS, norm, x[:2]), "unit: expected size 3 in dimension 0, got 2"),
        (lambda: ops.koleo_loss_(x, EPS, norm, neighbor + 1, True, distance, loss), "neighbor: expected 0 to 2, got 3"),
        (
            lambda: ops.koleo_loss_(x, EPS, norm, neighbor - 1, True, distance, loss),
            "neighbor: expected 0 to 2",
        ),
        (lambda: ops.koleo_loss_(x, EPS, norm, neighbor, True, distance, x), "loss: expected 0 dimensions, got 2"),
        (
            lambda: ops.koleo_gradient_(norm[:2], x, EPS, norm, neighbor, distance, True, x),
            "upstream: expected size 3 in dimension 0, got 2",
        ),
        (
            lambda: ops.koleo_gradient_(loss, x, EPS, norm, neighbor, distance, True, x.half()),
            "gradient: expected dtype Float, got Half",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


# ---- beside lightly


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "width", "eps"), [(64, 24, 1e-8), (300, 128, 1e-4), (2, 3, 1e-8)])
def test_lightly(backend: str, rows: int, width: int, eps: float) -> None:
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    x = spread_rows(rows, width).requires_grad_()
    with ssl_kernels.use_backend(backend):
        ours = value_and_gradients(KoLeoLoss(eps=eps)(x), [x])
    assert_same(ours, value_and_gradients(lightly.KoLeoLoss(eps=eps)(x), [x]))


def test_lightly_has_the_same_signature() -> None:
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    assert_same_signature(KoLeoLoss, lightly.KoLeoLoss)


def test_a_training_run_repeats_that_of_the_reference() -> None:
    runs = []
    for backend in ("cpu", "reference"):
        torch.manual_seed(0)
        tower = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))

        class Model(torch.nn.Module):
            def __init__(self, tower: torch.nn.Module) -> None:
                super().__init__()
                self.tower = tower

            def forward(self, image: Tensor, _: Tensor) -> tuple[Tensor]:
                return (self.tower(image),)

        runs.append(losses_of_a_run(backend, KoLeoLoss(), Model(tower)))
    torch.testing.assert_close(*map(torch.tensor, runs), rtol=1e-4, atol=1e-4)
    assert runs[0][-1] < runs[0][0]
