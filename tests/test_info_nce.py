"""InfoNCE over frozen negatives against its definition in float64, and MoCo's own formula."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from contrastive import BACKENDS, FUSED, HALF_EPS, distance, dtypes, lay_out, layouts, unit_rows, workspaces_mb
from hypothesis import given
from hypothesis import strategies as st
from memory import linux_only, peak_mb, saved_bytes
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K


class Result(NamedTuple):
    loss: Tensor
    dquery: Tensor
    dpositive: Tensor
    dscale: Tensor


def run(
    backend: str, query: Tensor, positive: Tensor, negatives: Tensor, scale: float, weight: Tensor, **options: Any
) -> Result:
    """Loss and gradients; ``weight`` is the upstream gradient."""
    kind = torch.float64 if query.dtype == torch.float64 else torch.float32
    leaves = [query.detach(), positive.detach(), torch.tensor(scale, dtype=kind)]
    q, p, t = (leaf.requires_grad_() for leaf in leaves)
    with ssl_kernels.use_backend(backend):
        loss = K.info_nce_loss(q, p, negatives, t, **options)
        loss.backward(weight.to(loss.dtype))
    assert all(leaf.grad is not None for leaf in leaves)
    return Result(loss.detach(), *(leaf.grad for leaf in leaves))  # type: ignore[misc]


def oracle(query: Tensor, positive: Tensor, negatives: Tensor, scale: float, weight: Tensor, **options: Any) -> Result:
    return run("reference", query.double(), positive.double(), negatives.double(), scale, weight.double(), **options)


ONE = torch.ones(())


# ---- values and gradients


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(
    rows=st.integers(1, 40),
    cols=st.integers(0, 90),
    width=st.integers(1, 40),
    dtype=dtypes,
    negative_dtype=dtypes,
    layout=layouts,
    negative_layout=layouts,
    aligned=st.sampled_from([0.0, 1.0, 10.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    scale=st.sampled_from([0.0, 0.3, 14.3, 117.0, -2.0]),
    workspace_mb=workspaces_mb,
    seed=st.integers(0, 2**16),
)
def test_matches_the_float64_reference(
    backend: str, rows: int, cols: int, width: int, dtype: torch.dtype, negative_dtype: torch.dtype, layout: str,
    negative_layout: str, aligned: float, reduction: str, scale: float, workspace_mb: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    query = unit_rows(rows, width, dtype)
    positive = lay_out(F.normalize(torch.randn(rows, width) + aligned * query.float(), dim=-1).to(dtype), layout)
    query, negatives = lay_out(query, layout), lay_out(unit_rows(cols, width, negative_dtype), negative_layout)
    weight = torch.randn(rows) if reduction == "none" else torch.tensor(-1.7)
    with ssl_kernels.use_workspace(workspace_mb):
        ours = run(backend, query, positive, negatives, scale, weight, reduction=reduction)
    exact = oracle(query, positive, negatives, scale, weight, reduction=reduction)
    eager = run("reference", query.float(), positive.float(), negatives.float(), scale, weight, reduction=reduction)
    assert ours.loss.dtype == torch.float32
    assert ours.dquery.dtype == ours.dpositive.dtype == dtype
    # A similarity's rounding is multiplied by the scale in the logits; the gradients are differences of unit vectors.
    upstream = weight.norm().item() * (1 / rows**0.5 if reduction == "mean" else rows**0.5 if reduction == "sum" else 1)
    logit = 3e-7 * (1 + abs(scale)) * upstream
    terms = {"loss": logit * rows**0.5, "dquery": logit * abs(scale), "dpositive": logit * abs(scale), "dscale": logit}
    for name in Result._fields:
        a, e, o = (getattr(r, name) for r in (ours, eager, exact))
        assert a.shape == o.shape
        eps = HALF_EPS.get(dtype, 1e-6) if name in ("dquery", "dpositive") else 1e-6
        subnormal = 2**-25 * a.numel() ** 0.5 if a.dtype == torch.float16 else 1e-30
        assert distance(a, o) <= 2 * distance(e, o) + eps * o.norm().item() + terms[name] + subnormal, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_formula_of_moco(backend: str, reduction: str) -> None:
    """As in the paper's pseudo-code: the cross-entropy of [q.k, q @ queue] / tau with label 0."""
    query, key, queue = unit_rows(32, 16), unit_rows(32, 16), unit_rows(500, 16)
    query.requires_grad_()
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue.t()], 1) / 0.07
    expected = F.cross_entropy(logits, torch.zeros(32, dtype=torch.int64), reduction=reduction)
    with ssl_kernels.use_backend(backend):
        loss = K.info_nce_loss(query, key, queue, 1 / 0.07, reduction=reduction)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(value.sum(), query)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(backend: str, reduction: str) -> None:
    query, positive = (unit_rows(5, 3).double().requires_grad_() for _ in range(2))
    negatives, scale = unit_rows(7, 3).double(), torch.tensor(3.0, dtype=torch.float64, requires_grad=True)

    def loss(q: Tensor, p: Tensor, t: Tensor) -> Tensor:
        return K.info_nce_loss(q, p, negatives, t, reduction=reduction)

    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0005):
        assert torch.autograd.gradcheck(loss, (query, positive, scale))
        if backend == "reference":
            assert torch.autograd.gradgradcheck(loss, (query, positive, scale))


@pytest.mark.parametrize("backend", FUSED)
def test_double_backward_is_refused(backend: str) -> None:
    query = unit_rows(4, 3).requires_grad_()
    with ssl_kernels.use_backend(backend):
        loss = K.info_nce_loss(query, unit_rows(4, 3), unit_rows(5, 3), 2.0)
        (gradient,) = torch.autograd.grad(loss, query, create_graph=True)
        with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
            gradient.sum().backward()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)))
def test_only_the_gradients_that_are_needed(backend: str, needed: tuple[bool, ...]) -> None:
    query, positive, negatives = unit_rows(30, 6), unit_rows(30, 6), unit_rows(50, 6)
    exact = oracle(query, positive, negatives, 10.0, ONE)
    leaves = [query, positive, torch.tensor(10.0)]
    for leaf, need in zip(leaves, needed, strict=True):
        leaf.requires_grad_(need)
    with ssl_kernels.use_backend(backend):
        loss = K.info_nce_loss(query, positive, negatives, leaves[2])
    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.backward()
    for leaf, need, expected in zip(leaves, needed, exact[1:], strict=True):
        if need:
            torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-6)
        else:
            assert leaf.grad is None


# ---- numerics


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("margin", [-80.0, -30.0, -1e-3, 0.0, 3.0, 12.0, 30.0, 80.0])
def test_a_confident_positive_keeps_its_relative_precision(backend: str, margin: float) -> None:
    """One negative: log1p(exp(-margin)) down to e^-80, where a softmax over both would say 0."""
    query, positive, negative = torch.ones(1, 1), torch.tensor([[margin]]), torch.zeros(1, 1)
    ours = run(backend, query, positive, negative, 1.0, torch.ones(1), reduction="none")
    expected = math.log1p(math.exp(-margin)) if margin > -700 else -margin
    torch.testing.assert_close(ours.loss.item(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.dpositive.item(), -1 / (1 + math.exp(margin)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", FUSED)
def test_a_negative_scale_does_as_negated_queries(backend: str) -> None:
    query, positive, negatives = unit_rows(9, 5), unit_rows(9, 5), unit_rows(20, 5)
    ours, mirrored = (run(backend, sign * query, positive, negatives, -3.0 * sign, ONE) for sign in (1, -1))
    for a, b in zip(ours, (mirrored.loss, -mirrored.dquery, mirrored.dpositive, -mirrored.dscale), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", FUSED)
def test_a_perfect_match_among_orthogonal_negatives(backend: str) -> None:
    keys = torch.eye(64)
    with ssl_kernels.use_backend(backend):
        loss = K.info_nce_loss(keys[:4], keys[:4], keys[4:], 1 / 0.07)
    torch.testing.assert_close(loss.item(), math.log1p(60 * math.exp(-1 / 0.07)), rtol=1e-5, atol=0)


def test_keys_enqueued_before_the_loss_are_their_own_negatives() -> None:
    """A trainer of another library does this: even a perfect match scores ln 2. After the loss, it scores about 0."""
    key = torch.eye(64)[:1]
    queue, pointer = torch.eye(64)[1:33].clone(), torch.tensor(0)
    after = K.info_nce_loss(key, key, queue, 100.0)
    K.enqueue_(queue, pointer, key)
    before = K.info_nce_loss(key, key, queue, 100.0)
    assert after < 1e-6
    torch.testing.assert_close(before.item(), math.log(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_enqueueing_between_forward_and_backward_changes_no_gradient(backend: str) -> None:
    query, positive, queue = unit_rows(8, 4), unit_rows(8, 4), unit_rows(32, 4)
    expected = run(backend, query, positive, queue, 10.0, ONE)
    query.requires_grad_()
    with ssl_kernels.use_backend(backend):
        loss = K.info_nce_loss(query, positive, queue, 10.0)
        K.enqueue_(queue, torch.tensor(0), unit_rows(32, 4))
        loss.backward()
    assert query.grad is not None
    assert torch.equal(query.grad, expected.dquery)


def test_fp16_gradients_survive_a_batch_of_65536() -> None:
    """Under a loss scale of 2^16, as mixed precision uses; the factor t / M is applied in fp32."""
    rows = 65_536
    query, positive = unit_rows(rows, 8, torch.float16), unit_rows(rows, 8, torch.float16)
    arguments = (query, positive, unit_rows(64, 8, torch.float16), 10.0, torch.tensor(65_536.0))
    ours, exact = run("cpu", *arguments), oracle(*arguments)
    assert distance(ours.dquery, exact.dquery) <= 2**-10 * exact.dquery.norm()
    assert distance(ours.dpositive, exact.dpositive) <= 2**-10 * exact.dpositive.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_that_nearly_cancels_is_cast_once(dtype: torch.dtype) -> None:
    """Pull of the positive and push of a negative beside it: each alone is 100 times their difference."""
    query = unit_rows(16, 32, dtype)
    positive = F.normalize(query.float() + 0.1 * torch.randn(16, 32)).to(dtype)
    negatives = positive[:1] + 0.01 * torch.randn(1, 32).to(dtype)
    arguments = (query[:1], positive[:1], negatives, 10.0, ONE)
    ours, exact = run("cpu", *arguments), oracle(*arguments)
    assert distance(ours.dquery, exact.dquery) <= HALF_EPS[dtype] * exact.dquery.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", ["query", "positive", "negatives", "scale"])
def test_non_finite_input_shows_in_the_loss(backend: str, argument: str) -> None:
    """Of either sign: of an infinite positive, one would pass for a perfect match."""
    values: dict[str, Any] = {
        "query": unit_rows(20, 4), "positive": unit_rows(20, 4), "negatives": unit_rows(90, 4), "scale": 10.0,
    }  # fmt: skip
    for bad in (math.nan, math.inf, -math.inf):
        if argument == "scale":
            values["scale"] = bad
        else:
            values[argument][7, 1] = bad
        with ssl_kernels.use_backend(backend):
            loss = K.info_nce_loss(**values, reduction="none")
        if argument in ("query", "positive"):
            assert not loss[7].isfinite()
        assert not loss.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "cols", "width"), [(0, 0, 4), (0, 5, 4), (5, 0, 4), (3, 4, 0), (1, 1, 1)])
def test_empty_and_tiny_inputs(backend: str, rows: int, cols: int, width: int) -> None:
    query, positive, negatives = torch.ones(rows, width), torch.ones(rows, width), torch.ones(cols, width)
    arguments = (query, positive, negatives, 2.0, ONE)
    for a, o in zip(run(backend, *arguments, reduction="sum"), oracle(*arguments, reduction="sum"), strict=True):
        torch.testing.assert_close(a.double(), o)
    mean = run(backend, *arguments)
    assert mean.loss.isnan() if rows == 0 else mean.loss.isfinite()
    assert all(g.isfinite().all() for g in mean[1:])  # an empty shard must not poison the others' parameters


# ---- torch's machinery


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_with_the_queue_without_a_graph_break(compiler: str) -> None:
    torch._dynamo.reset()
    query, key, queue, pointer = torch.randn(12, 8), unit_rows(12, 8), unit_rows(70, 8), torch.tensor(64)

    def step(query: Tensor, scale: Tensor, queue: Tensor, pointer: Tensor) -> Tensor:
        loss = K.info_nce_loss(F.normalize(query), key, queue, scale.exp())
        K.enqueue_(queue, pointer, key)
        return loss

    def results(function: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (query, torch.tensor(2.3))]
        state = [queue.clone(), pointer.clone()]
        value = function(*leaves, *state)
        return [value.detach(), *torch.autograd.grad(value, leaves), *state]

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for a, b in zip(results(compiled), results(step), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_autocast_casts_queries_and_positives() -> None:
    query, positive, negatives = unit_rows(40, 16), unit_rows(40, 16).double(), unit_rows(60, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = K.info_nce_loss(query.requires_grad_(), positive.float(), negatives, 14.0)
        assert K.info_nce_loss(query.double(), positive, negatives, 14.0).dtype == torch.float64
    loss.backward()
    exact = oracle(query.detach().bfloat16(), positive.bfloat16(), negatives, 14.0, ONE)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach().double(), exact.loss, rtol=1e-6, atol=0)
    assert query.grad is not None
    assert distance(query.grad, exact.dquery) <= 2**-8 * exact.dquery.norm()


# ---- memory


@linux_only
def test_a_queue_of_65536_costs_less_than_40_mb() -> None:
    """The logits alone would be 64 MB, the clone of the queue 32 MB."""
    query, positive, queue = unit_rows(256, 128).requires_grad_(), unit_rows(256, 128), unit_rows(65_536, 128)
    K.info_nce_loss(query, positive, queue[:64], 10.0).backward()

    def step() -> None:
        with saved_bytes() as sizes:
            loss = K.info_nce_loss(query, positive, queue, 10.0)
        assert sum(sizes) <= 4 * 256 * 128 * 4
        loss.backward()

    assert peak_mb(step, calls=3) < 20


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(3)}, ValueError, r"query: expected 2 dimensions .* got shape \(3,\)"),
        (
            {"positive": torch.ones(3, 4).half()},
            TypeError,
            "positive: expected the dtype of query .* got torch.float16",
        ),
        ({"positive": torch.ones(2, 4)}, ValueError, "positive: expected 3 rows, one to a query, got 2"),
        ({"negatives": torch.ones(4, 5)}, ValueError, "negatives: expected 4 features as the query has, got 5"),
        ({"negatives": torch.ones(5, 4, requires_grad=True)}, ValueError, r"negatives: expected keys without gradient"),
        ({"scale": "10"}, TypeError, "scale: expected a float or a tensor of one element, got str"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "query": torch.ones(3, 4), "positive": torch.ones(3, 4), "negatives": torch.ones(5, 4), "scale": 10.0,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        K.info_nce_loss(**(arguments | change))
