"""The symmetric softmax loss of CLIP against its definition in float64."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive import (
    BACKENDS,
    FUSED,
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


def run(backend: str, x: Tensor, y: Tensor, scale: float, weight: Tensor | None = None, **options: Any) -> Result:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    loss = functools.partial(K.clip_loss, **options)
    return evaluate(backend, loss, [x, y, torch.tensor(scale, dtype=kind)], weight)


def exactly(x: Tensor, y: Tensor, scale: float, weight: Tensor | None = None, **options: Any) -> Result:
    return run("reference", x.double(), y.double(), scale, weight, **options)


# ---- values and gradients


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    size = st.integers(1, 70)
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    rows = draw(size)
    return {
        "rows": rows,
        "cols": rows if reduction == "none" else draw(size),
        "width": draw(st.integers(1, 40)),
        "dtype": draw(dtypes),
        "layout": draw(layouts),
        "ids": draw(st.sampled_from([None, 1, 3, 40])),
        "same_id": draw(st.sampled_from(["positive", "ignore"])),
        "offset": 0 if reduction == "none" else draw(st.integers(-75, 75)),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": reduction,
        "scale": draw(st.sampled_from([0.0, 0.3, 14.3, 100.0, 117.0])),
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
    x, y = features(p["rows"], p["cols"], p["width"], p["dtype"])
    x, y = lay_out(x, p["layout"]), lay_out(y, p["layout"])
    options = {name: p[name] for name in ("offset", "reduction", "same_id", "label_smoothing")}
    if p["ids"] is not None:
        options["x_ids"] = torch.randint(p["ids"], (p["rows"],))
        options["y_ids"] = torch.randint(p["ids"], (2 * p["cols"],))[::2]
    loss = functools.partial(K.clip_loss, **options)
    weight = torch.randn(p["rows"]) if p["reduction"] == "none" else torch.tensor(-1.7)
    arguments = [x, y, torch.tensor(p["scale"])]
    with ssl_kernels.use_workspace(p["workspace_mb"]), ssl_kernels.use_tile_budget(p["budget_mb"]):
        ours = evaluate(backend, loss, arguments, weight)
    exact = oracle(loss, arguments, weight)
    terms = p["scale"] * weight.norm().item() * ((p["rows"] + p["cols"]) ** 0.5 if p["reduction"] == "sum" else 1)
    assert_close(ours, plain(loss, arguments, weight), exact, p["dtype"], terms=terms)


@pytest.mark.parametrize("width", [128, 1152])
@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_a_training_sized_batch_is_as_exact_as_plain_pytorch(width: int, scale: float) -> None:
    x, y = features(1024, 1024, width)
    y = F.normalize(y + 0.3 * x, dim=-1)  # pairs that are aligned, but not beyond doubt
    arguments = [x, y, torch.tensor(scale)]
    ours, eager = evaluate("cpu", K.clip_loss, arguments), plain(K.clip_loss, arguments)
    exact = oracle(K.clip_loss, arguments)
    assert distance(ours.loss, exact.loss) <= 1e-6 * max(exact.loss, 0.1)
    for a, e, o in zip(ours.gradients, eager.gradients, exact.gradients, strict=True):
        assert distance(a, o) <= 2 * distance(e, o) + 1e-6 * o.norm() + 1e-7 * scale / 32


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("same_id", ["positive", "ignore"])
def test_gradcheck(backend: str, reduction: str, same_id: str) -> None:
    cols = 5 if reduction == "none" else 7
    x, y = (t.double().requires_grad_() for t in features(5, cols, 3))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    ids = {"x_ids": torch.tensor([0, 1, 1, 2, 3]), "y_ids": torch.tensor([1, 1, 0, 5, 3, 4, 2])[:cols]}
    offset = 0 if reduction == "none" else 1
    loss = functools.partial(
        K.clip_loss, **ids, same_id=same_id, offset=offset, label_smoothing=0.2, reduction=reduction
    )
    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0005):
        assert torch.autograd.gradcheck(loss, (x, y, scale))


def test_the_formula_written_out() -> None:
    """Several positives to a row, both directions, with label smoothing, in plain loops."""
    x, y = features(5, 7, 4)
    x_ids, y_ids = torch.tensor([0, 1, 1, 2, 9]), torch.tensor([1, 0, 1, 5, 0, 2, 2])  # row 4 and column 3: none
    smoothing, scale = 0.3, 12.0
    z = (scale * x.double() @ y.double().t()).tolist()
    same = (x_ids[:, None] == y_ids).tolist()

    def direction(z: list[list[float]], same: list[list[bool]]) -> float:
        losses = []
        for row, positive in zip(z, same, strict=True):
            log_p = [v - math.log(sum(map(math.exp, row))) for v in row]
            positives = [p for p, is_positive in zip(log_p, positive, strict=True) if is_positive]
            if positives:
                spread = sum(log_p) / len(log_p)
                losses.append(-(1 - smoothing) * sum(positives) / len(positives) - smoothing * spread)
        return sum(losses) / len(losses)

    expected = (direction(z, same) + direction(list(zip(*z, strict=True)), list(zip(*same, strict=True)))) / 2  # type: ignore[arg-type]
    options = {"x_ids": x_ids, "y_ids": y_ids, "offset": 100, "label_smoothing": smoothing}
    for backend in BACKENDS:
        assert run(backend, x, y, scale, **options).loss.item() == pytest.approx(expected, rel=1e-6)


# ---- properties


@hypothesis_settings(max_examples=25)
@given(rows=st.integers(1, 60), seed=st.integers(0, 1000))
def test_permuting_pairs_permutes_rows(rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = features(rows, rows, 8)
    order = torch.randperm(rows)
    weight = torch.rand(rows)
    whole = run("cpu", x, y, 10.0, weight, reduction="none")
    moved = run("cpu", x[order], y[order], 10.0, weight[order], reduction="none")
    torch.testing.assert_close(moved.loss, whole.loss[order], rtol=1e-5, atol=1e-6)
    for a, b in zip(moved.gradients[:2], whole.gradients[:2], strict=True):
        torch.testing.assert_close(a, b[order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.gradients[2], whole.gradients[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
@hypothesis_settings(max_examples=20)
@given(rows=st.integers(1, 50), cols=st.integers(1, 50), offset=st.integers(-9, 9), seed=st.integers(0, 1000))
def test_images_and_texts_are_interchangeable(backend: str, rows: int, cols: int, offset: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, y = features(rows, cols, 6)
    ids, other = torch.randint(20, (rows,)), torch.randint(20, (cols,))
    one = run(backend, x, y, 14.0, x_ids=ids, y_ids=other, offset=offset)
    two = run(backend, y, x, 14.0, x_ids=other, y_ids=ids, offset=-offset)
    torch.testing.assert_close(one.loss, two.loss, rtol=1e-6, atol=1e-6)
    for a, b in zip(one.gradients, (two.gradients[1], two.gradients[0], two.gradients[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", FUSED)
@hypothesis_settings(max_examples=20)
@given(rows=st.integers(1, 50), shift=st.floats(-3, 3, width=32), seed=st.integers(0, 1000))
def test_what_all_logits_share_changes_nothing(backend: str, rows: int, shift: float, seed: int) -> None:
    """A constant feature adds t * shift to every logit."""
    torch.manual_seed(seed)
    x, y = features(rows, rows, 6)
    wide_x = torch.cat([x, torch.full((rows, 1), shift)], 1)
    wide_y = torch.cat([y, torch.ones(rows, 1)], 1)
    plain, shifted = run(backend, x, y, 20.0), run(backend, wide_x, wide_y, 20.0)
    torch.testing.assert_close(shifted.loss, plain.loss, rtol=1e-5, atol=2e-5)
    for a, b in zip(shifted.gradients[:2], plain.gradients[:2], strict=True):
        torch.testing.assert_close(a[:, :6], b, rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(shifted.gradients[2], plain.gradients[2], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("same_id", ["positive", "ignore"])
@pytest.mark.parametrize("backend", FUSED)
def test_ids_that_name_the_diagonal_change_nothing(backend: str, same_id: str) -> None:
    x, y = features(67, 67, 16)
    ids = torch.randperm(67)
    without = run(backend, x, y, 10.0)
    named = run(backend, x, y, 10.0, x_ids=ids, y_ids=ids, same_id=same_id)
    torch.testing.assert_close(named.loss, without.loss, rtol=1e-6, atol=0)
    for a, b in zip(named.gradients, without.gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_no_label_smoothing_is_the_default_and_the_full_one_ignores_the_pairing() -> None:
    x, y = features(40, 40, 8)
    default, none = run("cpu", x, y, 10.0), run("cpu", x, y, 10.0, label_smoothing=0.0)
    assert all(torch.equal(a, b) for a, b in zip(default.gradients, none.gradients, strict=True))
    full = run("cpu", x, y, 10.0, label_smoothing=1.0)
    one_id = torch.zeros(40, dtype=torch.int64)
    all_paired = exactly(x, y, 10.0, label_smoothing=1.0, x_ids=one_id, y_ids=one_id)
    torch.testing.assert_close(full.loss.double(), all_paired.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", FUSED)
def test_the_parts_of_a_smoothed_target_add_up(backend: str) -> None:
    """With one pair alone both parts of its target meet the same logit, and nothing is left of it."""
    x = torch.tensor([[0.7]])
    for scale, label_smoothing in itertools.product((10.0, 100.0, 117.0), (0.1, 0.3, 0.7)):
        assert abs(run(backend, x, x, scale, label_smoothing=label_smoothing).loss.item()) < 1e-9


def test_label_smoothing_is_that_of_cross_entropy() -> None:
    x, y = features(30, 30, 8)
    z, target = 14.0 * x @ y.t(), torch.arange(30)
    expected = sum(F.cross_entropy(logits, target, label_smoothing=0.1) for logits in (z, z.t())) / 2
    torch.testing.assert_close(run("cpu", x, y, 14.0, label_smoothing=0.1).loss, torch.as_tensor(expected))


# ---- numerics


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("scale", [100.0, 200.0])
def test_random_features_of_a_large_model_at_the_sharpest_temperature(backend: str, scale: float) -> None:
    """A fixed maximum of 1/tau leaves nothing of the row sums of a peer, and another returns inf."""
    arguments = [*features(96, 80, 1152), torch.tensor(scale)]
    exact = oracle(K.clip_loss, arguments)
    assert 5 < exact.loss < 30
    assert_close(evaluate(backend, K.clip_loss, arguments), plain(K.clip_loss, arguments), exact)


def far_columns(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """One pair of similarity 1; the other columns are nowhere better than -0.5: next to e^t they are nothing."""
    x, y = torch.zeros(rows, 3), torch.zeros(cols, 3)
    x[:, 1], y[:, 0], y[:, 1] = 1, -0.6, -0.8
    x[0], y[0] = torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 0, 0])
    noise = torch.arange(max(rows, cols))[:, None] % 7 / 100
    x[1:, 2:], y[1:, 2:] = noise[1:rows], noise[1:cols]
    return x, y


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("scale", [60.0, 100.0, 200.0])
@pytest.mark.parametrize("same_id", [None, "positive", "ignore"])
@pytest.mark.parametrize(("rows", "cols"), [(5, 9), (150, 37), (67, 130)])
@pytest.mark.parametrize("swapped", [False, True])
def test_columns_and_rows_far_below_the_best_pair(
    backend: str, scale: float, same_id: str | None, rows: int, cols: int, swapped: bool
) -> None:
    options: dict[str, Any] = {}
    if same_id is not None:  # row 0 alone comes near the columns; ids take it out of some of them, or make it theirs
        options = {"x_ids": torch.arange(rows), "y_ids": torch.arange(cols) % 3, "same_id": same_id}
    x, y = far_columns(rows, cols)
    if swapped:
        x, y = y, x
        if options:
            options["x_ids"], options["y_ids"] = options["y_ids"], options["x_ids"]
    loss = functools.partial(K.clip_loss, **options)
    arguments = [x, y, torch.tensor(scale)]
    assert_close(evaluate(backend, loss, arguments), plain(loss, arguments), oracle(loss, arguments))


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (17, 16), (33, 70)])
def test_padding_is_never_a_maximum(backend: str, rows: int, cols: int) -> None:
    """All similarities are near -1: a zero from beyond the edge would outweigh them e^100 times."""
    x, y = features(rows, cols, 4)
    x, y = x.abs() + 0.5, -y.abs() - 0.5
    arguments = [F.normalize(x, dim=-1), F.normalize(y, dim=-1), torch.tensor(100.0)]
    for mb in (64, 0.002):
        with ssl_kernels.use_workspace(mb):
            ours = evaluate(backend, K.clip_loss, arguments)
        assert_close(ours, plain(K.clip_loss, arguments), oracle(K.clip_loss, arguments))


@pytest.mark.parametrize("backend", BACKENDS)
def test_identical_features_share_the_probability(backend: str) -> None:
    x = torch.tensor([[0.6, 0.8]]).expand(37, 2)
    result = run(backend, x, x, 100.0)
    assert result.loss.item() == pytest.approx(math.log(37), rel=1e-6)
    assert all(g.abs().max() < 1e-5 for g in result.gradients[:2])


def perfect_match(backend: str, scale: float) -> tuple[float, float]:
    """Orthogonal features, each its own partner, and what they should score: log(1 + (N - 1) e^-t)."""
    x = torch.eye(24)
    return run(backend, x, x, scale).loss.item(), math.log1p(23 * math.exp(-scale))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [5.0, 10.0, 20.0, 100.0])
def test_a_perfect_match_scores_the_rest_to_fp32(backend: str, scale: float) -> None:
    loss, expected = perfect_match(backend, scale)
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_saturated_pairs_leave_no_noise_in_the_gradient(backend: str) -> None:
    """Every pair has a probability of 1 but for e^-30, at similarities that differ: rows and columns must cancel."""
    x, noise = features(150, 150, 512)
    y = F.normalize(x + 0.3 * noise, dim=-1)
    assert all(g.abs().max() < 1e-9 for g in run(backend, x, y, 100.0).gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_perfect_match_of_unit_vectors_is_not_off_by_the_rounding_of_large_logits(backend: str) -> None:
    """At t = 100 one rounding of a logit is 4e-6; the loss of each row is below e^-50."""
    x, _ = features(70, 70, 512)
    assert abs(run(backend, x, x, 100.0).loss.item()) <= 1.2e-7


def test_fp16_gradients_survive_a_batch_of_65536() -> None:
    """Under a loss scale of 2^16, as mixed precision uses; the factor t / M is applied in fp32."""
    x, y = features(65_536, 24, 8, torch.float16)
    ids = {"x_ids": torch.arange(65_536) % 24, "y_ids": torch.arange(24)}
    scaled = torch.tensor(65_536.0)
    exact, ours = exactly(x, y, 10.0, scaled, **ids), run("cpu", x, y, 10.0, scaled, **ids)
    for a, o in zip(ours.gradients[:2], exact.gradients[:2], strict=True):
        assert distance(a, o) <= 2**-10 * o.norm()
    assert (ours.gradients[0] != 0).float().mean() > 0.99


def test_small_row_weights_survive_in_half_precision() -> None:
    x, y = features(32, 32, 16, torch.float16)
    weight = torch.full((32,), 1e-7)
    weight[0] = 1e-5
    ours, exact = (f(x, y, 10.0, weight, reduction="none") for f in (functools.partial(run, "cpu"), exactly))
    for a, o in zip(ours.gradients[:2], exact.gradients[:2], strict=True):
        assert distance(a, o) <= 2**-10 * o.norm() + 2**-25 * a.numel() ** 0.5


def test_bf16_logits_are_not_rounded_to_bf16() -> None:
    x, y = features(64, 64, 64, torch.bfloat16)
    y = F.normalize(y.float() + 0.3 * x.float(), dim=-1).bfloat16()
    z, target = ((x @ y.t()) * 100.0).double(), torch.arange(64)
    peer = (F.cross_entropy(z, target) + F.cross_entropy(z.t(), target)) / 2
    exact = exactly(x, y, 100.0).loss
    assert 100 * distance(run("cpu", x, y, 100.0).loss, exact) < distance(peer, exact)


# ---- rows and columns without a partner


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_no_positive_pair_at_all_is_a_zero_loss(backend: str, reduction: str, label_smoothing: float) -> None:
    x, y = features(9, 20, 4)
    result = run(backend, x, y, 100.0, offset=50, reduction=reduction, label_smoothing=label_smoothing)
    assert result.loss == 0
    assert all((g == 0).all() for g in result.gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_and_columns_without_a_partner_do_not_count(backend: str) -> None:
    """Rows 0-2 meet columns 4-6; row 3 and columns 0-3 are only negatives of the others."""
    x, y = features(4, 7, 5)
    z = 8.0 * x.double() @ y.double().t()
    rows = torch.stack([z[i].logsumexp(0) - z[i, i + 4] for i in range(3)])
    cols = torch.stack([z[:, i + 4].logsumexp(0) - z[i, i + 4] for i in range(3)])
    for reduction, expected in (("mean", (rows.mean() + cols.mean()) / 2), ("sum", (rows.sum() + cols.sum()) / 2)):
        ours = run(backend, x, y, 8.0, offset=4, reduction=reduction)
        torch.testing.assert_close(ours.loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pairs_left_out_contribute_exactly_nothing(backend: str) -> None:
    """Their similarity may be anything: here it would outweigh all others."""
    x, y = features(6, 6, 4)
    ids = torch.tensor([0, 0, 1, 2, 3, 4])
    x[0] = torch.tensor([1.0, 0, 0, 0])
    y[1] = torch.tensor([1.0, 0, 0, 0])
    options = {"x_ids": ids, "y_ids": ids, "same_id": "ignore", "reduction": "none"}
    keep = (ids[:, None] != ids) | torch.eye(6, dtype=torch.bool)
    z = (50.0 * x.double() @ y.double().t()).masked_fill(~keep, -torch.inf)
    expected = ((z.logsumexp(1) - z.diag()) + (z.logsumexp(0) - z.diag())) / 2
    torch.testing.assert_close(run(backend, x, y, 50.0, **options).loss.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_but_the_pairs_left_out_is_a_zero_loss(backend: str) -> None:
    x, y = features(12, 12, 4)
    ids = torch.zeros(12, dtype=torch.int64)
    result = run(backend, x, y, 100.0, x_ids=ids, y_ids=ids, same_id="ignore")
    assert result.loss.item() == pytest.approx(0, abs=1e-6)
    assert all(g.isfinite().all() and g.abs().max() < 1e-4 for g in result.gradients)


# ---- edges


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "cols", "width"), [(0, 0, 4), (0, 5, 4), (5, 0, 4), (3, 4, 0), (3, 3, 0), (1, 1, 1)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_empty_and_tiny_inputs(backend: str, rows: int, cols: int, width: int, label_smoothing: float) -> None:
    x, y = torch.ones(rows, width), torch.ones(cols, width)
    for reduction in ("mean", "sum", *(["none"] if rows == cols else [])):
        options: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}
        result, exact = run(backend, x, y, 2.0, **options), exactly(x, y, 2.0, **options)
        assert exact.loss.isfinite().all()  # an empty shard must not poison the others' parameters
        for a, o in zip((result.loss, *result.gradients), (exact.loss, *exact.gradients), strict=True):
            torch.testing.assert_close(a.double(), o)


def test_ids_use_all_64_bits() -> None:
    x, y = features(4, 4, 4)
    ids, other = torch.tensor([2**40, 0, 2**40 + 2**33, -1]), torch.tensor([0, 2**40 + 2**33, -1, 7])
    ours, exact = (f(x, y, 9.0, x_ids=ids, y_ids=other, offset=100) for f in (functools.partial(run, "cpu"), exactly))
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-6, atol=0)


def test_the_largest_offsets_meet_no_pair() -> None:
    x, y = features(5, 6, 4)
    for offset in (2**62, -(2**62)):
        assert run("cpu", x, y, 10.0, offset=offset).loss == 0


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(3)}, ValueError, r"x: expected 2 dimensions .* got shape \(3,\)"),
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"y": torch.ones(3, 4).bfloat16()}, TypeError, "y: expected the dtype of x .* got torch.bfloat16"),
        ({"y": torch.ones(3, 5)}, ValueError, "y: expected 4 features as x has, got 5"),
        ({"scale": torch.ones(2)}, ValueError, r"scale: expected a float or a floating tensor of one element, got .*2"),
        ({"scale": "10"}, TypeError, "scale: expected a float or a tensor of one element, got str"),
        ({"x_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "y_ids: expected ids for both x and y"),
        ({"same_id": "drop"}, ValueError, "same_id: expected one of 'positive', 'ignore', got 'drop'"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
        ({"offset": 1.5}, TypeError, "offset: expected an int, got float"),
        ({"offset": 2**63}, ValueError, r"offset: expected at most 2\*\*62 in magnitude"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
        ({"label_smoothing": math.nan}, ValueError, r"label_smoothing: expected a number in \[0, 1\], got nan"),
        ({"label_smoothing": True}, TypeError, "label_smoothing: expected a float, got bool"),
        ({"reduction": "none", "offset": 1}, ValueError, "reduction: 'none' pairs .* got 3, 3 and 1"),
        ({"reduction": "none", "y": torch.ones(2, 4)}, ValueError, "reduction: 'none' pairs .* got 3, 2 and 0"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.ones(3, 4), "y": torch.ones(3, 4), "scale": 10.0}
    with pytest.raises(error, match=message):
        K.clip_loss(**(arguments | change))
