"""The softmax over rows alone against its definition in float64."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from contrastive import (
    BACKENDS,
    FUSED,
    assert_close,
    distance,
    dtypes,
    evaluate,
    features,
    lay_out,
    layouts,
    oracle,
    plain,
    unit_rows,
)
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from row_losses import call
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.ops import panel_shape, row_loss, row_passes

AND_FLOAT64 = [*((name, torch.float32) for name in BACKENDS), ("eager", torch.float64)]

# ---- values and gradients


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    rows, width = draw(st.integers(1, 60)), draw(st.integers(1, 40))
    targets = draw(st.booleans())
    options: dict[str, Any] = {
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "same_id": draw(st.sampled_from(["ignore", "positive", "negative"])),
        "normalize": draw(st.booleans()),
    }
    ids = draw(st.sampled_from([None, 1, 3, 40]))
    if draw(st.booleans()):
        options |= {
            "hardness": 5.0,
            "hardened": draw(st.sampled_from(["all", "same_id", "other_ids"] if ids else ["all"])),
        }
    if draw(st.booleans()):
        dims = draw(st.lists(st.integers(1, width), min_size=1, max_size=4, unique=True))
        options |= {"dims": dims, "dim_weights": draw(st.sampled_from([None, [0.5, -2.0, 0.0, 3.0][: len(dims)]]))}
    return {
        "rows": rows,
        "cols": draw(st.integers(1, 70)) if targets else rows + draw(st.integers(0, 30)),
        "width": width,
        "dtype": draw(dtypes),
        "scale": draw(st.sampled_from([0.0, 0.3, 14.3, 100.0])),
        "targets": targets,
        "ids": ids,
        "bias": draw(st.booleans()),
        "weights": draw(st.booleans()),
        "guide": draw(st.sampled_from([None, None, 5])),
        **options,
    }


SEVERAL_POSITIVES = {
    "rows": 12, "cols": 20, "width": 8, "dtype": torch.float32, "scale": 14.3, "targets": False, "ids": 3,
    "bias": False, "weights": True, "guide": None, "same_id": "positive", "label_smoothing": 0.1, "reduction": "mean",
    "normalize": False,
}  # fmt: skip


MANY_ROWS = SEVERAL_POSITIVES | {"rows": 70, "cols": 80, "ids": None, "bias": True}  # of several sums by column


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(
    problem=problems(),
    layout=layouts,
    workspace_mb=st.sampled_from([64, 0.02, 0.002]),
    budget_mb=st.sampled_from([64, 0, 0.004]),
    rows_at_once=st.sampled_from([0, 7, 256]),  # 0: never, so that two passes are made
    seed=st.integers(0, 2**16),
)
@example(problem=SEVERAL_POSITIVES, layout="contiguous", workspace_mb=64, budget_mb=64, rows_at_once=256, seed=1)
@example(
    problem=SEVERAL_POSITIVES | {"guide": 5}, layout="contiguous", workspace_mb=64, budget_mb=64, rows_at_once=5, seed=1
)
@example(problem=MANY_ROWS, layout="contiguous", workspace_mb=64, budget_mb=64, rows_at_once=256, seed=1)
@example(problem=MANY_ROWS, layout="contiguous", workspace_mb=64, budget_mb=64, rows_at_once=16, seed=1)
@example(problem=MANY_ROWS, layout="contiguous", workspace_mb=0.01, budget_mb=0.02, rows_at_once=0, seed=1)
def test_matches_the_float64_reference(
    backend: str,
    problem: dict[str, Any],
    layout: str,
    workspace_mb: float,
    budget_mb: float,
    rows_at_once: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    loss, arguments = call(**problem)
    arguments[:2] = [lay_out(t, layout) for t in arguments[:2]]
    weight = torch.randn(problem["rows"]) if problem["reduction"] == "none" else torch.tensor(-1.7)
    one_visit = mock.patch.object(panel_shape, "_WHOLE_ROWS", (1, rows_at_once, rows_at_once))
    if rows_at_once == 0:
        one_visit = mock.patch.object(row_passes, "whole_rows", return_value=0)
    # Whatever the processor, tiles have new memory and that of the tile before.
    memory = mock.patch.object(row_passes, "onednn_is_faster", return_value=seed % 2 == 0)
    with ssl_kernels.use_workspace(workspace_mb), ssl_kernels.use_tile_budget(budget_mb), one_visit, memory:
        ours = evaluate(backend, loss, arguments, weight)
    share = 3 * len(problem.get("dims", [0]))
    summed = problem["rows"] ** 0.5 if problem["reduction"] == "sum" else 1
    terms = share * (1 + problem["scale"]) * max(1, weight.norm().item()) * 3 * summed
    assert_close(ours, plain(loss, arguments, weight), oracle(loss, arguments, weight), problem["dtype"], terms=terms)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@hypothesis_settings(max_examples=20)
@given(
    rows=st.integers(1, 50),
    cols=st.integers(1, 60),
    dtype=dtypes,
    ids=st.sampled_from([None, 1, 9]),
    bias=st.booleans(),
    targets=st.booleans(),
    guide=st.sampled_from([None, 5]),
    hardness=st.sampled_from([0.0, 4.0]),
    workspace_mb=st.sampled_from([64, 0.002]),
    seed=st.integers(0, 2**16),
)
def test_the_log_sum_exp_matches_the_float64_reference(
    backend: str, rows: int, cols: int, workspace_mb: float, seed: int, dtype: torch.dtype, **options: Any
) -> None:
    torch.manual_seed(seed)
    loss, arguments = call(rows, cols, function=K.row_lse, dtype=dtype, **options)
    weight = torch.randn(rows)
    with ssl_kernels.use_workspace(workspace_mb):
        ours = evaluate(backend, loss, arguments, weight)
    exact, eager = oracle(loss, arguments, weight), plain(loss, arguments, weight)
    empty = exact.loss == -torch.inf  # where ids leave nothing, the definition's gradient is NaN
    assert torch.equal(ours.loss == -torch.inf, empty)
    if not empty.any():
        assert_close(ours, eager, exact, dtype, terms=30 * weight.norm().item())
    assert all(g.isfinite().all() for g in ours.gradients)


@pytest.mark.parametrize("width", [128, 768])
@pytest.mark.parametrize("scale", [20.0, 100.0])
def test_a_training_sized_batch_is_as_exact_as_plain_pytorch(width: int, scale: float) -> None:
    query, candidates = features(512, 1024, width)
    candidates[:512] = F.normalize(candidates[:512] + 0.3 * query, dim=-1)
    arguments = [query, candidates, torch.tensor(scale)]
    ours, eager = evaluate("cpu", K.row_softmax_loss, arguments), plain(K.row_softmax_loss, arguments)
    exact = oracle(K.row_softmax_loss, arguments)
    assert distance(ours.loss, exact.loss) <= 1e-6 * max(exact.loss, 0.1)
    for a, e, o in zip(ours.gradients, eager.gradients, exact.gradients, strict=True):
        assert distance(a, o) <= 2 * distance(e, o) + 1e-6 * o.norm() + 1e-7 * scale / 32


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize(
    "options",
    [
        {"targets": True, "ids": 3, "weights": True, "label_smoothing": 0.2},
        {"ids": 3, "same_id": "positive", "reduction": "none", "bias": True, "label_smoothing": 0.2},
        {"dims": (2, 5), "dim_weights": (0.5, 2.0), "normalize": True, "reduction": "sum"},
        {"dims": (2, 5), "guide": 4, "normalize": True, "reduction": "none", "bias": True},
        {"function": K.row_lse, "bias": True, "targets": True, "ids": 5},
    ],
    ids=["targets", "positives", "prefixes", "guide", "lse"],
)
def test_gradcheck(backend: str, options: dict[str, Any]) -> None:
    torch.manual_seed(2)
    loss, arguments = call(5, 7, 5, scale=3.0, **options)
    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0005):
        assert torch.autograd.gradcheck(loss, [t.double().requires_grad_() for t in arguments])


def test_the_formula_written_out() -> None:
    """Targets, ids, bias, hardness, smoothing and weights, in plain loops."""
    query, candidates = features(5, 7, 4)
    target, weights = torch.tensor([2, 0, -1, 6, 1]), torch.tensor([1.0, 0.5, 9.0, 2.0, 3.0])
    query_ids, candidate_ids = torch.tensor([0, 1, 1, 2, 9]), torch.tensor([1, 0, 1, 5, 0, 2, 2])
    bias, smoothing, scale = torch.linspace(-1, 2, 7), 0.3, 12.0
    s = (query.double() @ candidates.double().t()).tolist()
    total = 0.0
    for i, row in enumerate(s):
        if target[i] < 0:
            continue
        kept = [j for j in range(7) if j == target[i] or query_ids[i] != candidate_ids[j]]
        z = {j: (scale + (0 if j == target[i] else 5)) * row[j] + bias[j].item() for j in kept}
        log_p = {j: z[j] - math.log(sum(map(math.exp, z.values()))) for j in kept}
        loss = -(1 - smoothing) * log_p[int(target[i])] - smoothing * sum(log_p.values()) / len(kept)
        total += weights[i].item() * loss
    for backend in BACKENDS:
        with ssl_kernels.use_backend(backend):
            loss = K.row_softmax_loss(
                query, candidates, scale, target=target, weights=weights, query_ids=query_ids,
                candidate_ids=candidate_ids, candidate_bias=bias, label_smoothing=smoothing, hardness=5.0,
            )  # fmt: skip
        assert loss.item() == pytest.approx(total / 4, rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_cross_entropy(backend: str) -> None:
    query, candidates = features(9, 20, 6)
    target = torch.randint(20, (9,))
    with ssl_kernels.use_backend(backend):
        for reduction in ("mean", "sum", "none"):
            ours = K.row_softmax_loss(query, candidates, 14.0, target=target, label_smoothing=0.1, reduction=reduction)
            theirs = F.cross_entropy(14 * query @ candidates.t(), target, label_smoothing=0.1, reduction=reduction)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            K.row_lse(query, candidates, 14.0), (14 * query @ candidates.t()).logsumexp(1), rtol=1e-6, atol=1e-6
        )


# ---- what the options mean


@pytest.mark.parametrize("backend", FUSED)
def test_the_gradient_of_hardness_counts_it_as_a_constant(backend: str) -> None:
    """The value has t + alpha on the chosen candidates; the derivative of their logits stays t."""
    query, candidates = features(6, 15, 4)
    query_ids, candidate_ids = torch.arange(6), torch.arange(15) % 6  # those behind the first 6 are hard negatives
    own = query_ids[:, None] == candidate_ids
    positive = torch.eye(6, 15, dtype=torch.bool)
    for hardened, chosen in (("all", ~positive), ("same_id", own & ~positive), ("other_ids", ~own)):
        options = {"query_ids": query_ids, "candidate_ids": candidate_ids, "same_id": "negative", "hardened": hardened}
        loss = functools.partial(K.row_softmax_loss, hardness=7.0, **options)
        ours = evaluate(backend, loss, [query, candidates, torch.tensor(9.0)])

        q, c, t = leaves = [t.double().requires_grad_() for t in (query, candidates, torch.tensor(9.0))]
        s = q @ c.t()
        z = t * s + 7 * s.detach() * chosen
        expected = F.cross_entropy(z, torch.arange(6))
        torch.testing.assert_close(ours.loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
        for a, b in zip(ours.gradients, torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("normalize", [False, True])
def test_prefixes_are_losses_of_their_own(backend: str, normalize: bool) -> None:
    """With every other option at once."""
    loss, arguments = call(
        12, 31, 20, targets=True, ids=5, bias=True, weights=True, guide=3, hardness=2.0, label_smoothing=0.1,
        normalize=normalize, dims=(20, 3, 9), dim_weights=(1.0, 0.25, 2.0),
    )  # fmt: skip
    whole = evaluate(backend, loss, arguments)
    options = {k: v for k, v in loss.args[2].items() if k not in ("dims", "dim_weights")}  # type: ignore[attr-defined]

    def separate(q: Tensor, c: Tensor, b: Tensor, t: Tensor) -> Tensor:
        parts = ((20, 1.0), (3, 0.25), (9, 2.0))
        return torch.stack(
            [w * K.row_softmax_loss(q[:, :d], c[:, :d], t, candidate_bias=b, **options) for d, w in parts]
        ).sum()

    parts = evaluate(backend, separate, arguments)
    for a, b in zip((whole.loss, *whole.gradients), (parts.loss, *parts.gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_prefix_is_the_loss_of_these_features(backend: str) -> None:
    query, candidates = features(5, 8, 9)
    with ssl_kernels.use_backend(backend):
        one = K.row_softmax_loss(query, candidates, 7.0, dims=(4,), dim_weights=(0.5,))
        torch.testing.assert_close(one, K.row_softmax_loss(query[:, :4], candidates[:, :4], 7.0) / 2)


def test_prefixes_take_no_more_products_than_one() -> None:
    """In units of M N D, whatever the lengths."""
    query, candidates = (t.requires_grad_() for t in features(40, 50, 64))
    scale = torch.tensor(10.0, requires_grad=True)

    def flops(**options: Any) -> float:
        with torch.profiler.profile(with_flops=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            K.row_softmax_loss(query, candidates, scale, **options).backward()
        return sum(event.flops for event in profile.key_averages() if "mm" in event.key)

    with ssl_kernels.use_workspace(0.004), ssl_kernels.use_tile_budget(0):
        several, one = flops(dims=(64, 48, 32, 16, 8)), flops()
    assert several == one == 4 * 2 * 40 * 50 * 64


@pytest.mark.parametrize(("backend", "dtype"), AND_FLOAT64)
def test_a_guide_leaves_out_what_scores_above_the_target(backend: str, dtype: torch.dtype) -> None:
    """But neither the target, nor candidates that are as good: such as its copies."""
    query, candidates = (t.to(dtype) for t in features(6, 10, 4))
    guide_query, guide_candidates = (t.to(dtype) for t in features(6, 10, 5))
    candidates[9], guide_candidates[9] = candidates[2], guide_candidates[2]
    scores = guide_query.double() @ guide_candidates.double().t()
    own = scores.diagonal()[:, None]
    kept = (scores <= own) | torch.eye(6, 10, dtype=torch.bool)
    kept[:, 9] = kept[:, 2] | (torch.arange(6) == 2)
    assert not kept.all()
    z = (9 * query.double() @ candidates.double().t()).masked_fill(~kept, -torch.inf)
    with ssl_kernels.use_backend(backend):
        guide = {"guide_query": guide_query, "guide_candidates": guide_candidates}
        loss = K.row_softmax_loss(query, candidates, 9.0, **guide)
        torch.testing.assert_close(loss.double(), F.cross_entropy(z, torch.arange(6)), rtol=1e-6, atol=1e-6)
        threshold = torch.tensor([0.1, -0.2, 0.0, 9.0, -9.0, 0.3])
        kept = (scores <= threshold[:, None]) | torch.eye(6, 10, dtype=torch.bool)
        z = (9 * query.double() @ candidates.double().t()).masked_fill(~kept, -torch.inf)
        loss = K.row_softmax_loss(query, candidates, 9.0, **guide, guide_threshold=threshold)
        torch.testing.assert_close(loss.double(), F.cross_entropy(z, torch.arange(6)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_guide_leaves_nothing_out_where_there_is_no_target(backend: str) -> None:
    query, candidates = features(6, 10, 4)
    guide = dict(zip(("guide_query", "guide_candidates"), features(6, 10, 5), strict=True))
    with ssl_kernels.use_backend(backend):
        guided = K.row_lse(query, candidates, 9.0, target=torch.full((6,), -1), **guide)
        torch.testing.assert_close(guided, K.row_lse(query, candidates, 9.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sampled_softmax_estimates_the_full_one(backend: str) -> None:
    """With -log Q as bias the sum over a sample is an unbiased estimate; with all candidates in it, exact."""
    query, candidates = features(5, 30, 6)
    with ssl_kernels.use_backend(backend):
        full = K.row_softmax_loss(query, candidates, 8.0)
        sampled = K.row_softmax_loss(query, candidates, 8.0, candidate_bias=-torch.full((30,), 0.25).log())
        torch.testing.assert_close(sampled, full)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_bias_of_minus_infinity_removes_a_candidate(backend: str, label_smoothing: float) -> None:
    """Also where it is the target of a query, which is then without one."""
    query, candidates = features(5, 30, 6)
    removed = torch.zeros(30)
    removed[20:], removed[3] = -torch.inf, -torch.inf
    kept, rows = torch.arange(20) != 3, torch.arange(5) != 3
    loss = functools.partial(K.row_softmax_loss, candidate_bias=removed, label_smoothing=label_smoothing)
    ours = evaluate(backend, loss, [query, candidates, torch.tensor(8.0)])
    few = functools.partial(K.row_softmax_loss, label_smoothing=label_smoothing)
    expected = evaluate(backend, few, [query[rows], candidates[:20][kept], torch.tensor(8.0)])
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.gradients[0][rows], expected.gradients[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.gradients[1][:20][kept], expected.gradients[1], rtol=1e-5, atol=1e-6)
    assert (ours.gradients[1][removed < 0] == 0).all()
    assert (ours.gradients[0][3] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_sum_exps_of_blocks_make_the_loss_over_all_of_them(backend: str) -> None:
    query, candidates = features(7, 20, 5)
    arguments = [query, candidates, torch.tensor(6.0)]

    def in_blocks(q: Tensor, c: Tensor, t: Tensor) -> Tensor:
        lse = torch.logaddexp(K.row_lse(q, c[:9], t), K.row_lse(q, c[9:], t))
        return (lse - t * (q * c[:7]).sum(1)).mean()

    one, two = evaluate(backend, K.row_softmax_loss, arguments), evaluate(backend, in_blocks, arguments)
    for a, b in zip((one.loss, *one.gradients), (two.loss, *two.gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale", [6.0, 0.0])
@pytest.mark.parametrize(("backend", "dtype"), AND_FLOAT64)
def test_a_log_sum_exp_over_nothing_is_minus_infinity(backend: str, dtype: torch.dtype, scale: float) -> None:
    query, candidates = (t.to(dtype) for t in features(4, 9, 5))
    with ssl_kernels.use_backend(backend):
        ids = torch.zeros(9, dtype=torch.int64)
        lse = K.row_lse(query, candidates, scale, query_ids=ids[:4], candidate_ids=ids)
    assert (lse == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_log_sum_exp_leaves_out_every_candidate_of_the_own_id_but_a_target(backend: str) -> None:
    query, candidates = features(4, 9, 5)
    ids, others = torch.tensor([0, 1, 2, 0]), torch.arange(9) % 3
    z = 6 * query.double() @ candidates.double().t()
    with ssl_kernels.use_backend(backend):
        for target in (None, torch.tensor([0, -1, 5, 3])):
            kept = ids[:, None] != others
            if target is not None:
                kept = kept | (torch.arange(9) == target[:, None])
            lse = K.row_lse(query, candidates, 6.0, query_ids=ids, candidate_ids=others, target=target)
            torch.testing.assert_close(
                lse.double(), z.masked_fill(~kept, -torch.inf).logsumexp(1), rtol=1e-6, atol=1e-6
            )


def test_clip_is_two_of_them() -> None:
    x, y = features(20, 20, 8)
    arguments = [x, y, torch.tensor(12.0)]

    def both(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
        return (K.row_softmax_loss(x, y, t) + K.row_softmax_loss(y, x, t)) / 2

    one, two = evaluate("cpu", K.clip_loss, arguments), evaluate("cpu", both, arguments)
    for a, b in zip((one.loss, *one.gradients), (two.loss, *two.gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- properties


@hypothesis_settings(max_examples=20)
@given(rows=st.integers(1, 40), extra=st.integers(0, 20), seed=st.integers(0, 1000))
def test_permuting_candidates_permutes_their_gradients(rows: int, extra: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, candidates = features(rows, rows + extra, 8)
    order = torch.randperm(rows + extra)
    target = torch.argsort(order)[:rows]  # where the first candidates have gone
    whole = evaluate("cpu", K.row_softmax_loss, [query, candidates, torch.tensor(10.0)])
    loss = functools.partial(K.row_softmax_loss, target=target)
    moved = evaluate("cpu", loss, [query, candidates[order], torch.tensor(10.0)])
    torch.testing.assert_close(moved.loss, whole.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(moved.gradients[0], whole.gradients[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved.gradients[1], whole.gradients[1][order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", FUSED)
@hypothesis_settings(max_examples=15)
@given(rows=st.integers(1, 40), shift=st.floats(-50, 50, width=32), seed=st.integers(0, 1000))
def test_what_all_logits_share_changes_nothing(backend: str, rows: int, shift: float, seed: int) -> None:
    """A constant bias, and weights and ids that say nothing."""
    torch.manual_seed(seed)
    arguments = [*features(rows, rows + 3, 6), torch.tensor(20.0)]
    ids = torch.arange(rows + 3)
    same = functools.partial(
        K.row_softmax_loss, candidate_bias=torch.full((rows + 3,), shift), weights=torch.ones(rows),
        query_ids=ids[:rows], candidate_ids=ids,
    )  # fmt: skip
    one, two = evaluate(backend, K.row_softmax_loss, arguments), evaluate(backend, same, arguments)
    for a, b in zip((one.loss, *one.gradients), (two.loss, *two.gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize("backend", FUSED)
@hypothesis_settings(max_examples=8)
@given(rows=st.integers(1, 50), workspace_kb=st.floats(2, 30), budget_kb=st.floats(0, 40), seed=st.integers(0, 999))
def test_the_result_does_not_depend_on_tiles_or_budget(
    backend: str, rows: int, workspace_kb: float, budget_kb: float, seed: int
) -> None:
    torch.manual_seed(seed)
    for options in ({}, {"bias": True, "ids": 4, "dims": (8, 3), "normalize": True, "guide": 3}):
        loss, arguments = call(rows, rows + 20, **options)
        expected = evaluate(backend, loss, arguments)
        with ssl_kernels.use_workspace(workspace_kb / 1024), ssl_kernels.use_tile_budget(budget_kb / 1024):
            ours = evaluate(backend, loss, arguments)
        torch.testing.assert_close(ours.loss, expected.loss, rtol=2e-6, atol=2e-6)
        for a, b in zip(ours.gradients, expected.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


# ---- numerics


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("scale", [100.0, 200.0])
def test_random_features_of_a_large_model_at_the_sharpest_temperature(backend: str, scale: float) -> None:
    arguments = [*features(60, 96, 1152), torch.tensor(scale)]
    exact = oracle(K.row_softmax_loss, arguments)
    assert 3 < exact.loss < 30
    assert_close(evaluate(backend, K.row_softmax_loss, arguments), plain(K.row_softmax_loss, arguments), exact)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 5), (17, 33), (33, 70)])
def test_padding_is_never_a_maximum(backend: str, rows: int, cols: int) -> None:
    x, y = features(rows, cols, 4)
    arguments = [F.normalize(x.abs() + 0.5, dim=-1), F.normalize(-y.abs() - 0.5, dim=-1), torch.tensor(100.0)]
    for mb in (64, 0.002):
        with ssl_kernels.use_workspace(mb):
            ours = evaluate(backend, K.row_softmax_loss, arguments)
        assert_close(ours, plain(K.row_softmax_loss, arguments), oracle(K.row_softmax_loss, arguments))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [5.0, 10.0, 20.0, 100.0])
def test_a_perfect_match_scores_the_rest_to_fp32(backend: str, scale: float) -> None:
    x = torch.eye(24)
    with ssl_kernels.use_backend(backend):
        loss = K.row_softmax_loss(x, x, scale).item()
    assert loss == pytest.approx(math.log1p(23 * math.exp(-scale)), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("bias", [False, True])
def test_saturated_pairs_leave_no_noise_in_the_gradient(backend: str, bias: bool) -> None:
    x, noise = features(150, 150, 512)
    y = F.normalize(x + 0.3 * noise, dim=-1)
    loss = functools.partial(K.row_softmax_loss, candidate_bias=torch.randn(150) if bias else None)
    assert all(g.abs().max() < 1e-9 for g in evaluate(backend, loss, [x, y, torch.tensor(100.0)]).gradients[:2])


def test_fp16_gradients_survive_a_large_batch_and_small_weights() -> None:
    """Under a loss scale of 2^16, as mixed precision uses; the factor t / M is applied in fp32."""
    query, candidates = features(16_384, 24, 8, torch.float16)
    options = {"target": torch.arange(16_384) % 24, "weights": 1e-7 * torch.rand(16_384)}
    loss, scaled = functools.partial(K.row_softmax_loss, **options), torch.tensor(65_536.0 * 1e7)
    arguments = [query, candidates, torch.tensor(10.0)]
    ours, exact = evaluate("cpu", loss, arguments, scaled), oracle(loss, arguments, scaled)
    for a, o in zip(ours.gradients[:2], exact.gradients[:2], strict=True):
        assert distance(a, o) <= 2**-10 * o.norm()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-42])
def test_a_bias_and_its_gradient_at_a_scale_next_to_zero(backend: str, scale: float) -> None:
    loss, arguments = call(6, 9, 4, bias=True, scale=scale)
    ours, exact = evaluate(backend, loss, arguments), oracle(loss, arguments)
    torch.testing.assert_close(ours.loss.double(), exact.loss)
    for a, b in zip(ours.gradients[2:], exact.gradients[2:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_queries_show_in_the_loss(backend: str, bad: float) -> None:
    for row, workspace in itertools.product((0, 7, 29), (64, 0.002)):
        _, (query, candidates, scale) = call(30, 40, 4)
        query[row] = bad
        with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(workspace):
            assert not K.row_softmax_loss(query, candidates, scale).isfinite()
            assert not K.row_softmax_loss(query.requires_grad_(), candidates, scale).isfinite()
            assert not K.row_lse(query, candidates, scale)[row].isfinite()


@pytest.mark.parametrize("backend", FUSED)
def test_huge_similarities_below_zero_are_not_taken_for_pairs_left_out(backend: str) -> None:
    """Without a guide there are none."""
    query = torch.tensor([[1e19, 0.0]])
    candidates = torch.tensor([[-2e19, 0.0], [-2.1e19, 0.0]])
    with ssl_kernels.use_backend(backend):
        torch.testing.assert_close(K.row_softmax_loss(query, candidates, 1e-38).item(), math.log1p(math.exp(-0.1)))


# ---- edges


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "cols", "width"), [(0, 0, 4), (0, 5, 4), (3, 4, 0), (1, 1, 1)])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_empty_and_tiny_inputs(backend: str, rows: int, cols: int, width: int, label_smoothing: float) -> None:
    arguments = [torch.ones(rows, width), torch.ones(cols, width), torch.tensor(2.0)]
    for reduction in ("mean", "sum", "none"):
        loss = functools.partial(K.row_softmax_loss, reduction=reduction, label_smoothing=label_smoothing)
        ours, exact = evaluate(backend, loss, arguments), oracle(loss, arguments)
        for a, o in zip((ours.loss, *ours.gradients), (exact.loss, *exact.gradients), strict=True):
            torch.testing.assert_close(a.double(), o)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_candidates(backend: str) -> None:
    query, nothing = torch.ones(3, 4), torch.ones(0, 4)
    target = torch.full((3,), -1)
    with ssl_kernels.use_backend(backend):
        assert K.row_softmax_loss(query, nothing, 2.0, target=target) == 0
        assert (K.row_lse(query, nothing, 2.0) == -torch.inf).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_queries_without_a_target_do_not_count(backend: str, reduction: str, label_smoothing: float) -> None:
    query, candidates = features(6, 9, 4)
    target = torch.tensor([2, -1, 3, -(2**62), 0, -7])
    arguments = [query, candidates, torch.tensor(9.0)]
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    some = evaluate(backend, functools.partial(K.row_softmax_loss, target=target, **options), arguments)
    few = functools.partial(K.row_softmax_loss, target=target[target >= 0], **options)
    expected = evaluate(backend, few, [query[target >= 0], candidates, torch.tensor(9.0)])
    torch.testing.assert_close(some.loss, expected.loss, rtol=1e-6, atol=0)
    assert (some.gradients[0][target < 0] == 0).all()
    torch.testing.assert_close(some.gradients[0][target >= 0], expected.gradients[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some.gradients[1], expected.gradients[1], rtol=1e-5, atol=1e-6)
    none = functools.partial(K.row_softmax_loss, target=torch.full((6,), -1), **options)
    nothing = evaluate(backend, none, arguments)
    assert nothing.loss == 0
    assert all((g == 0).all() for g in nothing.gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_0_leaves_a_row_out_of_the_sum(backend: str) -> None:
    query, candidates = features(6, 9, 4)
    weights = torch.tensor([1.0, 0, 2, 0, 0, 3])
    kept = weights > 0
    loss = functools.partial(K.row_softmax_loss, weights=weights, reduction="sum")
    ours = evaluate(backend, loss, [query, candidates, torch.tensor(9.0)])
    few = functools.partial(K.row_softmax_loss, weights=weights[kept], target=torch.arange(6)[kept], reduction="sum")
    expected = evaluate(backend, few, [query[kept], candidates, torch.tensor(9.0)])
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.gradients[1], expected.gradients[1], rtol=1e-5, atol=1e-6)
    assert (ours.gradients[0][~kept] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_use_all_64_bits_and_spare_the_target(backend: str) -> None:
    """What is left out may be anything: here it would outweigh all others."""
    query, candidates = unit_rows(3, 4), unit_rows(6, 4)
    candidates[4] = 100 * query[1]
    ids, others = torch.tensor([2**40, 5, -1]), torch.tensor([2**40, 5, 2**40 + 2**33, 7, 5, -1])
    kept = (ids[:, None] != others) | torch.eye(3, 6, dtype=torch.bool)
    z = (9 * query.double() @ candidates.double().t()).masked_fill(~kept, -torch.inf)
    with ssl_kernels.use_backend(backend):
        loss = K.row_softmax_loss(query, candidates, 9.0, query_ids=ids, candidate_ids=others)
    torch.testing.assert_close(loss.double(), F.cross_entropy(z, torch.arange(3)), rtol=1e-6, atol=1e-6)


def test_a_target_beyond_the_candidates_is_nan_where_it_cannot_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, for which looking would be waiting."""
    monkeypatch.setattr(row_loss, "_may_look", lambda a: False)
    query, candidates = features(3, 5, 4)
    for kind, is_bad in (("mean", True), ("none", [False, True, False])):
        with ssl_kernels.use_backend("eager"):
            loss = K.row_softmax_loss(
                query.double(), candidates.double(), 9.0, target=torch.tensor([0, 5, -1]), reduction=kind
            )
        assert loss.isnan().tolist() == is_bad
    with ssl_kernels.use_backend("eager"):
        lse = K.row_lse(query, candidates, 9.0, target=torch.tensor([0, 5, -1]))
    assert lse.isnan().tolist() == [False, True, False]


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.ones(3)}, ValueError, r"query: expected 2 dimensions .* got shape \(3,\)"),
        ({"candidates": torch.ones(5, 4).bfloat16()}, TypeError, "candidates: expected the dtype of query"),
        ({"candidates": torch.ones(2, 4)}, ValueError, "candidates: expected at least 3 rows, one to a query, or a"),
        ({"scale": -1.0}, ValueError, "scale: expected a number >= 0, got -1"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, ValueError, r"target: expected shape \(3,\), got \(2,\)"),
        ({"target": torch.zeros(3)}, TypeError, "target: expected an int64 tensor, got torch.float32"),
        ({"target": torch.tensor([0, 5, 1])}, ValueError, "target: expected numbers below 5, .* got 5"),
        ({"candidate_bias": torch.zeros(3)}, ValueError, r"candidate_bias: expected shape \(5,\), got \(3,\)"),
        ({"candidate_bias": 1.0}, TypeError, "candidate_bias: expected a floating tensor, got float"),
        ({"query_ids": torch.zeros(3, dtype=torch.int64)}, ValueError, "candidate_ids: expected ids for both queries"),
        ({"same_id": "drop"}, ValueError, "same_id: expected one of 'ignore', 'positive', 'negative', got 'drop'"),
        ({"weights": torch.ones(3, requires_grad=True)}, ValueError, "weights: expected a tensor without gradient"),
        ({"weights": torch.ones(3).long()}, TypeError, "weights: expected a floating tensor, got torch.int64"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
        ({"hardness": -1.0}, ValueError, "hardness: expected a number >= 0, got -1.0"),
        ({"hardness": math.inf}, ValueError, "hardness: expected a number >= 0, got inf"),
        ({"hardened": "some"}, ValueError, "hardened: expected one of 'all', 'same_id', 'other_ids', got 'some'"),
        ({"hardened": "same_id"}, ValueError, "hardened: expected 'all' without query_ids and candidate_ids, got 'sam"),
        ({"guide_query": torch.ones(3, 2)}, ValueError, "guide_candidates: expected guide features for both"),
        ({"guide_threshold": torch.ones(3)}, ValueError, "guide_query: expected guide features for both"),
        (
            {"guide_query": torch.ones(3, 2), "guide_candidates": torch.ones(4, 2)},
            ValueError, "guide_candidates: expected 5 rows, got 4",
        ),
        (
            {"guide_query": torch.ones(3, 2, requires_grad=True), "guide_candidates": torch.ones(5, 2)},
            ValueError, "guide_query: expected a tensor without gradient",
        ),
        ({"dims": ()}, ValueError, "dims: expected lengths that differ, at least one, got "),
        ({"dims": (2, 2)}, ValueError, r"dims: expected lengths that differ, at least one, got \[2, 2\]"),
        ({"dims": (5,)}, ValueError, "dims: expected lengths from 1 to 4, the number of features, got 5"),
        ({"dims": (2.0,)}, TypeError, "dims: expected ints, got float"),
        ({"dims": (2, 4), "dim_weights": (1.0,)}, ValueError, "dim_weights: expected 2 numbers, .* got 1"),
        ({"dim_weights": (1.0,)}, ValueError, "dim_weights: expected None without dims"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
        ({"strategy": "tree"}, ValueError, "strategy: expected one of 'auto', 'gather', 'ring', got 'tree'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"query": torch.ones(3, 4), "candidates": torch.ones(5, 4), "scale": 10.0}
    with pytest.raises(error, match=message):
        K.row_softmax_loss(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"same_id": "positive"}, "same_id: expected one of 'ignore', 'negative', got 'positive'"),
        (
            {"guide_query": torch.ones(3, 2), "guide_candidates": torch.ones(5, 2)},
            "guide_threshold: expected a number to each query, or a target, got neither",
        ),
    ],
)
def test_bad_arguments_of_the_log_sum_exp_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        K.row_lse(torch.ones(3, 4), torch.ones(5, 4), 1.0, **change)
