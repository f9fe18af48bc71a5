"""The engine of the softmax over rows: products, what autograd and torch's other machinery see of it, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from contrastive import BACKENDS, FUSED, assert_close, distance, evaluate, features, oracle, plain
from covering import covering
from memory import leave_out_onednn, linux_only, peak_mb, saved_bytes
from row_losses import call
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.ops import contrastive, panels, reuse, row_tiles
from ssl_kernels.ops.row_loss import row_softmax
from ssl_kernels.ops.row_passes import Arguments

# Arguments of the call that each name stands for.
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True, "targets": True, "ids": 4, "weights": True, "label_smoothing": 0.1},
    "prefixes": {"dims": (8, 3), "normalize": True, "guide": 3, "hardness": 2.0},
    "rows": {"reduction": "none", "bias": True, "weights": True},
    "lse": {"function": K.row_lse, "bias": True},
}
each_call = pytest.mark.parametrize("name", CALLS)


def case(name: str, rows: int = 12, cols: int = 20, width: int = 8) -> tuple[Any, list[Tensor]]:
    return call(rows, cols, width, **CALLS[name])


# ---- tiles


def count_products(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many similarity tiles are multiplied, and how many products add to gradients, panel by panel."""
    monkeypatch.setattr(contrastive, "_ONE_TILE", 0)
    counts = {"tiles": 0, "gradients": 0}
    matmul, add_matmul = row_tiles.matmul, panels.add_matmul

    def tile(a: Tensor, b: Tensor, memory: Tensor | None = None) -> Tensor:
        counts["tiles"] += 1
        return matmul(a, b, memory)

    def gradient(out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        counts["gradients"] += 1
        add_matmul(out, a, b, first=first)

    monkeypatch.setattr(row_tiles, "matmul", tile)
    monkeypatch.setattr(panels, "add_matmul", gradient)
    return counts


TILE_MB = 16 * 16 * 4 / 2**20


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("kept", "tiles"), [(0, 64), (0.9, 64), (1, 63), (5.5, 59), (32, 32), (1000, 32)])
def test_the_budget_decides_how_many_tiles_are_multiplied_twice(
    backend: str, kept: float, tiles: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 rows and 128 columns in 4 x 8 tiles: 4 units without a budget, 3 when all is kept."""
    counts = count_products(monkeypatch)
    loss, arguments = call(64, 128)
    workspace = TILE_MB * (8 if backend == "eager" else 1)
    with ssl_kernels.use_workspace(workspace), ssl_kernels.use_tile_budget(kept * TILE_MB):
        evaluate(backend, loss, arguments)
    assert counts == {"tiles": tiles, "gradients": 64}


def test_a_guide_takes_one_product_more_where_no_tile_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_products(monkeypatch)
    loss, arguments = call(32, 48, guide=5)
    for workspace, budget, tiles in (
        (TILE_MB, 0, 24),
        (TILE_MB, 64, 12),
        (64, 0, 2),
    ):  # a kept tile knows what was left out
        counts["tiles"] = 0
        with ssl_kernels.use_workspace(workspace), ssl_kernels.use_tile_budget(budget):
            evaluate("cpu", loss, arguments)
        assert counts["tiles"] == tiles


@pytest.mark.parametrize("options", [CALLS["bias"], {"dims": (8, 3), "normalize": True, "weights": True}])
def test_one_visit_is_enough_where_256_rows_of_similarities_fit(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """600 rows in three panels take three products each; where 255 fit, smaller tiles take four."""
    counts = count_products(monkeypatch)
    loss, arguments = call(600, 620, **options)
    exact, eager = oracle(loss, arguments), plain(loss, arguments)
    prefixes = len(options.get("dims", [8]))
    row_mb = 620 * 4 * prefixes / 2**20
    for rows in (256, 255):
        counts |= {"tiles": 0, "gradients": 0}
        with ssl_kernels.use_workspace(rows * row_mb), ssl_kernels.use_tile_budget(0):
            assert_close(evaluate("cpu", loss, arguments), eager, exact, terms=60)
        once = counts == {"tiles": 3 * prefixes, "gradients": 6 * prefixes}
        twice = counts["tiles"] == counts["gradients"] > 6 * prefixes
        assert (once, twice) == (rows == 256, rows == 255)


def test_candidates_that_are_converted_fit_the_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_products(monkeypatch)
    loss, arguments = call(16, 32, 256, dtype=torch.bfloat16)
    for workspace_kb, tiles in ((32, 1), (31, 4)):
        counts["tiles"] = 0
        with ssl_kernels.use_workspace(workspace_kb / 1024), ssl_kernels.use_tile_budget(0):
            evaluate("cpu", loss, arguments)
        assert counts["tiles"] == tiles


@pytest.mark.parametrize("name", ["rows", "lse"])
def test_gradients_that_wait_for_upstream_ones_take_four_units(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_products(monkeypatch)
    loss, arguments = case(name)
    evaluate("cpu", loss, arguments, torch.ones(12))
    assert counts == {"tiles": 2, "gradients": 2}


@each_call
def test_no_grad_computes_the_loss_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = count_products(monkeypatch)
    loss, arguments = case(name)
    with torch.no_grad():
        loss(*(t.requires_grad_() for t in arguments))
    assert counts == {"tiles": 3 if name == "prefixes" else 1, "gradients": 0}


@pytest.mark.parametrize(("wanted", "products"), [("", 1), ("s", 1), ("b", 1), ("q", 2), ("qs", 2), ("qc", 3)])
def test_one_tile_is_multiplied_only_as_often_as_needed(wanted: str, products: int) -> None:
    loss, arguments = call(40, 50, bias=True)
    for letter, t in zip("qcbs", arguments, strict=True):
        t.requires_grad_(letter in wanted)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        loss(*arguments)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert (counts["ssl_kernels::row_softmax_of_one_tile"], counts["aten::mm"]) == (1, products)


@each_call
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("one_tile", [True, False])
def test_only_the_gradients_that_are_needed(
    name: str, backend: str, one_tile: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not one_tile:
        monkeypatch.setattr(contrastive, "_ONE_TILE", 0)
    loss, arguments = case(name)
    deferred = name in ("rows", "lse")
    exact = oracle(loss, arguments, torch.ones(12) if deferred else None)
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
                torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=2e-5)


# ---- bits


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", ["plain", "bias"])
def test_the_result_does_not_depend_on_the_number_of_threads(name: str, threads: int) -> None:
    """The kernels add up in the same order; the products are exact in small integers."""
    loss, arguments = case(name, 300, 400)
    arguments[:2] = [torch.randint(-2, 3, t.shape).float() for t in arguments[:2]]
    expected = evaluate("cpu", loss, arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = evaluate("cpu", loss, arguments)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(ours.loss, expected.loss)
    for a, b in zip(ours.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_call
def test_repeats_bit_for_bit(name: str) -> None:
    loss, arguments = case(name, 400, 900, 24)
    weight = torch.ones(400) if name in ("rows", "lse") else None
    one, two = (evaluate("cpu", loss, arguments, weight) for _ in range(2))
    for a, b in zip((one.loss, *one.gradients), (two.loss, *two.gradients), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_is_fp32_and_gradients_have_the_dtype_of_the_arguments(dtype: torch.dtype) -> None:
    loss, (q, c, bias, scale) = case("bias")
    for bias_dtype in (torch.float32, torch.bfloat16, torch.float64):
        result = evaluate("cpu", loss, [q.to(dtype), c.to(dtype), bias.to(bias_dtype), scale])
        kinds = [result.loss.dtype, *(g.dtype for g in result.gradients)]
        assert kinds == [torch.float32, dtype, dtype, bias_dtype, torch.float32]


# ---- autograd


def test_reference_supports_double_backward() -> None:
    loss, arguments = call(4, 5, 3, bias=True, scale=3.0)
    with ssl_kernels.use_backend("reference"):
        assert torch.autograd.gradgradcheck(loss, [t.double().requires_grad_() for t in arguments])


@each_call
@pytest.mark.parametrize("backend", FUSED)
def test_double_backward_is_refused(name: str, backend: str) -> None:
    loss, arguments = case(name)
    leaves = [t.requires_grad_() for t in arguments]
    with ssl_kernels.use_backend(backend):
        gradients = torch.autograd.grad(loss(*leaves).sum(), leaves, create_graph=True)
        for gradient in gradients:
            with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
                gradient.sum().backward(retain_graph=True)


def test_forward_mode_and_functional_transforms_are_refused() -> None:
    for loss, (q, *others) in (case("plain"), case("lse")):
        for transform in (
            lambda loss=loss, q=q, o=others: torch.func.jvp(lambda q: loss(q, *o), (q,), (q,)),
            lambda loss=loss, q=q, o=others: torch.func.grad(lambda q: loss(q, *o).sum())(q),
        ):
            with pytest.raises(NotImplementedError, match="use_backend\\('reference'\\)"):
                transform()


@each_call
def test_upstream_gradients_scale_the_result_and_retain_graph_repeats_it(name: str) -> None:
    loss, arguments = case(name)
    leaves = [t.requires_grad_() for t in arguments]
    value = loss(*leaves).sum()
    once = torch.autograd.grad(value, leaves, retain_graph=True)
    twice = torch.autograd.grad(value * 2, leaves, retain_graph=True)
    again = torch.autograd.grad(value, leaves)
    for a, b, c in zip(once, twice, again, strict=True):
        torch.testing.assert_close(b, 2 * a, rtol=1e-6, atol=0)
        assert torch.equal(a, c)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_of_one_element_gets_its_gradient(backend: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    loss, arguments = case("bias")
    exact = oracle(loss, arguments)
    arguments[-1] = arguments[-1].to(dtype).reshape(shape)
    gradient = evaluate(backend, loss, arguments).gradients[-1]
    assert (gradient.shape, gradient.dtype) == (shape, dtype)
    torch.testing.assert_close(gradient.reshape(()).double(), exact.gradients[-1], rtol=1e-5, atol=1e-5)


def test_backward_uses_the_backend_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    stats, grad = row_tiles.PANELS["eager"]
    monkeypatch.setitem(row_tiles.PANELS, "eager", (stats, lambda *a: calls.append(1) or grad(*a)))
    loss, arguments = case("lse")
    with ssl_kernels.use_backend("eager"):
        value = loss(arguments[0].requires_grad_(), *arguments[1:])
    value.sum().backward()
    assert len(calls) == 1


# ---- torch's machinery


def packed(name: str, backend: str, needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> Arguments:
    """The arguments of the op that a call comes to."""
    found: list[Arguments] = []
    monkeypatch.setattr("ssl_kernels.ops.row_softmax.row_softmax", lambda a: found.append(a) or [torch.zeros(())])
    loss, arguments = case(name, 5, 7, 8)
    leaves = [t.requires_grad_(need) for t, need in zip(arguments, needs, strict=False)]
    with ssl_kernels.use_backend(backend):
        loss(*leaves)
    monkeypatch.undo()
    return found[0]


@covering(1, name=CALLS, backend=FUSED, needs=[(True,) * 4, (False,) * 4, (False, True, False, False)])
def test_opcheck(name: str, backend: str, needs: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = packed(name, backend, needs, monkeypatch)
    every = ("test_schema", "test_faketensor", "test_autograd_registration")
    utils = (*every, "test_aot_dispatch_dynamic") if name == "plain" else every
    torch.library.opcheck(row_softmax.in_graphs, tuple(arguments), test_utils=utils)


def gradients_of(function: Any, arguments: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in arguments]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@each_call
def test_compiles_without_a_graph_break(name: str) -> None:
    torch._dynamo.reset()
    inner, arguments = case(name)

    def loss(*leaves: Tensor) -> Tensor:
        return inner(*(F.normalize(t, dim=-1) for t in leaves[:2]), *leaves[2:-1], leaves[-1].square()).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients_of(compiled, arguments), gradients_of(loss, arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compiles_with_a_dynamic_batch() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(K.row_softmax_loss, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for rows in (9, 19, 33):
        query, candidates = features(rows, rows + 10, 8)
        expected = evaluate("cpu", K.row_softmax_loss, [query, candidates, torch.tensor(10.0)])
        compiled(query.requires_grad_(), candidates, torch.tensor(10.0)).backward()
        torch.testing.assert_close(query.grad, expected.gradients[0], rtol=1e-5, atol=1e-6)
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_autocast_casts_features_and_nothing_else() -> None:
    loss, arguments = call(20, 40, 16, bias=True, scale=117.3)  # 117.5 in bf16
    leaves = [t.clone().requires_grad_() for t in arguments]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(*leaves)
    value.backward()
    exact = oracle(loss, [*(t.bfloat16() for t in arguments[:2]), *arguments[2:]])
    torch.testing.assert_close(value.detach().double(), exact.loss, rtol=2e-6, atol=0)
    for leaf, gradient in zip(leaves, exact.gradients, strict=True):
        assert leaf.grad is not None
        assert leaf.grad.dtype == torch.float32
        assert distance(leaf.grad, gradient) <= 2**-5 * gradient.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_other_devices_go_through_the_fake_op(reduction: str) -> None:
    q, c, bias = (torch.empty(*shape, device="meta", requires_grad=True) for shape in ((6, 4), (9, 4), (9,)))
    for loss in (
        K.row_softmax_loss(q, c, 10.0, candidate_bias=bias, reduction=reduction),
        K.row_softmax_loss(q, c, 10.0, candidate_bias=bias, reduction=reduction, dims=(2, 4), normalize=True),
        K.row_lse(q, c, 10.0, candidate_bias=bias),
    ):
        assert loss.shape in ((), (6,))
        gradients = torch.autograd.grad(loss.sum(), (q, c, bias))
        assert [g.shape for g in gradients] == [(6, 4), (9, 4), (9,)]


def test_inference_mode() -> None:
    for name in CALLS:
        loss, arguments = case(name)
        expected = loss(*arguments)
        with torch.inference_mode():
            assert torch.equal(loss(*arguments), expected)


# ---- memory


@linux_only
@pytest.mark.parametrize(("name", "budget_mb"), [*((name, 0) for name in CALLS), ("plain", 10), ("prefixes", 10)])
def test_peak_and_saved_memory_are_linear_in_the_batch(name: str, budget_mb: int) -> None:
    """The similarity matrix alone would be 64 MB; the features are 3 MB."""
    loss, arguments = case(name, 2896, 5792, 96)
    evaluate("cpu", *case("bias", 64, 64))  # one-off buffers of the libraries
    leaves = [t.requires_grad_() for t in arguments]
    size = sum(t.nbytes for t in arguments)

    def step() -> None:
        reuse.warm.free_down_to(0)
        with saved_bytes() as sizes:
            value = loss(*leaves).sum()
        assert sum(sizes) <= 2 * size + 2**20
        value.backward()

    with ssl_kernels.use_tile_budget(budget_mb), ssl_kernels.use_workspace(4):
        peak = peak_mb(step)
    assert peak < 3 * size / 2**20 + 8 + budget_mb


@linux_only
def test_peak_memory_is_a_tenth_of_that_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 queries and 8,192 candidates by default; the formula, as sentence-transformers has it, takes five matrices
    beside the gradients."""
    leave_out_onednn(monkeypatch)
    leaves = [t.requires_grad_() for t in (*features(4096, 8192, 128), torch.tensor(20.0))]
    gradients = sum(t.nbytes for t in leaves)
    peak = peak_mb(lambda: K.row_softmax_loss(*leaves).backward(), calls=2) * 2**20
    assert peak < (5 * 4 * 4096 * 8192 + gradients) / 10
    assert peak < gradients + 25 * 2**20


@pytest.mark.parametrize("workspace_mb", [64, 5])  # one visit, and two passes
def test_the_memory_of_a_tile_is_that_of_the_next_call_unless_the_budget_is_0(
    workspace_mb: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_onednn(monkeypatch)
    loss, arguments = call(1024, 6144)
    reuse.let_go()
    held = []
    for budget in (1, 1, 0):
        with ssl_kernels.use_workspace(workspace_mb), ssl_kernels.use_tile_budget(budget):
            evaluate("cpu", loss, arguments)
        held.append([id(memory) for memory in reuse._held])
    assert len(held[0]) == 1
    assert held == [held[0], held[0], []]


@pytest.mark.parametrize("loss", [K.clip_loss, K.row_softmax_loss])
def test_a_budget_of_0_releases_in_the_next_loss_however_small(loss: Callable[..., Tensor]) -> None:
    x, y = (torch.randn(4, 3, requires_grad=True) for _ in range(2))
    reuse.empty((2**20,), x)
    loss(x, y, 2.0).backward()
    assert reuse._held
    with ssl_kernels.use_tile_budget(0):
        loss(x, y, 2.0).backward()
    assert reuse._held == []


def test_gradients_that_wait_for_upstream_ones_let_no_tile_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "_ONE_TILE", 0)
    reuse.let_go()
    loss, arguments = call(64, 128)
    with ssl_kernels.use_workspace(TILE_MB):
        evaluate("cpu", loss, arguments)
        held = reuse.warm.nbytes
        assert held
        K.row_lse(*(t.detach().requires_grad_() for t in arguments[:2]), 2.0).sum().backward()
    assert reuse.warm.nbytes == held


@linux_only
def test_no_grad_keeps_nothing() -> None:
    loss, arguments = call(512, 600)
    reuse.warm.free_down_to(0)
    with torch.no_grad(), saved_bytes() as sizes:
        loss(*(t.requires_grad_() for t in arguments))
    assert sizes == []
    assert reuse.warm.nbytes == 0


# ---- errors


def test_the_kernels_check_their_own_arguments() -> None:
    ops = torch.ops.ssl_kernels
    tiles, stats, target = [torch.zeros(2, 3)], torch.zeros(1, 2, 4).double(), torch.zeros(2, dtype=torch.int64)
    pairs = [target, None, None, 0, False, False, 1.0, 1.0, 1.0, None, None, None]
    for place, bad, message in (
        (0, target[:1], "target: expected size 2 in dimension 0, got 1"),
        (1, target, "row_ids, col_ids: expected both or neither"),
        (3, 5, "same_id: expected 0, 1 or 2, got 5"),
        (6, -1.0, "scale: expected a number >= 0, got -1"),
        (8, 2.0, "logits: expected true beside a bias, factors or several scales"),
        (9, torch.zeros(3), "logits: expected true beside a bias, factors or several scales"),
        (10, torch.ones(1, 2), "row_factors, col_factors: expected both or neither"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.row_softmax_stats_(tiles, stats, *pairs[:place], bad, *pairs[place + 1 :])
    for change, message in (
        ([[], stats], "tiles: expected at least one"),
        ([[*tiles, torch.zeros(2, 4)], stats], "tiles: expected size 3 in dimension 1, got 4"),
        ([2 * tiles, stats], "stats: expected size 2 in dimension 0, got 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.row_softmax_stats_(*change, *pairs)
    moments, sums, sides = torch.zeros(2, 1).double(), torch.zeros(1, 0, 1, 3), torch.zeros(1, 4, 2)
    ops.row_softmax_grad_(tiles, moments, sums, sides, True, True, *pairs)
    for change, message in (
        ([moments.float(), sums, sides], "moments: expected dtype Double, got Float"),
        ([moments, sides, sides], "col_sums: expected 4 dimensions, got 3"),
        ([moments, sums, sides[:, :3]], "sides: expected 4 or 5 vectors, got 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.row_softmax_grad_(tiles, *change, True, True, *pairs)
    loss, largest, stats, side = torch.zeros(()), torch.zeros(1), stats[0], sides[0]
    ops.row_softmax_summary_(stats, 1.0, 0.0, True, False, None, loss, largest, side)
    for change, message in (
        ([torch.ones(3), loss, largest, side], "weights: expected size 2 in dimension 0, got 3"),
        ([None, loss.double(), largest, side], "loss: expected dtype Float, got Double"),
        ([None, loss, torch.zeros(2), side], "largest: expected size 1 in dimension 0, got 2"),
        ([None, loss, largest, side[:3]], r"side: expected contiguous \[4, 2\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.row_softmax_summary_(stats, 1.0, 0.0, True, False, *change)


def test_a_negative_scale_is_refused_by_the_kernel() -> None:
    x, y = features(4, 4, 4)
    with pytest.raises(RuntimeError, match="scale: expected a number >= 0, got -2"):
        K.row_softmax_loss(x, y, torch.tensor(-2.0))
