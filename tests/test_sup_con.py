"""The supervised contrastive loss against its definition in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive import (
    BACKENDS,
    FUSED,
    Loss,
    Result,
    assert_close,
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


def sup_con(ids: Tensor, **options: Any) -> Loss:
    return lambda z, temperature: K.sup_con_loss(z, ids, temperature, **options)


def run(backend: str, z: Tensor, ids: Tensor, temperature: float, **options: Any) -> Result:
    kind = torch.float64 if z.dtype == torch.float64 else torch.float32
    return evaluate(backend, sup_con(ids, **options), [z, torch.tensor(temperature, dtype=kind)])


# ---- values and gradients


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw(st.integers(1, 90)),
        "width": draw(st.integers(1, 40)),
        "dtype": draw(dtypes),
        "layout": draw(layouts),
        "ids": draw(st.sampled_from([1, 3, 40, 10_000])),
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
    z, _ = features(p["rows"], 0, p["width"], p["dtype"])
    ids = torch.randint(p["ids"], (2 * p["rows"],))[::2]
    loss = sup_con(ids, reduction=p["reduction"])
    weight = torch.randn(p["rows"]) if p["reduction"] == "none" else torch.tensor(-1.7)
    arguments = [lay_out(z, p["layout"]), torch.tensor(p["temperature"])]
    with ssl_kernels.use_workspace(p["workspace_mb"]), ssl_kernels.use_tile_budget(p["budget_mb"]):
        ours = evaluate(backend, loss, arguments, weight)
    eager, exact = plain(loss, arguments, weight), oracle(loss, arguments, weight)
    terms = 2 * weight.norm().item() / p["temperature"] * (p["rows"] ** 0.5 if p["reduction"] == "sum" else 1)
    assert_close(ours, eager, exact, p["dtype"], terms=terms, temperature=p["temperature"])


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck(backend: str, reduction: str) -> None:
    z = features(7, 0, 3)[0].double().requires_grad_()
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = sup_con(torch.tensor([4, 1, 4, 2, 1, 4, 9]), reduction=reduction)
    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0005):
        assert torch.autograd.gradcheck(loss, (z, temperature))


@hypothesis_settings(max_examples=20)
@given(rows=st.integers(2, 12), classes=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_formula_written_out(rows: int, classes: int, seed: int) -> None:
    """L_out of the paper's equation 2: the mean over positives stands outside the logarithm."""
    torch.manual_seed(seed)
    z, _ = features(rows, 0, 4)
    ids = torch.randint(classes, (rows,))
    tau = 0.3
    similarity = (z.double() @ z.double().t() / tau).tolist()
    losses = []
    for i, (row, label) in enumerate(zip(similarity, ids.tolist(), strict=True)):
        positives = [v for p, v in enumerate(row) if p != i and ids[p] == label]
        denominator = sum(math.exp(v) for a, v in enumerate(row) if a != i)
        if positives:
            losses.append(-sum(math.log(math.exp(v) / denominator) for v in positives) / len(positives))
    for backend in BACKENDS:
        with ssl_kernels.use_backend(backend):
            loss, unpaired = K.sup_con_loss(z, ids, tau, return_unpaired=True)
        assert unpaired.item() == rows - len(losses)
        assert loss.item() == pytest.approx(sum(losses) / max(len(losses), 1), rel=1e-5, abs=1e-6)


# ---- properties


@pytest.mark.parametrize("backend", FUSED)
@hypothesis_settings(max_examples=20)
@given(rows=st.integers(1, 60), classes=st.integers(1, 30), seed=st.integers(0, 1000))
def test_order_and_names_of_the_classes_do_not_matter(backend: str, rows: int, classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    z, _ = features(rows, 0, 8)
    ids = torch.randint(classes, (rows,))
    names = torch.randint(-(2**62), 2**62, (classes,))
    order = torch.randperm(rows)
    whole, moved = run(backend, z, ids, 0.1), run(backend, z[order], names[ids][order], 0.1)
    torch.testing.assert_close(moved.loss, whole.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moved.gradients[0], whole.gradients[0][order], rtol=1e-5, atol=5e-6)


# ---- numerics and edges


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_positive_contribute_nothing(backend: str) -> None:
    """Neither loss nor targets; they remain negatives of the others."""
    z, _ = features(6, 0, 4)
    ids = torch.tensor([5, 1, 5, 2, 3, 5])
    with ssl_kernels.use_backend(backend):
        rows, unpaired = K.sup_con_loss(z, ids, 0.1, reduction="none", return_unpaired=True)
        mean = K.sup_con_loss(z, ids, 0.1)
    assert unpaired.item() == 3
    assert unpaired.dtype == torch.int64
    assert (rows != 0).tolist() == [True, False, True, False, False, True]
    torch.testing.assert_close(mean, rows.sum() / 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (1, 4), (5, 4), (5, 0)])
def test_no_positive_at_all_is_a_zero_loss(backend: str, reduction: str, rows: int, width: int) -> None:
    result = run(backend, torch.randn(rows, width), torch.arange(rows), 0.01, reduction=reduction)
    assert (result.loss == 0).all()
    assert all((g == 0).all() for g in result.gradients)


@pytest.mark.parametrize("backend", FUSED)
def test_long_rows_are_left_out_of_their_own_softmax(backend: str) -> None:
    """Without normalisation x_i . x_i may exceed the row's log-sum-exp by thousands: it must not overflow."""
    z = features(40, 0, 8)[0] * torch.linspace(0.1, 30, 40)[:, None]
    arguments = [z, torch.tensor(0.1)]
    loss = sup_con(torch.arange(40) % 7)
    exact = oracle(loss, arguments)
    assert_close(evaluate(backend, loss, arguments), plain(loss, arguments), exact, terms=300)


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_rows_share_the_probability(backend: str) -> None:
    z = torch.tensor([[0.6, 0.8]]).expand(21, 2)
    result = run(backend, z, torch.zeros(21, dtype=torch.int64), 0.01)
    assert result.loss.item() == pytest.approx(math.log(20), rel=1e-6)
    assert result.gradients[0].abs().max() < 1e-5


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("temperature", [0.01, 0.005])
def test_wide_random_features_at_a_sharp_temperature(backend: str, temperature: float) -> None:
    z, _ = features(90, 0, 1152)
    loss, arguments = sup_con(torch.arange(90) % 8), [z, torch.tensor(temperature)]
    ours = evaluate(backend, loss, arguments)
    assert_close(ours, plain(loss, arguments), oracle(loss, arguments), terms=1 / temperature)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("workspace_mb", [64, 0.01])
def test_classes_far_from_all_others_beside_duplicates(backend: str, workspace_mb: float) -> None:
    z = F.normalize(torch.eye(150) - 0.9, dim=-1)
    z[75:] *= -1
    z[140] = z[3]
    loss, arguments = sup_con(torch.arange(150) // 3), [z, torch.tensor(0.01)]
    with ssl_kernels.use_workspace(workspace_mb):
        ours = evaluate(backend, loss, arguments)
    assert_close(ours, plain(loss, arguments), oracle(loss, arguments), terms=100)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"z": torch.ones(3)}, ValueError, r"z: expected 2 dimensions .* got shape \(3,\)"),
        ({"z": [1.0]}, TypeError, "z: expected a tensor, got list"),
        ({"ids": [0, 1, 1]}, TypeError, "ids: expected an int64 tensor, got list"),
        ({"ids": torch.zeros(3)}, TypeError, "ids: expected an int64 tensor, got torch.float32"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, ValueError, r"ids: expected shape \(3,\), got \(2,\)"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive number, got 0.0"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"z": torch.ones(3, 4), "ids": torch.tensor([0, 1, 1]), "temperature": 0.5}
    with pytest.raises(error, match=message):
        K.sup_con_loss(**(arguments | change))


def test_the_rows_add_up_to_the_sum() -> None:
    z, _ = features(30, 0, 4)
    ids = torch.arange(30) % 4
    rows = evaluate("cpu", sup_con(ids, reduction="none"), [z, torch.tensor(0.1)], torch.ones(30))
    total = run("cpu", z, ids, 0.1, reduction="sum")
    torch.testing.assert_close(rows.loss.sum(), total.loss)
    for a, b in zip(rows.gradients, total.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
