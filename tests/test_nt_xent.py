"""The NT-Xent loss of SimCLR against its definition in float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive import (
    BACKENDS,
    FUSED,
    HALF_EPS,
    Result,
    assert_close,
    distance,
    dtypes,
    evaluate,
    features,
    lay_out,
    layouts,
    oracle,
    plain,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K


def views(rows: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two views, not normalised: that is the loss's own part."""
    return [(3 * torch.randn(rows, width)).to(dtype) for _ in range(2)]


def run(backend: str, z0: Tensor, z1: Tensor, temperature: float, **options: Any) -> Result:
    kind = torch.float64 if z0.dtype == torch.float64 else torch.float32
    return evaluate(
        backend, functools.partial(K.nt_xent_loss, **options), [z0, z1, torch.tensor(temperature, dtype=kind)]
    )


# ---- values and gradients


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw(st.integers(1, 60)),
        "width": draw(st.integers(1, 40)),
        "dtype": draw(dtypes),
        "layout": draw(layouts),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "temperature": draw(st.sampled_from([0.01, 0.07, 0.5, 10.0])),
        "workspace_mb": draw(st.sampled_from([64, 0.02, 0.002])),
        "budget_mb": draw(st.sampled_from([64, 0, 0.004])),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(problem=problems())
def test_matches_the_float64_reference(backend: str, problem: dict[str, Any]) -> None:
    p = problem
    torch.manual_seed(p["seed"])
    z0, z1 = (lay_out(z, p["layout"]) for z in views(p["rows"], p["width"], p["dtype"]))
    loss = functools.partial(K.nt_xent_loss, reduction=p["reduction"])
    weight = torch.randn(2 * p["rows"]) if p["reduction"] == "none" else torch.tensor(-1.7)
    arguments = [z0, z1, torch.tensor(p["temperature"])]
    with ssl_kernels.use_workspace(p["workspace_mb"]), ssl_kernels.use_tile_budget(p["budget_mb"]):
        ours = evaluate(backend, loss, arguments, weight)
    # The rows of a 16-bit view are normalised to 16 bits, in the reference too.
    eager = evaluate("reference", loss, arguments, weight)
    terms = weight.norm().item() / p["temperature"] * (p["rows"] ** 0.5 if p["reduction"] == "sum" else 1)
    terms /= min(1.0, *(z.float().norm(dim=1).min().item() for z in (z0, z1)))  # what the normalisation makes of it
    if p["dtype"] == torch.float32:
        assert_close(ours, eager, oracle(loss, arguments, weight), terms=terms, temperature=p["temperature"])
    else:
        gap = 4 * HALF_EPS[p["dtype"]]
        torch.testing.assert_close(ours.loss, eager.loss, rtol=1e-5, atol=1e-5)
        for a, e in zip(ours.gradients[:2], eager.gradients[:2], strict=True):
            assert distance(a, e) <= gap * e.float().norm() + gap * terms / p["width"] ** 0.5 + 1e-6


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(backend: str, reduction: str) -> None:
    z0, z1 = (t.double().requires_grad_() for t in views(5, 3))
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = functools.partial(K.nt_xent_loss, reduction=reduction)
    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0005):
        assert torch.autograd.gradcheck(loss, (z0, z1, temperature))


@pytest.mark.parametrize("width", [128, 2048])
def test_a_training_sized_batch_is_as_exact_as_plain_pytorch(width: int) -> None:
    z0, z1 = views(512, width)
    arguments = [z0, z1 + z0, torch.tensor(0.07)]
    ours, eager, exact = (f(K.nt_xent_loss, arguments) for f in (functools.partial(evaluate, "cpu"), plain, oracle))
    assert distance(ours.loss, exact.loss) <= 2e-6 * exact.loss
    for a, e, o in zip(ours.gradients, eager.gradients, exact.gradients, strict=True):
        assert distance(a, o) <= 2 * distance(e, o) + 1e-6 * o.norm()


def test_the_formula_written_out() -> None:
    z0, z1 = views(4, 5)
    rows = [[v / math.hypot(*row) for v in row] for row in [*z0.tolist(), *z1.tolist()]]
    losses = []
    for i, a in enumerate(rows):
        z = [sum(p * q for p, q in zip(a, b, strict=True)) / 0.2 for b in rows]
        losses.append(math.log(sum(math.exp(v) for k, v in enumerate(z) if k != i)) - z[(i + 4) % 8])
    for backend in BACKENDS:
        ours = run(backend, z0, z1, 0.2, reduction="mean").loss
        assert ours.item() == pytest.approx(sum(losses) / 8, rel=1e-6)
        with ssl_kernels.use_backend(backend):
            by_row = K.nt_xent_loss(z0, z1, 0.2, reduction="none")
        torch.testing.assert_close(by_row, torch.tensor(losses), rtol=1e-5, atol=1e-6)


# ---- properties


@pytest.mark.parametrize("backend", FUSED)
@hypothesis_settings(max_examples=20)
@given(rows=st.integers(1, 50), seed=st.integers(0, 1000))
def test_the_views_are_interchangeable(backend: str, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    z0, z1 = views(rows, 6)
    one, two = run(backend, z0, z1, 0.1), run(backend, z1, z0, 0.1)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(one.gradients, (two.gradients[1], two.gradients[0], two.gradients[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=5e-6)


@hypothesis_settings(max_examples=20)
@given(rows=st.integers(1, 60), seed=st.integers(0, 1000))
def test_permuting_pairs_permutes_rows(rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    z0, z1 = views(rows, 8)
    order = torch.randperm(rows)
    whole, moved = (run("cpu", a, b, 0.1) for a, b in ((z0, z1), (z0[order], z1[order])))
    torch.testing.assert_close(moved.loss, whole.loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(moved.gradients[:2], whole.gradients[:2], strict=True):
        torch.testing.assert_close(a, b[order], rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis_settings(max_examples=15)
@given(rows=st.integers(1, 50), seed=st.integers(0, 1000))
def test_is_sup_con_with_the_views_as_ids(backend: str, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    z0, z1 = views(rows, 8)
    ids = torch.arange(rows).repeat(2)

    def sup_con(z0: Tensor, z1: Tensor, temperature: Tensor) -> Tensor:
        return K.sup_con_loss(F.normalize(torch.cat([z0, z1]), dim=-1), ids, temperature)

    arguments = [z0, z1, torch.tensor(0.07)]
    one, two = (evaluate(backend, loss, arguments) for loss in (K.nt_xent_loss, sup_con))
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-5, atol=1e-6)
    for a, b in zip(one.gradients, two.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@hypothesis_settings(max_examples=15)
@given(rows=st.integers(1, 90), workspace_kb=st.floats(0.5, 40), seed=st.integers(0, 1000))
def test_the_seam_between_the_views_may_fall_anywhere(rows: int, workspace_kb: float, seed: int) -> None:
    torch.manual_seed(seed)
    z0, z1 = views(rows, 4)
    expected = run("cpu", z0, z1, 0.1)
    with ssl_kernels.use_workspace(workspace_kb / 1024):
        ours = run("cpu", z0, z1, 0.1)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(ours.gradients, expected.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


def test_the_length_of_a_row_does_not_matter_and_its_gradient_is_orthogonal_to_it() -> None:
    z0, z1 = views(20, 6)
    one, two = run("cpu", z0, z1, 0.1), run("cpu", 100 * z0, z1 / 100, 0.1)
    torch.testing.assert_close(two.loss, one.loss)
    torch.testing.assert_close(100 * two.gradients[0], one.gradients[0], rtol=1e-4, atol=1e-6)
    assert (one.gradients[0] * z0).sum(1).abs().max() < 1e-6


# ---- numerics


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])
def test_identical_views(backend: str, temperature: float) -> None:
    """The other view is as close as a row can be to itself: what is left is the rest of the batch."""
    z, _ = features(70, 70, 16)
    expected = oracle(K.nt_xent_loss, [z, z, torch.tensor(temperature)])
    ours = run(backend, z, z, temperature)
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5, abs=3e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_all_alike_share_the_probability(backend: str) -> None:
    z = torch.tensor([[3.0, 4.0]]).expand(20, 2)
    result = run(backend, z, z, 0.01)
    assert result.loss.item() == pytest.approx(math.log(39), rel=1e-6)
    assert all(g.abs().max() < 1e-5 for g in result.gradients[:2])


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("temperature", [0.01, 0.005])
def test_wide_random_features_at_a_sharp_temperature(backend: str, temperature: float) -> None:
    arguments = [*views(50, 1152), torch.tensor(temperature)]
    exact = oracle(K.nt_xent_loss, arguments)
    assert 5 < exact.loss < 40
    assert_close(evaluate(backend, K.nt_xent_loss, arguments), plain(K.nt_xent_loss, arguments), exact)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("workspace_mb", [64, 0.01])
def test_rows_far_from_all_others_beside_a_pair_of_duplicates(backend: str, workspace_mb: float) -> None:
    """In a tile above the diagonal the duplicates set the scale, next to which other columns vanish."""
    z0 = F.normalize(torch.eye(75) - 0.9, dim=-1)
    z1 = torch.roll(-z0, 3, 0)
    z0[5] = z1[5]
    arguments = [z0, z1, torch.tensor(0.01)]
    exact = oracle(K.nt_xent_loss, arguments)
    with ssl_kernels.use_workspace(workspace_mb):
        ours = evaluate(backend, K.nt_xent_loss, arguments)
    assert_close(ours, plain(K.nt_xent_loss, arguments), exact, terms=100)


@pytest.mark.parametrize("backend", FUSED)
def test_fp16_gradients_survive_a_large_batch(backend: str) -> None:
    z0, z1 = views(2048, 8, torch.float16)
    loss = functools.partial(evaluate, backend, K.nt_xent_loss, [z0, z1, torch.tensor(0.5)])
    gradient = loss(torch.tensor(65_536.0)).gradients[0]
    assert (gradient != 0).float().mean() > 0.98


# ---- edges


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 4), (1, 1), (3, 1), (2, 0)])
def test_empty_and_tiny_inputs(backend: str, reduction: str, rows: int, width: int) -> None:
    arguments = [torch.ones(rows, width), 2 * torch.ones(rows, width), torch.tensor(0.5)]
    loss = functools.partial(K.nt_xent_loss, reduction=reduction)
    result, exact = evaluate(backend, loss, arguments), oracle(loss, arguments)
    assert exact.loss.isfinite().all()
    for a, o in zip((result.loss, *result.gradients), (exact.loss, *exact.gradients), strict=True):
        torch.testing.assert_close(a.double(), o, rtol=1e-6, atol=5e-6)


def test_a_single_pair_has_no_negatives() -> None:
    z0, z1 = views(1, 4)
    result = run("cpu", z0, z1, 0.1)
    assert result.loss.item() == pytest.approx(0, abs=1e-6)
    assert all(g.abs().max() < 1e-6 for g in result.gradients[:2])


def test_a_row_of_zeros_stays_finite() -> None:
    z0, z1 = views(6, 4)
    z0[2] = 0
    result = run("cpu", z0, z1, 0.5)
    assert all(t.isfinite().all() for t in (result.loss, *result.gradients))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z0": torch.ones(3)}, ValueError, r"z0: expected 2 dimensions .* got shape \(3,\)"),
        ({"z1": [1.0]}, TypeError, "z1: expected a tensor, got list"),
        ({"z1": torch.ones(3, 4).half()}, TypeError, "z1: expected the dtype of z0 .* got torch.float16"),
        ({"z1": torch.ones(2, 4)}, ValueError, "z1: expected 3 rows as z0 has, got 2"),
        ({"z1": torch.ones(3, 5)}, ValueError, "z1: expected 4 features as z0 has, got 5"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        ({"temperature": -1}, ValueError, "temperature: expected a positive number, got -1"),
        ({"temperature": math.nan}, ValueError, "temperature: expected a positive number, got nan"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a float or a tensor of one element, got str"),
        ({"temperature": torch.ones(2)}, ValueError, "temperature: expected a float or a floating tensor of one"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"z0": torch.ones(3, 4), "z1": torch.ones(3, 4), "temperature": 0.5}
    with pytest.raises(error, match=message):
        K.nt_xent_loss(**(arguments | change))
