"""The engine of the softmax losses: tiles, budget, what autograd and torch's other machinery see of it, memory."""

from __future__ import annotations

import contextvars
import functools
import itertools
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from contrastive import BACKENDS, FUSED, LOSSES, case, distance, evaluate, features, oracle
from covering import covering
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from memory import linux_only, peak_mb, saved_bytes
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.distributed import ALONE
from ssl_kernels.ops import contrastive, panels, reuse, softmax
from ssl_kernels.ops.contrastive import NO_DIAGONAL, Pairs
from ssl_kernels.ops.softmax import softmax_contrastive

# ---- tiles


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", FUSED)
@hypothesis_settings(max_examples=15)
@given(rows=st.integers(1, 80), workspace_kb=st.floats(0.5, 60), budget_kb=st.floats(0, 40), seed=st.integers(0, 999))
def test_the_result_does_not_depend_on_tiles_or_budget(
    name: str, backend: str, rows: int, workspace_kb: float, budget_kb: float, seed: int
) -> None:
    torch.manual_seed(seed)
    loss, arguments = case(name, rows)
    expected = evaluate(backend, loss, arguments)
    with ssl_kernels.use_workspace(workspace_kb / 1024), ssl_kernels.use_tile_budget(budget_kb / 1024):
        ours = evaluate(backend, loss, arguments)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=2e-6, atol=2e-6)
    for a, b in zip(ours.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def count_products(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many similarity tiles are multiplied, and how many products add to gradients, panel by panel."""
    monkeypatch.setattr(contrastive, "_ONE_TILE", 0)
    counts = {"tiles": 0, "gradients": 0}
    matmul, add_matmul = softmax.matmul, panels.add_matmul

    def tile(a: Tensor, b: Tensor) -> Tensor:
        counts["tiles"] += 1
        return matmul(a, b)

    def gradient(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        counts["gradients"] += 1
        add_matmul(out, a, b, first=first)

    monkeypatch.setattr(softmax, "matmul", tile)
    monkeypatch.setattr(panels, "add_matmul", gradient)
    return counts


TILE_MB = 16 * 16 * 4 / 2**20


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("kept", "tiles"), [(0, 32), (0.9, 32), (1, 31), (5.5, 27), (16, 16), (1000, 16)])
def test_the_budget_decides_how_many_tiles_are_multiplied_twice(
    backend: str, kept: float, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows and columns in 4 x 4 tiles: 4 units without a budget, 3 when all is kept."""
    counts = count_products(monkeypatch)
    loss, arguments = case("clip", 64)
    workspace = TILE_MB * (8 if backend == "eager" else 1)
    with ssl_kernels.use_workspace(workspace), ssl_kernels.use_tile_budget(kept * TILE_MB):
        evaluate(backend, loss, arguments)
    assert counts == {"tiles": tiles, "gradients": 32}


@pytest.mark.parametrize("name", ["nt_xent", "sup_con"])
def test_a_symmetric_matrix_is_visited_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 x 8 tiles the 36 on and above the diagonal; the gradient has a product for each side of each pair."""
    counts = count_products(monkeypatch)
    rows = 2048
    loss, arguments = case(name, rows // 2 if name == "nt_xent" else rows, width=2)
    with ssl_kernels.use_tile_budget(0):
        evaluate("cpu", loss, arguments)
    assert counts == {"tiles": 2 * 36, "gradients": 64}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_grad_computes_the_loss_alone(name: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_products(monkeypatch)
    loss, arguments = case(name, 40, reduction=reduction)
    with torch.no_grad():
        loss(*(t.requires_grad_() for t in arguments))
    assert counts == {"tiles": 3 if name == "nt_xent" else 1, "gradients": 0}


def test_a_frozen_tower_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_products(monkeypatch)
    x, y = features(40, 40, 8)
    K.clip_loss(x.requires_grad_(), y, 10.0).backward()
    assert counts == {"tiles": 1, "gradients": 1}
    K.clip_loss(x.detach(), y, torch.tensor(10.0, requires_grad=True)).backward()
    assert counts == {"tiles": 2, "gradients": 1}


@pytest.mark.parametrize(("wanted", "products"), [((), 1), ("s", 1), ("x", 2), ("xs", 2), ("xy", 3)])
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_one_tile_is_multiplied_only_as_often_as_needed(name: str, wanted: str, products: int) -> None:
    x, y, scale = *features(40, 40, 8), torch.tensor(10.0)
    for letter in wanted:
        {"x": x, "y": y, "s": scale}[letter].requires_grad_()

    def loss() -> Tensor:
        return K.clip_loss(x, y, scale) if name == "clip" else K.sigmoid_contrastive_loss(x, y, scale, -10.0)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss()
    counts = {event.key: event.count for event in profile.key_averages()}
    of_one_tile = f"ssl_kernels::{'softmax' if name == 'clip' else 'sigmoid'}_of_one_tile"
    assert (counts[of_one_tile], counts["aten::mm"]) == (1, products)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_that_are_needed(name: str, backend: str, reduction: str) -> None:
    loss, arguments = case(name, 30, reduction=reduction)
    rows = len(loss(*arguments)) if reduction == "none" else 0
    exact = oracle(loss, arguments, torch.ones(rows) if rows else None)
    for needed in itertools.product([False, True], repeat=len(arguments)):
        leaves = [t.clone().requires_grad_(need) for t, need in zip(arguments, needed, strict=True)]
        with ssl_kernels.use_backend(backend):
            value = loss(*leaves)
            assert value.requires_grad == any(needed)
            if any(needed):
                value.sum().backward()
        for leaf, need, expected in zip(leaves, needed, exact.gradients, strict=True):
            assert (leaf.grad is not None) == need
            if leaf.grad is not None:
                torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
def test_rows_and_columns_without_a_positive_are_counted(backend: str) -> None:
    x, y = features(20, 30, 4)
    scale = torch.tensor(3.0)

    def unpaired(**options: Any) -> int:
        pairs = Pairs(None, None, False, NO_DIAGONAL, NO_DIAGONAL)._replace(**options)
        with ssl_kernels.use_workspace(0.002):
            _, count = softmax_contrastive(x, y, scale, pairs, reduction="mean", backend=backend)
        assert count.dtype == torch.int64
        return int(count)

    assert unpaired(positive=0) == 10
    assert unpaired(positive=15) == 5 + 15
    assert unpaired() == 50
    assert unpaired(positive=0, excluded=0) == 50
    ids = {"row_ids": torch.arange(20) // 2, "col_ids": torch.arange(30) // 3}
    assert unpaired(**ids) == 0
    assert unpaired(**ids, ignore_same_id=True, positive=29) == 19 + 29


# ---- numerics


@pytest.mark.parametrize("name", ["nt_xent", "sup_con"])
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("budget_mb", [0, 64])
def test_both_sides_of_a_pair_are_one_number(name: str, backend: str, budget_mb: int) -> None:
    """A product of x with itself is not symmetric to the last bit, which is much where logits are a million."""
    for seed in range(4):
        torch.manual_seed(seed)
        rows = 10 if name == "sup_con" else 5
        loss, arguments = case(name, rows, width=63)
        if name == "sup_con":
            arguments = [torch.randn(rows, 63) * 300, torch.tensor(0.07)]
        else:
            arguments[-1] = torch.tensor(1e-7)
        exact = oracle(loss, arguments)
        with ssl_kernels.use_tile_budget(budget_mb):
            ours = evaluate(backend, loss, arguments)
        assert distance(ours.gradients[0], exact.gradients[0]) <= 1e-5 * exact.gradients[0].norm()


def exact_clip(raw: Tensor, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Loss and derivative by scale * raw, in extended precision."""
    z = scale * (raw - raw.max()).numpy().astype(np.longdouble)  # what all have in common makes no difference
    log_p = [z - z.max(axis, keepdims=True) for axis in (0, 1)]
    log_p = [part - np.log(np.exp(part).sum(axis, keepdims=True)) for axis, part in enumerate(log_p)]
    size = 2 * len(z)
    return -sum(part.trace() for part in log_p) / size, sum(np.exp(part) - np.eye(len(z)) for part in log_p) / size


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="this processor has no extended precision")
@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
def test_float64_keeps_its_digits_however_large_logits_are(size: float) -> None:
    """Similarities of integers are exact; they are far from 0 and close to each other."""
    x = F.pad(torch.eye(6), (0, 1), value=1).double()
    y = F.pad(torch.randint(-2, 3, (6, 6)), (0, 1), value=int(size)).double()
    value, by_z = exact_clip(x @ y.t(), 1.1)
    ours = evaluate("eager", K.clip_loss, [x, y, torch.tensor(1.1, dtype=torch.float64)])
    assert abs(ours.loss.item() - value) <= 1e-15 * value
    for gradient, expected in zip(ours.gradients, (1.1 * by_z @ y.numpy(), 1.1 * by_z.T @ x.numpy()), strict=False):
        assert np.abs(gradient.numpy() - expected).max() <= 1e-15 * np.abs(y.numpy()).max()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_does_not_depend_on_the_number_of_threads(name: str, threads: int) -> None:
    """The kernels add up in the same order; the products are exact in small integers."""
    loss, arguments = case(name, 300)
    if name != "nt_xent":  # which normalises
        arguments[:-1] = [torch.randint(-2, 3, (300, 16)).float() for _ in arguments[:-1]]
    expected = evaluate("cpu", loss, arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = evaluate("cpu", loss, arguments)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-6, atol=0)
    for a, b in zip(ours.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if name != "nt_xent":
        assert torch.equal(ours.loss, expected.loss)


@pytest.mark.parametrize("name", LOSSES)
def test_repeats_bit_for_bit(name: str) -> None:
    loss, arguments = case(name, 1100, width=24)
    one, two = (evaluate("cpu", loss, arguments) for _ in range(2))
    for a, b in zip((one.loss, *one.gradients), (two.loss, *two.gradients), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_fp32_and_gradients_have_the_dtype_of_the_features(name: str, dtype: torch.dtype) -> None:
    loss, arguments = case(name, 9)
    result = evaluate("cpu", loss, [*(t.to(dtype) for t in arguments[:-1]), arguments[-1]])
    assert result.loss.dtype == result.gradients[-1].dtype == torch.float32
    assert all(g.dtype == dtype for g in result.gradients[:-1])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rows", [[0], [7], [29], list(range(30))])
def test_non_finite_features_show_in_the_loss(name: str, backend: str, bad: float, rows: list[int]) -> None:
    for argument, workspace in itertools.product(range(1 if name == "sup_con" else 2), (64, 0.002)):
        loss, arguments = case(name, 30, width=4)
        arguments[argument][rows] = bad
        with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(workspace):
            assert not loss(*arguments).isfinite()
            assert not loss(*(t.requires_grad_() for t in arguments)).isfinite()
        loss, arguments = case(name, 30, width=4)
        arguments[argument][rows, 1] = bad
        with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(workspace):
            assert not loss(*arguments).isfinite()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_scale_shows_in_the_loss(name: str, backend: str, bad: float) -> None:
    loss, arguments = case(name, 30)
    scale = bad if name == "clip" else 1 / bad
    with ssl_kernels.use_backend(backend):
        assert not loss(*arguments[:-1], torch.tensor(scale)).isfinite()


def test_a_negative_scale_is_refused_by_the_kernel() -> None:
    x, y = features(4, 4, 4)
    with pytest.raises(RuntimeError, match="scale: expected a number >= 0, got -2"):
        K.clip_loss(x, y, torch.tensor(-2.0))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_products_are_as_exact_as_torch_is_told(precision: str) -> None:
    loss, arguments = case("clip", 300, width=256)
    arguments[-1] = torch.tensor(100.0)
    exact = oracle(loss, arguments)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours, eager = evaluate("cpu", loss, arguments), evaluate("reference", loss, arguments)
    finally:
        torch.set_float32_matmul_precision(before)
    for a, e, o in zip(ours.gradients[:2], eager.gradients[:2], exact.gradients[:2], strict=True):
        allowed = 3e-6 * o.norm() + (0 if precision == "highest" else 4 * distance(e, o))
        assert distance(a, o) <= allowed


# ---- autograd


def test_reference_supports_double_backward() -> None:
    x, y = (t.double().requires_grad_() for t in features(4, 4, 3))
    with ssl_kernels.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda x, y: K.clip_loss(x, y, 3.0, label_smoothing=0.1), (x, y))
        assert torch.autograd.gradgradcheck(lambda x, y: K.nt_xent_loss(x, y, 0.5), (x, y))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_is_refused(name: str, backend: str, reduction: str) -> None:
    loss, arguments = case(name, 4, reduction=reduction)
    leaves = [t.requires_grad_() for t in arguments]
    with ssl_kernels.use_backend(backend):
        gradients = torch.autograd.grad(loss(*leaves).sum(), leaves, create_graph=True)
        with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
            sum(g.sum() for g in gradients).backward()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", LOSSES)
def test_forward_mode_and_functional_transforms_are_refused(name: str) -> None:
    loss, (x, *others) = case(name, 4)
    for transform in (
        lambda: torch.func.jvp(lambda x: loss(x, *others), (x,), (x,)),
        lambda: torch.func.grad(lambda x: loss(x, *others))(x),
    ):
        with pytest.raises(NotImplementedError, match="use_backend\\('reference'\\)"):
            transform()
    with ssl_kernels.use_backend("reference"):
        expected = torch.func.grad(lambda x: loss(x, *others))(x)
    torch.testing.assert_close(expected, evaluate("cpu", loss, [x, *others]).gradients[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_upstream_gradients_scale_the_result_and_retain_graph_repeats_it(name: str, reduction: str) -> None:
    loss, (x, *others) = case(name, 12, reduction=reduction)
    value = loss(x.requires_grad_(), *others).sum()
    (once,) = torch.autograd.grad(value, x, retain_graph=True)
    (twice,) = torch.autograd.grad(value * 2, x, retain_graph=True)
    (again,) = torch.autograd.grad(value, x)
    assert torch.equal(twice, 2 * once)
    assert torch.equal(again, once)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_of_one_element_gets_its_gradient(
    name: str, backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    loss, arguments = case(name, 12)
    exact = oracle(loss, arguments)
    arguments[-1] = arguments[-1].to(dtype).reshape(shape)
    gradient = evaluate(backend, loss, arguments).gradients[-1]
    assert (gradient.shape, gradient.dtype) == (shape, dtype)
    torch.testing.assert_close(gradient.reshape(()).double(), exact.gradients[-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["clip", "nt_xent"])
def test_the_same_features_on_both_sides_get_both_gradients(name: str) -> None:
    loss, (x, *others) = case(name, 12)
    both = evaluate("cpu", lambda x: loss(x, x, others[-1]), [x]).gradients[0]
    x0, x1, _ = evaluate("cpu", loss, [x, x, others[-1]]).gradients
    torch.testing.assert_close(both, x0 + x1, rtol=1e-5, atol=1e-6)


def test_backward_uses_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stats, grad = softmax._PANELS["eager"]
    monkeypatch.setitem(softmax._PANELS, "eager", (stats, lambda *a: calls.append(1) or grad(*a)))
    loss, arguments = case("clip", 5, reduction="none")
    with ssl_kernels.use_backend("eager"):
        value = loss(arguments[0].requires_grad_(), *arguments[1:])
    value.sum().backward()
    assert len(calls) == 1


# ---- torch's machinery


@covering(1, backend=FUSED, reduction=["mean", "sum", "none"], symmetric=[False, True])
def test_opcheck(backend: str, reduction: str, symmetric: bool) -> None:
    x, y = features(8, 8, 4)
    ids = torch.randint(3, (8,))
    options = [
        (None, False, 0, NO_DIAGONAL, None, 0, 0.0),
        (ids, True, 0, NO_DIAGONAL, None, 0, 0.1),
        *([(None, False, 4, 0, None, 4, 0.0), (ids, False, NO_DIAGONAL, 0, None, 0, 0.0)] if symmetric else []),
    ]
    needs = ((True, not symmetric, True), (False,) * 3, (False, False, True), (True, False, False))
    for (named, *pairs, smoothing), need in itertools.product(options, needs):
        leaves = [t.clone().requires_grad_(n) for t, n in zip((x, y, torch.tensor(10.0)), need, strict=True)]
        torch.library.opcheck(
            softmax._op.in_graphs,
            (
                leaves[0], None if symmetric else leaves[1], leaves[2], named, None if symmetric else named,
                *pairs, smoothing, reduction, list(need), 2**26, 0 if reduction == "none" else 2**20, backend,
                "", *ALONE,
            ),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )  # fmt: skip


def test_opcheck_of_the_whole() -> None:
    x, y = (t.requires_grad_() for t in features(9, 6, 4))
    arguments = (
        x, y, torch.tensor(10.0, requires_grad=True), None, None, False, 1, NO_DIAGONAL, None, 0, 0.1, "mean",
        [True] * 3, 2**26, 2**20, "cpu", "", *ALONE,
    )  # fmt: skip
    torch.library.opcheck(softmax._op.in_graphs, arguments)


def gradients_of(function: Any, arguments: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in arguments]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize(
    ("compiler", "name"),
    [pytest.param("inductor", "clip", marks=pytest.mark.slow), *(("aot_eager", name) for name in LOSSES)],
)
def test_compiles_without_a_graph_break(compiler: str, name: str) -> None:
    torch._dynamo.reset()
    inner, arguments = case(name, 21)

    def loss(*leaves: Tensor) -> Tensor:
        return inner(*(F.normalize(t, dim=-1) for t in leaves[:-1]), leaves[-1].exp())

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for a, b in zip(gradients_of(compiled, arguments), gradients_of(loss, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_compiles_per_row_losses(name: str) -> None:
    torch._dynamo.reset()
    inner, arguments = case(name, 21, reduction="none")
    compiled = torch.compile(lambda *leaves: inner(*leaves).square().sum(), fullgraph=True, backend="aot_eager")
    expected = gradients_of(lambda *leaves: inner(*leaves).square().sum(), arguments)
    for a, b in zip(gradients_of(compiled, arguments), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "nt_xent"])
def test_compiles_with_a_dynamic_batch(name: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    loss = {"clip": K.clip_loss, "nt_xent": K.nt_xent_loss}[name]
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for rows in (9, 19, 33):
        _, (x, y, scale) = case(name, rows)
        expected = evaluate("cpu", loss, [x, y, scale])
        compiled(x.requires_grad_(), y, scale).backward()
        torch.testing.assert_close(x.grad, expected.gradients[0], rtol=1e-5, atol=1e-6)
        frames.add(counter.frame_count)
    assert len(frames) == 1


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_casts_features_and_nothing_else(name: str) -> None:
    loss, arguments = case(name, 40, width=16)
    arguments[-1] = torch.tensor(117.3) if name == "clip" else 1 / torch.tensor(117.3)  # 117.5 in bf16
    leaves = [t.clone().requires_grad_() for t in arguments]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*leaves)
    value.backward()
    rounded = [*(F.normalize(t, dim=-1).bfloat16() if name == "nt_xent" else t.bfloat16() for t in arguments[:-1])]
    exact = oracle(loss, [*rounded, arguments[-1]])
    assert value.dtype == torch.float32
    rtol = 2e-3 if name == "nt_xent" else 2e-6  # rows that are normalised once more are not quite the same
    torch.testing.assert_close(value.detach().double(), exact.loss, rtol=rtol, atol=0)
    assert leaves[0].grad is not None
    assert leaves[0].grad.dtype == torch.float32
    assert distance(leaves[0].grad, exact.gradients[0]) <= 2**-5 * exact.gradients[0].norm()


def test_autocast_leaves_float64_alone_and_unifies_mixed_features() -> None:
    x, y = features(8, 8, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert K.clip_loss(x.double(), y.double(), 10.0).dtype == torch.float64
        assert K.nt_xent_loss(x.double(), y.double(), 0.1).dtype == torch.float64
        K.clip_loss(x.bfloat16(), y, 10.0)


@pytest.mark.parametrize("name", LOSSES)
def test_functional_call(name: str) -> None:
    loss, (x, *others) = case(name, 8, width=4)
    weight = torch.randn(4, 4, requires_grad=True)
    tower = torch.nn.Linear(4, 4, bias=False)
    loss(torch.func.functional_call(tower, {"weight": weight}, (x,)), *others).backward()
    direct = x @ weight.detach().t()
    expected = evaluate("cpu", loss, [direct, *others]).gradients[0].t() @ x
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_inference_mode(name: str) -> None:
    loss, arguments = case(name, 8)
    expected = loss(*arguments)
    with torch.inference_mode():
        assert torch.equal(loss(*arguments), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_other_devices_go_through_the_fake_op(reduction: str) -> None:
    x, y = (torch.empty(6, 4, device="meta", requires_grad=True) for _ in range(2))
    for loss, rows in (
        (K.clip_loss(x, y, 10.0, reduction=reduction), 6),
        (K.nt_xent_loss(x, y, 0.1, reduction=reduction), 12),
        (K.sup_con_loss(x, torch.empty(6, dtype=torch.int64, device="meta"), 0.1, reduction=reduction), 6),
    ):
        assert isinstance(loss, Tensor)
        assert loss.shape == (() if reduction == "mean" else (rows,))
        (gradient,) = torch.autograd.grad(loss.sum(), x)
        assert gradient.shape == x.shape


# ---- memory


@linux_only
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("budget_mb", [0, 8])
def test_peak_and_saved_memory_are_linear_in_the_batch(name: str, reduction: str, budget_mb: int) -> None:
    """The similarity matrix alone would be 64 MB; the features of all rows are 1 to 2 MB."""
    batch, width = 4096, 64
    loss, arguments = case(name, batch // 2 if name == "nt_xent" else batch, width=width, reduction=reduction)
    small, few = case(name, 64, width=width)
    evaluate("cpu", small, few)  # one-off buffers of the libraries
    leaves = [t.requires_grad_() for t in arguments]
    size = sum(t.nbytes for t in arguments)

    def step() -> None:
        reuse.warm.free_down_to(0)
        with saved_bytes() as sizes:
            value = loss(*leaves).sum()
        assert sum(sizes) <= 4 * size + 2**18  # NT-Xent: rows, their norms, and the sum of the gradients
        value.backward()

    with ssl_kernels.use_tile_budget(budget_mb):
        peak = peak_mb(step)
    assert peak < 12 * size / 2**20 + 16 + budget_mb


@linux_only
@pytest.mark.parametrize("name", LOSSES)
def test_no_grad_keeps_nothing(name: str) -> None:
    loss, arguments = case(name, 512)
    reuse.warm.free_down_to(0)
    with torch.no_grad(), saved_bytes() as sizes:
        loss(*(t.requires_grad_() for t in arguments))
    assert sizes == []
    assert reuse.warm.nbytes == 0


def test_warm_tiles_stay_within_the_budget() -> None:
    """What the last call kept is held for the next one, never more."""
    loss, arguments = case("clip", 200)
    small, few = case("clip", 20)
    reuse.warm.free_down_to(0)
    with ssl_kernels.use_workspace(0.01), ssl_kernels.use_tile_budget(0.05):
        for function, inputs in 3 * [(loss, arguments), (small, few)]:
            evaluate("cpu", function, inputs)
            assert reuse.warm.nbytes <= 0.05 * 2**20
    assert reuse.warm.nbytes


def test_warm_tiles_of_many_threads_stay_within_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(200, 200, 8)
    threads, second_pass = 8, softmax._Passes.gradients
    barrier = threading.Barrier(threads)
    monkeypatch.setattr(contrastive, "_ONE_TILE", 0)

    def gradients(passes: softmax._Passes, *options: Any) -> Any:
        assert passes.kept
        barrier.wait(60)  # until every thread has kept its tiles
        return second_pass(passes, *options)

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(K.clip_loss(leaf, y, 10.0), leaf)[0]

    expected = gradient()
    reuse.warm.free_down_to(0)
    monkeypatch.setattr(softmax._Passes, "gradients", gradients)
    with ssl_kernels.use_workspace(0.01), ssl_kernels.use_tile_budget(0.05):
        contexts = [contextvars.copy_context() for _ in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda context: context.run(gradient), contexts))
    assert 0.02 * 2**20 < reuse.warm.nbytes <= 0.05 * 2**20
    for result in found:
        torch.testing.assert_close(result, expected)
    monkeypatch.undo()
    with ssl_kernels.use_tile_budget(0):
        gradient()
    assert reuse.warm.nbytes == 0


@pytest.mark.slow  # the tests above have the same bound for smaller batches
@linux_only
def test_a_batch_of_16384_needs_a_few_copies_of_its_features() -> None:
    """The similarities would take 1 GB; x, y, their gradients and the sums of these are 6 x 4 MB, two tiles 8 MB."""
    loss, arguments = case("clip", 16_384, width=64)
    evaluate("cpu", *case("clip", 64))
    reuse.warm.free_down_to(0)
    with ssl_kernels.use_tile_budget(32):
        assert peak_mb(lambda: evaluate("cpu", loss, arguments)) < 32 + 40


# ---- errors


def test_the_kernels_check_their_own_arguments() -> None:
    stats_op, grad_op = torch.ops.ssl_kernels.softmax_stats_, torch.ops.ssl_kernels.softmax_grad_
    tile, rows, cols = torch.zeros(2, 3), torch.zeros(2, 4).double(), torch.zeros(3, 4).double()
    ids = torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for arguments, message in (
        ((tile.double(), rows, cols, 1.0, None, None), "tile: expected dtype Float, got Double"),
        ((torch.zeros(3, 2).t(), rows, cols, 1.0, None, None), "tile: expected unit stride"),
        ((torch.zeros(1, 3).expand(2, 3), rows, cols, 1.0, None, None), "tile: expected rows that do not overlap"),
        ((tile, rows[:1], cols, 1.0, None, None), "row_stats: expected size 2 in dimension 0, got 1"),
        ((tile, rows[:, :3], cols, 1.0, None, None), "row_stats: expected size 4 in dimension 1, got 3"),
        ((tile, rows.float(), cols, 1.0, None, None), "row_stats: expected dtype Double, got Float"),
        ((tile, rows, cols[:2], 1.0, None, None), "col_stats: expected size 3 in dimension 0, got 2"),
        ((tile, torch.zeros(2, 6).double(), cols, 1.0, None, None), "col_stats: expected size 6 in dimension 1, got 4"),
        ((tile, rows, cols, -1.0, None, None), "scale: expected a number >= 0, got -1"),
        ((tile, rows, cols, 1.0, ids[0], None), "row_ids, col_ids: expected both or neither"),
        ((tile, rows, cols, 1.0, ids[1], ids[1]), "row_ids: expected size 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            stats_op(*arguments, False, 0, NO_DIAGONAL)
    wide, narrow, stats = torch.zeros(4, 2), torch.zeros(4, 3), torch.zeros(2, 1).double()
    good = [tile, stats, 1.0, None, None, False, 0, NO_DIAGONAL, wide, narrow, True]
    for place, bad, message in (
        (1, stats[:1], "stats: expected size 2 in dimension 0, got 1"),
        (8, wide.double(), "row_side: expected dtype Float, got Double"),
        (8, narrow, "row_side: expected size 2 in dimension 1, got 3"),
        (9, narrow[:3], "row_side, col_side: expected the same number of vectors"),
        (9, torch.zeros(3, 4).t(), "col_side: expected vectors that are contiguous in memory"),
    ):
        with pytest.raises(RuntimeError, match=message):
            grad_op(*good[:place], bad, *good[place + 1 :])
    grad_op(*good)
    with pytest.raises(RuntimeError, match="tile: expected size 2 in dimension 1, got 3"):
        torch.ops.ssl_kernels.mirror_(tile)
    for y, found in ((tile, None), (None, ids[0])):
        with pytest.raises(RuntimeError, match="seam: expected neither y nor ids beside it, got 1"):
            torch.ops.ssl_kernels.softmax_of_one_tile(
                tile, y, 1.0, found, found, False, NO_DIAGONAL, 0, 1, 0.0, True, True, True, True
            )


def test_scale_gradients_are_those_of_finite_differences() -> None:
    """A peer's are too large by the number of processes, and another has none."""
    x, y = (t.double() for t in features(20, 20, 6))
    loss = functools.partial(K.clip_loss, x, y)
    gradient = evaluate("cpu", K.clip_loss, [x.float(), y.float(), torch.tensor(10.0)]).gradients[-1]
    difference = (loss(10.0 + 1e-4) - loss(10.0 - 1e-4)) / 2e-4
    torch.testing.assert_close(gradient.double(), difference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", [float, np.float32])
def test_numbers_of_the_wrong_sign_are_refused_by_name(backend: str, number: Callable[[float], Any]) -> None:
    x, y = features(4, 4, 4)
    with ssl_kernels.use_backend(backend):
        with pytest.raises(ValueError, match="scale: expected a number >= 0, got -2"):
            K.clip_loss(x, y, number(-2))
        with pytest.raises(ValueError, match="temperature: expected a positive number, got -2"):
            K.nt_xent_loss(x, y, number(-2))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("scale", [1e-30, 1e-39, 1e-42])
def test_gradients_at_a_scale_next_to_zero(backend: str, scale: float) -> None:
    """lse / scale overflows there."""
    x, y = features(6, 5, 4)
    arguments = [x, y, torch.tensor(scale)]
    ours, exact = evaluate(backend, K.clip_loss, arguments), oracle(K.clip_loss, arguments)
    torch.testing.assert_close(ours.loss.double(), exact.loss)
    torch.testing.assert_close(ours.gradients[-1].double(), exact.gradients[-1], rtol=1e-5, atol=1e-6)
    for a, b in zip(ours.gradients[:-1], exact.gradients[:-1], strict=True):  # of the size of the scale
        torch.testing.assert_close(a.double() / scale, b / scale, rtol=1e-3, atol=1e-2)
