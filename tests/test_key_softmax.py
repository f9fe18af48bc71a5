"""The softmax over frozen keys against its definition in float64."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
from contrastive import BACKENDS, FUSED, HALF_EPS, distance, dtypes, lay_out, layouts, unit_rows, workspaces_mb
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from memory import linux_only, peak_mb, saved_bytes
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.ops import key_softmax
from ssl_kernels.ops.matmul import onednn_is_faster


class Result(NamedTuple):
    lse: Tensor
    mean: Tensor
    dquery: Tensor
    dscale: Tensor


def run(backend: str, query: Tensor, keys: Tensor, scale: float, weight: Tensor | None = None) -> Result:
    """Outputs and gradients; ``weight`` is the upstream gradient of lse."""
    query = query.detach().requires_grad_()
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    t = torch.tensor(scale, dtype=kind, requires_grad=True)
    with ssl_kernels.use_backend(backend):
        lse, mean = K.key_softmax(query, keys, t)
        lse.backward(torch.ones_like(lse) if weight is None else weight.to(lse.dtype))
    assert not mean.requires_grad
    assert query.grad is not None
    assert t.grad is not None
    return Result(lse.detach(), mean, query.grad, t.grad)


def oracle(query: Tensor, keys: Tensor, scale: float, weight: Tensor | None = None) -> Result:
    return run("reference", query.double(), keys.double(), scale, None if weight is None else weight.double())


def assert_close(ours: Result, eager: Result, exact: Result, scale: float, weight: Tensor, dtype: torch.dtype) -> None:
    """err(ours) <= 2 err(plain PyTorch in fp32) + rounding, for both outputs and both gradients.

    The rounding of a similarity of unit vectors is multiplied by the scale in a logit, hence in lse and, relative to
    the keys, in the mean; and the gradients are made of the mean.
    """
    logit = 3e-7 * (1 + abs(scale))
    terms = {
        "lse": logit * exact.lse.numel() ** 0.5,
        "mean": logit * exact.lse.numel() ** 0.5,
        "dquery": logit * abs(scale) * weight.norm().item(),
        "dscale": logit * weight.norm().item(),
    }
    for name in Result._fields:
        a, e, o = getattr(ours, name), getattr(eager, name), getattr(exact, name)
        assert a.shape == o.shape
        eps = HALF_EPS.get(dtype, 1e-6) if name == "dquery" else 1e-6
        subnormal = 2**-25 * a.numel() ** 0.5 if a.dtype == torch.float16 else 1e-30
        assert distance(a, o) <= 2 * distance(e, o) + eps * o.norm().item() + terms[name] + subnormal, name


# ---- values and gradients


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(
    rows=st.integers(0, 40),
    cols=st.integers(1, 90),
    width=st.integers(1, 40),
    dtype=dtypes,
    key_dtype=dtypes,
    layout=layouts,
    key_layout=layouts,
    scale=st.sampled_from([0.0, 0.3, 14.3, 117.0, -2.0]),
    workspace_mb=workspaces_mb,
    seed=st.integers(0, 2**16),
)
def test_matches_the_float64_reference(
    backend: str, rows: int, cols: int, width: int, dtype: torch.dtype, key_dtype: torch.dtype, layout: str,
    key_layout: str, scale: float, workspace_mb: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    query, keys = lay_out(unit_rows(rows, width, dtype), layout), lay_out(unit_rows(cols, width, key_dtype), key_layout)
    weight = torch.randn(rows)
    with ssl_kernels.use_workspace(workspace_mb):
        ours = run(backend, query, keys, scale, weight)
    exact = oracle(query, keys, scale, weight)
    eager = run("reference", query.float(), keys.float(), scale, weight)
    assert_close(ours, eager, exact, scale, weight, dtype)
    assert ours.lse.dtype == ours.mean.dtype == torch.float32
    assert ours.dquery.dtype == dtype


@pytest.mark.parametrize("width", [128, 512, 1152])
@pytest.mark.parametrize("scale", [5.0, 100.0])
def test_a_training_sized_queue_is_as_exact_as_plain_pytorch(width: int, scale: float) -> None:
    query, keys, weight = unit_rows(96, width), unit_rows(8192, width), torch.rand(96)
    arguments = (query, keys, scale, weight)
    assert_close(run("cpu", *arguments), run("reference", *arguments), oracle(*arguments), scale, weight, query.dtype)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradcheck(backend: str) -> None:
    query, keys = unit_rows(4, 3).double().requires_grad_(), unit_rows(9, 3).double()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0005):
        assert torch.autograd.gradcheck(lambda q, t: K.key_softmax(q, keys, t)[0], (query, scale))


def test_reference_supports_double_backward() -> None:
    query, keys = unit_rows(4, 3).double().requires_grad_(), unit_rows(5, 3).double()
    with ssl_kernels.use_backend("reference"):
        assert torch.autograd.gradgradcheck(lambda q: K.key_softmax(q, keys, 3.0)[0], (query,))


@pytest.mark.parametrize("backend", FUSED)
def test_double_backward_is_refused(backend: str) -> None:
    query = unit_rows(4, 3).requires_grad_()
    with ssl_kernels.use_backend(backend):
        lse, _ = K.key_softmax(query, unit_rows(5, 3), 2.0)
        (gradient,) = torch.autograd.grad(lse.sum(), query, create_graph=True)
        with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
            gradient.sum().backward()


def test_forward_mode_and_functional_transforms_are_refused() -> None:
    query, keys = unit_rows(4, 3), unit_rows(5, 3)

    def loss(query: Tensor) -> Tensor:
        return K.key_softmax(query, keys, 2.0)[0].sum()

    for transform in (lambda: torch.func.jvp(loss, (query,), (query,)), lambda: torch.func.grad(loss)(query)):
        with pytest.raises(NotImplementedError, match="use_backend\\('reference'\\)"):
            transform()
    with ssl_kernels.use_backend("reference"):
        torch.testing.assert_close(torch.func.grad(loss)(query), run("cpu", query, keys, 2.0).dquery)


# ---- properties


@hypothesis_settings(max_examples=30)
@given(cols=st.integers(1, 80), workspace_mb=workspaces_mb, seed=st.integers(0, 1000))
def test_the_order_of_the_keys_does_not_matter(cols: int, workspace_mb: float, seed: int) -> None:
    torch.manual_seed(seed)
    query, keys = unit_rows(9, 8), unit_rows(cols, 8)
    with ssl_kernels.use_workspace(workspace_mb):
        a, b = run("cpu", query, keys, 20.0), run("cpu", query, keys[torch.randperm(cols)], 20.0)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_in_two_tensors_merge_exactly(backend: str) -> None:
    """log-sum-exps by logaddexp, means by the softmax of the two log-sum-exps."""
    query, keys = unit_rows(9, 8).double(), unit_rows(70, 8).double()
    if backend == "cpu":
        query, keys = query.float(), keys.float()
    with ssl_kernels.use_backend(backend):
        (lse, mean), (a, mean_a), (b, mean_b) = (K.key_softmax(query, k, 20.0) for k in (keys, keys[:13], keys[13:]))
    torch.testing.assert_close(torch.logaddexp(a, b), lse)
    torch.testing.assert_close(torch.lerp(mean_a, mean_b, torch.sigmoid(b - a)[:, None]), mean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_duplicates_add_the_logarithm_of_their_number(backend: str) -> None:
    query, keys = unit_rows(9, 8), unit_rows(30, 8)
    once, often = run(backend, query, keys, 20.0), run(backend, query, keys.repeat(7, 1), 20.0)
    torch.testing.assert_close(often.lse, once.lse + math.log(7))
    torch.testing.assert_close(often.mean, once.mean)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("shift", [-9.0, 9.0])
def test_a_shift_of_all_logits_shifts_lse_and_nothing_else(backend: str, shift: float) -> None:
    """The shift is a feature of its own: 180 at scale 20, far beyond the range of exp in fp32."""
    query, keys = unit_rows(9, 8), unit_rows(300, 8)
    wide_query, wide_keys = torch.cat([query, torch.full((9, 1), shift)], 1), torch.cat([keys, torch.ones(300, 1)], 1)
    with ssl_kernels.use_workspace(0.01):
        plain, shifted = run(backend, query, keys, 20.0), run(backend, wide_query, wide_keys, 20.0)
    torch.testing.assert_close(shifted.lse, plain.lse + 20 * shift)
    torch.testing.assert_close(shifted.mean[:, :8], plain.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shifted.mean[:, 8], torch.ones(9))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("scale", [100.0, -100.0])
@pytest.mark.parametrize("workspace_mb", [64, 1e-6])
def test_the_largest_of_huge_similarities_is_alone(backend: str, scale: float, workspace_mb: float) -> None:
    """A logit of 9e12 is rounded by half a million: similarities are compared, not what is left of their products."""
    query, keys = torch.tensor([[3e5], [-3e5], [1.0]]), torch.tensor([[3e5], [0.0], [-3e5], [3e5 - 1]])
    with ssl_kernels.use_workspace(workspace_mb):
        ours = run(backend, query, keys, scale)
    exact = oracle(query, keys, scale)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", FUSED)
def test_the_size_of_a_panel_does_not_matter(backend: str) -> None:
    query, keys = unit_rows(70, 16), unit_rows(900, 16)
    expected = run(backend, query, keys, 5.0)
    for workspace_mb in (0.05, 0.01, 0.001):
        with ssl_kernels.use_workspace(workspace_mb):
            for a, b in zip(run(backend, query, keys, 5.0), expected, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_result_does_not_depend_on_the_number_of_threads(threads: int) -> None:
    """The products are exact in small integers, and the kernel adds up in the same order in one thread or many."""
    query, keys = torch.randint(-2, 3, (300, 16)).float(), torch.randint(-2, 3, (200, 16)).float()
    expected = run("cpu", query, keys, 0.3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(run("cpu", query, keys, 0.3).lse, expected.lse)
    finally:
        torch.set_num_threads(before)


def test_repeats_bit_for_bit() -> None:
    query, keys = unit_rows(500, 48), unit_rows(9000, 48)
    for a, b in zip(run("cpu", query, keys, 14.0), run("cpu", query, keys, 14.0), strict=True):
        assert torch.equal(a, b)


# ---- numerics


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("normalised", [True, False])
def test_temperature_001_at_1152_features(backend: str, normalised: bool) -> None:
    """Logits of hundreds, or thousands without normalisation: no fixed maximum would do."""
    query, keys = torch.randn(20, 1152), torch.randn(400, 1152)
    if normalised:
        query, keys = torch.nn.functional.normalize(query), torch.nn.functional.normalize(keys)
    weight = torch.ones(20)
    with ssl_kernels.use_workspace(0.1):
        ours = run(backend, query, keys, 100.0, weight)
    exact, eager = oracle(query, keys, 100.0, weight), run("reference", query, keys, 100.0, weight)
    for name in Result._fields:
        a, e, o = (getattr(r, name) for r in (ours, eager, exact))
        assert distance(a, o) <= 2 * distance(e, o) + 3e-6 * o.norm(), name


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("order", [1, -1])
def test_panels_that_underflow_against_each_other(backend: str, order: int) -> None:
    """Logits that rise, or fall, by 10 from key to key: from panel to panel what came before, or comes, is nothing."""
    levels = torch.arange(400.0) * 10 if order == 1 else torch.arange(399.0, -1, -1) * 10
    query = torch.tensor([[1.0], [-1.0]])
    with ssl_kernels.use_workspace(0.0005):
        ours = run(backend, query, levels[:, None], 1.0)
    exact = oracle(query, levels[:, None], 1.0)
    for a, o in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), o, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_rows_far_below_the_others_of_their_tile_keep_their_precision(backend: str) -> None:
    query, keys = unit_rows(12, 6), torch.cat([unit_rows(50, 6), torch.ones(50, 1)], 1)
    query = torch.cat([query, torch.linspace(-3000, 3000, 12)[:, None]], 1)
    ours, exact = run(backend, query, keys, 1.0), oracle(query, keys, 1.0)
    torch.testing.assert_close(ours.mean.double(), exact.mean, rtol=0, atol=5e-4)  # 3000 has a spacing of 2.4e-4
    torch.testing.assert_close(ours.lse.double(), exact.lse, rtol=1e-6, atol=0)


@pytest.mark.parametrize("cols", [2**20 + 3, 70_000])
def test_few_queries_against_very_many_keys(cols: int) -> None:
    """Long rows of equal terms: every rounding has the same sign, and fp32 sums alone would drift."""
    query, keys = torch.ones(2, 1), torch.full((cols, 1), 0.3)
    ours = run("cpu", query, keys, 10.0)
    torch.testing.assert_close(ours.lse, torch.full((2,), 3 + math.log(cols)), rtol=3e-7, atol=0)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("argument", ["query", "keys", "scale"])
@pytest.mark.parametrize("workspace_mb", [64, 0.0005])
def test_non_finite_input_gives_what_logsumexp_and_softmax_give(
    backend: str, argument: str, workspace_mb: float
) -> None:
    values: dict[str, Any] = {"query": unit_rows(20, 4), "keys": unit_rows(90, 4), "scale": 10.0}
    for bad in (math.nan, math.inf, -math.inf):
        if argument == "scale":
            values["scale"] = bad
        else:
            values[argument][7, 1] = bad
        with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(workspace_mb):
            lse, mean = K.key_softmax(**values)
        with ssl_kernels.use_backend("reference"):
            expected_lse, expected_mean = K.key_softmax(**values)
        assert not expected_lse.isfinite().all()
        torch.testing.assert_close(lse, expected_lse, equal_nan=True)
        assert torch.equal(mean.isfinite(), expected_mean.isfinite())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("workspace_mb", [64, 0.0005])
def test_infinite_logits_give_what_logsumexp_gives(backend: str, workspace_mb: float) -> None:
    """One feature: the logits are the keys, times the query's sign."""
    inf = math.inf
    rows = {
        "all -inf": [-inf] * 40,
        "-inf first": [-inf] * 39 + [2.0],
        "+inf last": [1.0] * 39 + [inf],
        "+inf among large": [500.0] * 20 + [inf] + [3.0] * 19,
        "both": [inf] + [-inf] * 39,
        "NaN and +inf": [math.nan] + [inf] * 39,
    }
    for name, row in rows.items():
        keys = torch.tensor(row)[:, None]
        with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(workspace_mb):
            lse, mean = K.key_softmax(torch.ones(3, 1), keys, 1.0)
        assert torch.equal(lse.nan_to_num(7), keys[:, 0].logsumexp(0).expand(3).nan_to_num(7)), name
        assert mean.isfinite().all() == ((keys[:, 0].softmax(0) @ keys).isfinite().all()), name


def test_scalings_wait_for_the_fp32_sum() -> None:
    """Under a loss scale of 2^16 and a mean over 65,536 rows, no gradient of fp16 queries is lost."""
    rows = 65_536
    query, keys = unit_rows(rows, 8, torch.float16), unit_rows(64, 8, torch.float16)
    weight = torch.full((rows,), 65_536.0 / rows)
    ours, exact = run("cpu", query, keys, 10.0, weight), oracle(query, keys, 10.0, weight)
    assert distance(ours.dquery, exact.dquery) <= 2**-10 * exact.dquery.norm()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_fp32_products_are_as_exact_as_torch_is_told(precision: str) -> None:
    """A lower precision is the user's choice, never ours."""
    query, keys = unit_rows(200, 256), unit_rows(600, 256)
    exact = oracle(query, keys, 100.0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        ours, eager = run("cpu", query, keys, 100.0), run("reference", query, keys, 100.0)
    finally:
        torch.set_float32_matmul_precision(before)
    allowed = 2e-5 * exact.mean.norm() + (0 if precision == "highest" else 4 * distance(eager.mean, exact.mean))
    assert distance(ours.mean, exact.mean) <= allowed


# ---- edges


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "cols", "width"), [(0, 0, 4), (0, 5, 4), (5, 0, 4), (3, 4, 0), (1, 1, 1)])
def test_empty_and_tiny_inputs(backend: str, rows: int, cols: int, width: int) -> None:
    query, keys = torch.ones(rows, width), torch.ones(cols, width)
    for a, o in zip(run(backend, query, keys, 2.0), oracle(query, keys, 2.0), strict=True):
        torch.testing.assert_close(a.double(), o)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("want_mean", [False, True])
@pytest.mark.parametrize("backend", FUSED)
def test_only_what_is_needed(backend: str, want_mean: bool, needed: tuple[bool, bool]) -> None:
    query, keys = unit_rows(30, 6), unit_rows(50, 6)
    exact = oracle(query, keys, 10.0)
    leaves = [query, torch.tensor(10.0)]
    for leaf, need in zip(leaves, needed, strict=True):
        leaf.requires_grad_(need)
    with ssl_kernels.use_backend(backend):
        lse, mean = K.key_softmax(leaves[0], keys, leaves[1], want_mean=want_mean)
        torch.testing.assert_close(lse.detach().double(), exact.lse, rtol=1e-5, atol=1e-6)
        if want_mean:
            torch.testing.assert_close(mean.double(), exact.mean, rtol=1e-5, atol=1e-6)
        assert lse.requires_grad == any(needed)
        if any(needed):
            lse.sum().backward()
    for leaf, need, expected in zip(leaves, needed, exact[2:], strict=True):
        if need:
            torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-5, atol=1e-5)
        else:
            assert leaf.grad is None


def test_without_a_mean_there_is_one_product_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssl_kernels.ops import contrastive, panels

    products: list[tuple[int, ...]] = []
    monkeypatch.setattr(contrastive, "_ONE_TILE", 0)
    monkeypatch.setattr(panels, "add_matmul", lambda out, a, b, first: products.append(a.shape))
    query, keys = unit_rows(40, 8).requires_grad_(), unit_rows(50, 8)
    with torch.no_grad():
        _, mean = K.key_softmax(query, keys, 10.0, want_mean=False)
    assert products == []
    assert mean.numel() == 0
    K.key_softmax(query, keys, 10.0, want_mean=False)  # the gradient needs the mean
    assert products == [(40, 50)]


@pytest.mark.parametrize(("wanted", "products"), [(False, 1), (True, 2)])
def test_one_tile_is_multiplied_only_as_often_as_needed(wanted: bool, products: int) -> None:
    query, keys = unit_rows(40, 8).requires_grad_(wanted), unit_rows(50, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        K.key_softmax(query, keys, 10.0, want_mean=False)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert (counts["ssl_kernels::key_softmax_of_one_tile"], counts["aten::mm"]) == (1, products)


# ---- torch's machinery


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend: str) -> None:
    for want_mean, needs, dtype in itertools.product((True, False), (True, False), (torch.float32, torch.bfloat16)):
        if needs and not want_mean:
            continue
        query = unit_rows(9, 4).requires_grad_(needs)
        scale = torch.tensor(10.0, requires_grad=needs)
        arguments = (query, unit_rows(13, 4), scale, want_mean, dtype, 2**26, backend)
        torch.library.opcheck(key_softmax._op.in_graphs, arguments)


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck_of_the_gradients(backend: str) -> None:
    query, pull, scale = torch.randn(5, 3), torch.randn(5, 3), torch.tensor(10.0)
    for needs in itertools.product([False, True], repeat=3):
        for upstream, slope in ((torch.randn(5), None), (torch.randn(()), torch.rand(5))):
            arguments = (upstream, slope, query, pull, scale, needs, backend)
            torch.library.opcheck(key_softmax.gradients.in_graphs, arguments)


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(compiler: str) -> None:
    torch._dynamo.reset()
    query, keys = torch.randn(33, 8), unit_rows(70, 8)

    def loss(query: Tensor, scale: Tensor) -> Tensor:
        lse, mean = K.key_softmax(torch.nn.functional.normalize(query), keys, scale.exp())
        return (lse + mean.sum(1)).sum()

    def gradients(function: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (query, torch.tensor(2.3))]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    expected = gradients(loss)
    for a, b in zip(gradients(compiled), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(query, torch.tensor(2.3)), expected[0])


def test_compiles_with_a_dynamic_batch() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k: K.key_softmax(q, k, 5.0)[0], fullgraph=True, dynamic=True, backend=counter)
    keys, compiled_frames = unit_rows(64, 8), set()
    for rows in (9, 19, 33):
        query = unit_rows(rows, 8).requires_grad_()
        compiled(query, keys).sum().backward()
        torch.testing.assert_close(query.grad, run("cpu", query, keys, 5.0).dquery)
        compiled_frames.add(counter.frame_count)
    assert len(compiled_frames) == 1


def test_autocast_casts_the_query_and_neither_the_keys_nor_the_scale() -> None:
    query, keys = unit_rows(40, 16).requires_grad_(), unit_rows(60, 16)
    scale = torch.tensor(117.3, requires_grad=True)  # 117.5 in bf16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lse, _ = K.key_softmax(query, keys, scale)
    lse.sum().backward()
    exact = oracle(query.detach().bfloat16(), keys, scale.item())
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.detach().double(), exact.lse, rtol=1e-6, atol=2e-5)
    assert query.grad is not None
    assert query.grad.dtype == torch.float32
    assert distance(query.grad, exact.dquery) <= 2**-8 * exact.dquery.norm()


def test_inference_mode() -> None:
    query, keys = unit_rows(8, 4), unit_rows(9, 4)
    expected = K.key_softmax(query, keys, 10.0)
    with torch.inference_mode():
        for a, b in zip(K.key_softmax(query, keys, 10.0), expected, strict=True):
            assert torch.equal(a, b)


def test_other_devices_go_through_the_fake_op() -> None:
    query, keys = torch.empty(6, 4, device="meta", requires_grad=True), torch.empty(5, 4, device="meta")
    lse, mean = K.key_softmax(query, keys, 10.0)
    lse.sum().backward()
    assert lse.shape == (6,)
    assert mean.shape == (6, 4)
    assert query.grad is not None
    assert query.grad.shape == query.shape


# ---- memory


@linux_only
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "bfloat16"])
def test_peak_and_saved_memory_know_nothing_of_the_number_of_keys(layout: str) -> None:
    """The similarities would be 64 MB, a copy of the keys 32 MB in fp32."""
    query, keys = unit_rows(128, 64).requires_grad_(), unit_rows(2**17, 64)
    keys = keys.bfloat16() if layout == "bfloat16" else lay_out(keys, layout)
    K.key_softmax(query, keys[:64], 10.0)[0].sum().backward()  # one-off buffers of the libraries

    def step() -> None:
        with saved_bytes() as sizes:
            lse, _ = K.key_softmax(query, keys, 10.0)
        assert sum(sizes) <= 2 * 128 * 64 * 4 + 64  # the query and the mean
        lse.sum().backward()

    assert peak_mb(step, calls=3) < 20


@linux_only
def test_no_grad_keeps_nothing() -> None:
    query = unit_rows(64, 8).requires_grad_()
    with torch.no_grad(), saved_bytes() as sizes:
        K.key_softmax(query, unit_rows(512, 8), 10.0)
    assert sizes == []


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(3)}, ValueError, r"query: expected 2 dimensions .* got shape \(3,\)"),
        ({"query": [1.0]}, TypeError, "query: expected a tensor, got list"),
        ({"keys": None}, TypeError, "keys: expected a tensor, got NoneType"),
        ({"keys": torch.ones(5, 4).int()}, TypeError, "keys: expected dtype float32, .* got torch.int32"),
        ({"keys": torch.ones(4, 5)}, ValueError, "keys: expected 4 features as the query has, got 5"),
        ({"keys": torch.ones(5, 4, device="meta")}, ValueError, "keys: expected the device of the query .* got meta"),
        (
            {"keys": torch.ones(5, 4, requires_grad=True)},
            ValueError,
            r"keys: expected keys without gradient.*detach\(\)",
        ),
        ({"scale": "10"}, TypeError, "scale: expected a float or a tensor of one element, got str"),
        ({"scale": torch.ones(2)}, ValueError, "scale: expected a float or a floating tensor of one element"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"query": torch.ones(3, 4), "keys": torch.ones(5, 4), "scale": 10.0}
    with pytest.raises(error, match=message):
        K.key_softmax(**(arguments | change))


def test_keys_that_require_a_gradient_may_be_used_where_none_is_taken() -> None:
    keys = unit_rows(5, 4).requires_grad_()
    with torch.no_grad():
        assert K.key_softmax(unit_rows(3, 4), keys, 10.0)[0].isfinite().all()


def test_the_kernel_checks_its_own_arguments() -> None:
    op = torch.ops.ssl_kernels.key_softmax_panel_
    tile, stats, mean = torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 5)
    for arguments, message in (
        ((tile.double(), stats, mean), "tile: expected dtype Float, got Double"),
        ((torch.zeros(3, 2).t(), stats, mean), "tile: expected unit stride"),
        ((torch.zeros(1, 3).expand(2, 3), stats, mean), "tile: expected rows that do not overlap"),
        ((tile, stats.float(), mean), "stats: expected dtype Double, got Float"),
        ((tile, stats[:1], mean), "stats: expected size 2 in dimension 0, got 1"),
        ((tile, stats[:, :1], mean), "stats: expected size 2 in dimension 1, got 1"),
        ((tile, torch.zeros(2, 2, dtype=torch.float64).t(), mean), "stats: expected a contiguous tensor"),
        ((tile, stats, mean[:1]), "mean: expected size 2 in dimension 0, got 1"),
        ((tile, stats, mean.double()), "mean: expected dtype Float, got Double"),
    ):
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 1.0)


def test_the_kernels_of_the_rows_check_their_own_arguments() -> None:
    ops, x, lse, none = torch.ops.ssl_kernels, torch.zeros(3, 4), torch.zeros(3), torch.zeros(0, 4)
    stats, scalar = torch.zeros(3, 2).double(), torch.zeros(())
    for call, message in (
        (lambda: ops.key_softmax_rows_(stats.float(), 1.0, x, lse), "stats: expected dtype Double, got Float"),
        (lambda: ops.key_softmax_rows_(stats, 1.0, x[:2], lse), "mean: expected size 3 in dimension 0, got 2"),
        (lambda: ops.key_softmax_rows_(stats, 1.0, x, lse[:2]), "loss: expected size 3 in dimension 0, got 2"),
        (
            lambda: ops.info_nce_rows_(stats, 1.0, x, x.half(), False, True, x, scalar, lse),
            "positive: expected the dtype of query",
        ),
        (
            lambda: ops.info_nce_rows_(stats, 1.0, x, x[:2], False, True, x, scalar, lse),
            "positive: expected size 3 in dimension 0, got 2",
        ),
        (
            lambda: ops.info_nce_rows_(stats, 1.0, x[:, :3], x, False, True, x, scalar, lse),
            "query: expected size 4 in dimension 1, got 3",
        ),
        (
            lambda: ops.info_nce_rows_(stats, 1.0, x, x, False, True, x, scalar, lse[:2]),
            "slopes: expected size 3 in dimension 0, got 2",
        ),
        (
            lambda: ops.key_softmax_gradients_(lse, None, x, none, 1.0, x, none, scalar),
            "pull: expected size 3 in dimension 0, got 0",
        ),
        (
            lambda: ops.key_softmax_gradients_(lse, None, x, x, 1.0, x.half(), none, scalar),
            "by_query: expected dtype Float, got Half",
        ),
        (
            lambda: ops.key_softmax_gradients_(lse, lse[:2], x, x, 1.0, x, none, scalar),
            "slopes: expected size 3 in dimension 0, got 2",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_strided_keys_reach_the_matrix_product_without_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN multiplies a matrix that has gaps between its rows 1,000 times slower than one that has none."""
    if not onednn_is_faster():
        pytest.skip("products go through torch.mm here")
    product, seen = torch.ops.mkldnn._linear_pointwise, []

    def spy(a: Tensor, b: Tensor, *rest: Any) -> Tensor:
        seen.append(b.is_contiguous() or b.t().is_contiguous())
        return product(a, b, *rest)

    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    query, keys = unit_rows(128, 64), unit_rows(5000, 64)
    expected = run("cpu", query, keys, 10.0)
    for layout in ("transposed", "stepped"):
        torch.testing.assert_close(run("cpu", query, lay_out(keys, layout), 10.0).mean, expected.mean)
    assert len(seen) >= 6
    assert all(seen)


@pytest.mark.parametrize("backend", FUSED)
def test_a_backward_pass_inside_autocast_is_as_exact_as_outside(backend: str) -> None:
    query, keys, scale = unit_rows(64, 32), unit_rows(200, 32), torch.tensor(20.0, requires_grad=True)
    with ssl_kernels.use_backend(backend):
        lse, _ = K.key_softmax(query, keys, scale)
    (outside,) = torch.autograd.grad(lse.sum(), scale, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        (inside,) = torch.autograd.grad(lse.sum(), scale)
    assert torch.equal(inside, outside)
