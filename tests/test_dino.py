"""The DINO loss against its definition in float64, through torch's machinery, and its memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from contrastive import distance, dtypes, workspaces_mb
from distillation import (
    BACKENDS,
    FUSED,
    assert_close,
    evaluate,
    forms,
    in_form,
    lay_out,
    layouts,
    logits,
    oracle,
    plain,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from memory import linux_only, peak_mb, saved_bytes
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.ops import dino, hand_over

# ---- values and gradients


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(
    crops=st.integers(1, 5),
    teacher_crops=st.integers(1, 4),
    samples=st.integers(1, 7),
    width=st.one_of(st.integers(1, 70), st.sampled_from([129, 500, 1023, 2049, 4100])),
    dtype=dtypes,
    teacher_dtype=dtypes,
    layout=layouts,
    teacher_layout=layouts,
    form=forms,
    pairs=st.sampled_from(["distinct", "all"]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    teacher=st.sampled_from(["logits", "centred", "probabilities"]),
    size=st.sampled_from([0.1, 1.0, 8.0]),
    temps=st.sampled_from([(0.1, 0.04), (0.1, 0.07), (1.0, 1.0), (0.05, 0.01)]),
    workspace_mb=workspaces_mb,
    seed=st.integers(0, 2**16),
)
def test_matches_the_float64_reference(
    backend: str, crops: int, teacher_crops: int, samples: int, width: int, dtype: torch.dtype,
    teacher_dtype: torch.dtype, layout: str, teacher_layout: str, form: str, pairs: str, reduction: str, teacher: str,
    size: float, temps: tuple[float, float], workspace_mb: float, seed: int,
) -> None:  # fmt: skip
    assume(pairs == "all" or max(crops, teacher_crops) > 1)
    torch.manual_seed(seed)
    student = lay_out(logits(crops, samples, width, dtype, size), layout)
    target = logits(teacher_crops, samples, width, size=size)
    target = lay_out((target.softmax(-1) if teacher == "probabilities" else target).to(teacher_dtype), teacher_layout)
    options: dict[str, Any] = {
        "student_temp": temps[0],
        "teacher_temp": temps[1],
        "center": torch.randn(1, 1, width) if teacher == "centred" else None,
        "teacher_probs": teacher == "probabilities",
        "pairs": pairs,
        "reduction": reduction,
    }
    weight = torch.randn(samples) if reduction == "none" else torch.tensor(-1.7)
    with ssl_kernels.use_workspace(workspace_mb):
        ours = evaluate(backend, student, target, weight, form, **options)
    exact = oracle(student, target, weight, **options)
    eager = plain(student, target, weight, **options)
    assert ours.loss.dtype == ours.teacher_sum.dtype == torch.float32
    z = student.double() / temps[0]
    spread = (z.amax(-1) - z.amin(-1)).amax().item() + math.log(width)
    factor = weight.norm().item() / (samples if reduction == "mean" else 1)  # each of the samples' crops has a share
    assert_close(
        ours, eager, exact, terms=spread * factor * samples, gradient_terms=factor / temps[0] * samples, roundings=2
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_65537_prototypes(backend: str, dtype: torch.dtype) -> None:
    student, teacher = logits(4, 3, 65_537, dtype), logits(2, 3, 65_537, dtype)
    center = 0.1 * torch.randn(65_537)
    ours, exact = (
        evaluate(b, student.to(d), teacher.to(d), center=center)
        for b, d in ((backend, dtype), ("reference", torch.float64))
    )
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-6, atol=0)
    assert (
        distance(ours.gradient, exact.gradient) <= (4e-6 if dtype == torch.float32 else 2**-8) * exact.gradient.norm()
    )
    torch.testing.assert_close(ours.teacher_sum.double(), exact.teacher_sum, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loop_over_pairs_of_the_paper(backend: str) -> None:
    """Its pseudo-code, for two global and four local crops: t1 with all but s1, t2 with all but s2."""
    student, teacher, center = logits(6, 8, 40).requires_grad_(), logits(2, 8, 40), torch.randn(40)

    def h(t: Tensor, s: Tensor) -> Tensor:
        return -(torch.softmax((t - center) / 0.04, 1) * torch.log_softmax(s / 0.1, 1)).sum(1).mean()

    expected = sum(h(teacher[t], student[v]) for t in range(2) for v in range(6) if t != v) / 10
    with ssl_kernels.use_backend(backend):
        loss = K.dino_loss(student, teacher, center=center)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("pairs", ["distinct", "all"])
def test_gradcheck(backend: str, reduction: str, pairs: str) -> None:
    student, teacher = logits(3, 4, 5).double().requires_grad_(), logits(2, 4, 5).double()

    def loss(s: Tensor) -> Tensor:
        return K.dino_loss(s, teacher, student_temp=0.5, teacher_temp=0.3, reduction=reduction, pairs=pairs)

    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0005):
        assert torch.autograd.gradcheck(loss, student)
        if backend == "reference":
            assert torch.autograd.gradgradcheck(loss, student)


@pytest.mark.parametrize("backend", FUSED)
def test_the_order_of_samples_and_prototypes_does_not_matter(backend: str) -> None:
    student, teacher, center = logits(4, 9, 300), logits(2, 9, 300), torch.randn(300)
    expected = evaluate(backend, student, teacher, center=center, reduction="none")
    rows, cols = torch.randperm(9), torch.randperm(300)
    ours = evaluate(
        backend, student[:, rows][..., cols], teacher[:, rows][..., cols], center=center[cols], reduction="none"
    )
    torch.testing.assert_close(ours.loss, expected.loss[rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.gradient, expected.gradient[:, rows][..., cols], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", FUSED)
def test_a_constant_added_to_logits_changes_nothing(backend: str) -> None:
    """Up to 1,024, whose digits remain: a difference with the maximum comes before the division by the temperature."""
    student, teacher = (t.mul(64).round().div(64) for t in (logits(4, 3, 50), logits(2, 3, 50)))
    expected = evaluate(backend, student, teacher)
    for shift in (-1024, 1024):
        ours = evaluate(backend, student + shift, teacher + shift)
        torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.gradient, expected.gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_center_of_a_uniform_teacher_is_forgotten(backend: str) -> None:
    """At logits equal to the centre every prototype has the same probability, however far apart they are."""
    center = 50 * torch.randn(1, 1, 64)
    teacher = center.expand(2, 5, 64)
    ours = evaluate(backend, torch.zeros(4, 5, 64), teacher, center=center)
    torch.testing.assert_close(ours.loss.item(), math.log(64), rtol=1e-6, atol=0)
    assert ours.gradient.abs().max() < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("temp", [0.1, torch.tensor([0.1], dtype=torch.float64)])
def test_temperatures_may_be_tensors(backend: str, temp: Tensor | float) -> None:
    student, teacher = logits(3, 4, 9), logits(2, 4, 9)
    ours = evaluate(backend, student, teacher, student_temp=temp, teacher_temp=temp)
    expected = evaluate(backend, student, teacher, student_temp=0.1, teacher_temp=0.1)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-6, atol=0)


def test_same_bits_every_time() -> None:
    student, teacher = logits(4, 7, 3000), logits(2, 7, 3000)
    first, *others = (evaluate("cpu", student, teacher) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


# ---- edges


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("samples", "width"), [(0, 5), (1, 1), (1, 5), (3, 1)])
def test_empty_and_tiny_inputs(backend: str, reduction: str, samples: int, width: int) -> None:
    student, teacher = logits(3, samples, width), logits(2, samples, width)
    ours = evaluate(backend, student, teacher, reduction=reduction)
    exact = oracle(student, teacher, reduction=reduction)
    for a, o in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), o, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert ours.loss.isnan().all() == (samples == 0 and reduction == "mean") or ours.loss.numel() == 0
    assert ours.gradient.isfinite().all()  # an empty shard must not poison the others' parameters
    if samples == 0:
        assert ours.teacher_sum.eq(0).all()
    if width == 1:
        assert ours.loss.eq(0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("crops", "teacher_crops"), [(1, 3), (2, 3), (3, 1), (1, 2)])
def test_any_number_of_crops(backend: str, crops: int, teacher_crops: int) -> None:
    """Also fewer of the student than of the teacher, and one of which the teacher's only crop is its own."""
    student, teacher = logits(crops, 4, 11), logits(teacher_crops, 4, 11)
    ours, exact = evaluate(backend, student, teacher), oracle(student, teacher)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.gradient.double(), exact.gradient, rtol=1e-4, atol=1e-6)


def test_more_teachers_than_the_stack_would_hold() -> None:
    student = torch.tensor([[[0.1, 0.0]]])
    ours = evaluate("cpu", student, torch.zeros(400_000, 1, 2), pairs="all")
    p = 1 / (1 + math.exp(-1))  # each teacher has probabilities of 1/2
    torch.testing.assert_close(ours.loss.item(), -0.5 * math.log(p * (1 - p)), rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.gradient[0, 0], 10 * torch.tensor([p - 0.5, 0.5 - p]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", ["student", "teacher", "center"])
@pytest.mark.parametrize("col", [0, 6, 16, 40])
def test_non_finite_input_shows_in_the_loss_of_its_sample(backend: str, bad: float, argument: str, col: int) -> None:
    student, teacher, center = logits(3, 5, 41), logits(2, 5, 41), torch.zeros(41)
    if argument == "center":
        center[col] = bad
    else:
        (student if argument == "student" else teacher)[1, 2, col] = bad
    ours = evaluate(backend, student, teacher, center=center, reduction="none")
    exact = oracle(student, teacher, center=center, reduction="none")
    shows = argument == "student" or not (bad == -math.inf if argument == "teacher" else bad == math.inf)
    if not shows:  # a teacher's probability of 0
        torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.gradient.double(), exact.gradient, rtol=1e-4, atol=1e-6)
        return
    assert not ours.loss[2].isfinite()
    assert argument == "center" or ours.loss[[0, 1, 3, 4]].isfinite().all()
    assert not math.isnan(bad) or ours.loss[2].isnan()
    for a, o in ((ours.gradient, exact.gradient), (ours.teacher_sum, exact.teacher_sum)):
        untouched = o.isfinite()
        assert torch.equal(a.isfinite(), untouched)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", ["student", "teacher"])
def test_rows_of_nothing_but_minus_infinity_are_nan(backend: str, argument: str) -> None:
    student, teacher = logits(3, 4, 2100), logits(2, 4, 2100)
    (student if argument == "student" else teacher)[1, 2] = -math.inf
    ours = evaluate(backend, student, teacher, reduction="none")
    assert ours.loss[2].isnan()
    assert ours.loss[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_block_of_minus_infinity_within_a_row(backend: str) -> None:
    """Prototypes that the teacher rules out, more of them than a block of a row has."""
    student, teacher = logits(3, 2, 9000), logits(2, 2, 9000)
    teacher[0, 0, :4500], teacher[1, 1, 100:8990] = -math.inf, -math.inf
    ours, exact = evaluate(backend, student, teacher), oracle(student, teacher)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(ours.gradient.double(), exact.gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", FUSED)
def test_a_peak_that_comes_late_in_a_long_row(backend: str) -> None:
    """What came before it is brought down to nothing; and the other way round."""
    student, teacher = logits(3, 4, 20_000), logits(2, 4, 20_000)
    for t, at in itertools.product((student, teacher), (0, 19_999)):
        t[:, at // 10_000, at] = 60
    ours, exact = evaluate(backend, student, teacher), oracle(student, teacher)
    eager = plain(student, teacher)
    assert_close(ours, eager, exact, terms=700, gradient_terms=10)


# ---- 16 bits


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("upstream", [1.0, 65_536.0])
def test_fp16_gradients_of_65536_prototypes_survive(backend: str, upstream: float) -> None:
    """A probability of 1/65,536 is subnormal in fp16; 65,536 is the loss scale that mixed precision starts with."""
    student, teacher = logits(4, 8, 65_536, torch.float16, 0.05), logits(2, 8, 65_536, torch.float16, 0.02)
    weight = torch.tensor(upstream)
    ours, exact = (f(student, teacher, weight) for f in (lambda *a: evaluate(backend, *a), oracle))
    floor = 2**-25 * exact.gradient.numel() ** 0.5
    assert distance(ours.gradient, exact.gradient) <= 2**-10 * exact.gradient.norm() + floor
    if upstream > 1:
        assert floor < 0.01 * exact.gradient.norm()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("temp", [1e-5, 3e-4, 0.02])
def test_fp16_gradients_of_cold_students_do_not_overflow(backend: str, temp: float) -> None:
    student, teacher = (temp * logits(n, 2, 9) for n in (3, 2))
    student = student.half()
    exact = oracle(student, teacher, student_temp=temp)
    tensor = torch.tensor(temp)
    leaf = student.clone().requires_grad_()
    with ssl_kernels.use_backend(backend):
        loss = K.dino_loss(leaf, teacher, student_temp=tensor)
        tensor.fill_(math.nan)  # the next step's
        for retain in (True, False):
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=retain)
            assert distance(gradient, exact.gradient) <= 2**-9 * exact.gradient.norm()


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("masked", [1, 512, 2048, 2100])
def test_prototypes_that_the_teacher_rules_out(backend: str, masked: int) -> None:
    """Even a whole block of a row at its start."""
    student, teacher = logits(3, 2, 2103), logits(2, 2, 2103) - 50
    teacher[..., :masked] = -torch.inf
    ours, exact = evaluate(backend, student, teacher), oracle(student, teacher)
    torch.testing.assert_close(ours.loss.double(), exact.loss, rtol=1e-5, atol=0)
    assert distance(ours.gradient, exact.gradient) <= 1e-5 * exact.gradient.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_that_nearly_cancels_is_cast_once(dtype: torch.dtype) -> None:
    """The student agrees with its teachers but for 1%: p - q in 16 bits would be noise."""
    teacher = logits(2, 4, 100)
    student = (2.5 * teacher.mean(0, keepdim=True)).repeat(3, 1, 1).to(dtype)  # the same softmax
    p = torch.softmax(student.double() / 0.1, -1)[:2]
    target = (p * (1 + 0.01 * torch.randn_like(p))).float()
    options: dict[str, Any] = {"teacher_probs": True}
    ours, exact = (f(student, target, **options) for f in (lambda *a, **o: evaluate("cpu", *a, **o), oracle))
    floor = 2**-25 * exact.gradient.numel() ** 0.5 if dtype == torch.float16 else 0
    assert distance(ours.gradient, exact.gradient) <= 2**-8 * exact.gradient.norm() + floor


# ---- autograd


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_upstream_gradient_is_a_factor(backend: str, reduction: str, dtype: torch.dtype) -> None:
    student, teacher = logits(3, 4, 30, dtype), logits(2, 4, 30)
    once = evaluate(backend, student, teacher, reduction=reduction)
    student.requires_grad_()
    factor = torch.tensor([2.0, 0.0, -4.0, 0.5]) if reduction == "none" else torch.tensor(-2.0)
    with ssl_kernels.use_backend(backend):
        loss = K.dino_loss(student, teacher, reduction=reduction)
        (factor * loss).sum().backward()
    expected = once.gradient * (factor[:, None] if reduction == "none" else factor).to(dtype)
    torch.testing.assert_close(student.grad, expected, rtol=0 if dtype == torch.float32 else 2**-10, atol=2**-22)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize("form", ["tensor", "crops", "blocks"])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(backend: str, factor: float, form: str) -> None:
    """The gradient's memory is handed over by the last backward pass only."""
    student, teacher = logits(4, 5, 30), logits(2, 5, 30)
    expected = factor * evaluate(backend, student, teacher).gradient
    leaf = student.clone().requires_grad_()
    with ssl_kernels.use_backend(backend):
        loss = factor * K.dino_loss(in_form(leaf, form), teacher)
        gradients = []
        for retain in (True, True, False):
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=retain)
            gradients.append(gradient.clone())
            gradient.fill_(math.nan)  # whoever receives a gradient may write to it
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaf)


@pytest.mark.parametrize("backend", FUSED)
def test_micro_batches_add_up_in_a_leaf(backend: str) -> None:
    """The first gradient becomes the leaf's own; the second is added to it and must not be the same memory."""
    student, teacher = logits(4, 6, 30), [logits(2, 6, 30) for _ in range(3)]
    parts = [evaluate(backend, student, t).gradient for t in teacher]
    leaf = student.clone().requires_grad_()
    with ssl_kernels.use_backend(backend):
        for t in teacher:
            K.dino_loss(list(leaf), t).backward()
    torch.testing.assert_close(leaf.grad, sum(parts), rtol=1e-6, atol=1e-9)
    crops = [crop.clone().requires_grad_() for crop in student]
    with ssl_kernels.use_backend(backend):
        for t in teacher:
            (0.5 * K.dino_loss(crops, t)).backward()
    torch.testing.assert_close(torch.stack([crop.grad for crop in crops]), 0.5 * sum(parts), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", FUSED)
def test_two_losses_of_the_same_logits_in_one_graph(backend: str) -> None:
    student, teacher = logits(4, 6, 30), [logits(2, 6, 30) for _ in range(2)]
    expected = sum(f * evaluate(backend, student, t).gradient for f, t in zip((1.0, 2.0), teacher, strict=True))
    leaf = student.clone().requires_grad_()
    with ssl_kernels.use_backend(backend):
        (K.dino_loss(leaf, teacher[0]) + 2 * K.dino_loss(leaf, teacher[1])).backward()
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("backend", FUSED)
def test_only_some_crops_may_require_a_gradient(backend: str) -> None:
    student, teacher = logits(4, 3, 20), logits(2, 3, 20)
    expected = evaluate(backend, student, teacher).gradient
    crops = [crop.clone().requires_grad_(v in (1, 3)) for v, crop in enumerate(student)]
    with ssl_kernels.use_backend(backend):
        K.dino_loss(crops, teacher).backward()
    for v, crop in enumerate(crops):
        assert (crop.grad is None) if v in (0, 2) else torch.equal(crop.grad, expected[v])  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", FUSED)
def test_double_backward_is_refused(backend: str) -> None:
    student = logits(3, 4, 5).requires_grad_()
    with ssl_kernels.use_backend(backend):
        loss = K.dino_loss(student, logits(2, 4, 5))
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
            gradient.sum().backward()


@pytest.mark.parametrize("backend", FUSED)
def test_transforms_are_refused(backend: str) -> None:
    student, teacher = logits(3, 4, 5), logits(2, 4, 5)
    with ssl_kernels.use_backend(backend):
        for transform in (torch.func.grad, lambda f: lambda s: torch.func.jvp(f, (s,), (s,))):
            with pytest.raises(NotImplementedError, match="use_backend\\('reference'\\)"):
                transform(lambda s: K.dino_loss(s, teacher))(student)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(backend: str, reentrant: bool) -> None:
    features, weight = torch.randn(3, 4, 6), torch.randn(6, 50)
    teacher = logits(2, 4, 50)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return K.dino_loss(x @ w, teacher)

    leaves = [features.requires_grad_(), weight.requires_grad_()]
    with ssl_kernels.use_backend(backend):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        checkpoint(loss, *leaves, use_reentrant=reentrant).backward()
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("backend", FUSED)
def test_saved_tensors_may_be_moved_away(backend: str) -> None:
    student, teacher = logits(3, 4, 50), logits(2, 4, 50)
    expected = evaluate(backend, student, teacher).gradient
    student.requires_grad_()
    with ssl_kernels.use_backend(backend), torch.autograd.graph.save_on_cpu():
        loss = K.dino_loss(student, teacher)
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_may_be_overwritten_between_forward_and_backward(backend: str) -> None:
    """The teacher's and the centre's memory, that is, which the next step writes to."""
    student, teacher, center = logits(3, 4, 20), logits(2, 4, 20), torch.randn(20)
    expected = evaluate(backend, student, teacher, center=center)
    student.requires_grad_()
    with ssl_kernels.use_backend(backend):
        loss = K.dino_loss(student, teacher, center=center)
        teacher.zero_()
        center.zero_()
        loss.backward()
    assert torch.equal(student.grad, expected.gradient)  # type: ignore[arg-type]


# ---- torch's machinery


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("distinct", [True, False])
def test_opcheck(backend: str, distinct: bool) -> None:
    temps = torch.tensor(0.1), torch.tensor(0.04)
    for dtype, needs, given_all in itertools.product((torch.float32, torch.bfloat16), (True, False), (True, False)):
        students = [logits(n, 3, 9, dtype).requires_grad_(needs) for n in (1, 2)]
        center, weights = (torch.randn(9), torch.rand(3)) if given_all else (None, None)
        arguments = (students, [logits(2, 3, 9)], center, weights, *temps, distinct, False, needs, given_all, 0.1, True)
        torch.library.opcheck(dino._op.in_graphs, (*arguments, backend))


def test_opcheck_of_the_last_step() -> None:
    for dtype in (torch.float32, torch.float16):
        torch.library.opcheck(hand_over.scale.in_graphs, (torch.randn(4, 3, 9).to(dtype), torch.randn(3)))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["tensor", "crops", "blocks"])
def test_compiles_without_a_graph_break(compiler: str, form: str) -> None:
    torch._dynamo.reset()
    features, weight, teacher, center = torch.randn(4, 5, 6), torch.randn(6, 70), logits(2, 5, 70), torch.randn(70)

    def step(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        loss, total = K.dino_loss(in_form(x @ w, form), teacher, center=center, want_teacher_sum=True)
        return 2 * loss, total

    def results(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (features, weight)]
        loss, total = function(*leaves)
        return [loss.detach(), total, *torch.autograd.grad(loss, leaves)]

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    for a, b in zip(results(compiled), results(step), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_once_for_all_batches(dtype: torch.dtype) -> None:
    """1 / B is not a constant of the graph."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda s, t: K.dino_loss(s, t), fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for samples in (5, 7, 12):
        student, teacher = logits(3, samples, 20, dtype).requires_grad_(), logits(2, samples, 20)
        loss = compiled(student, teacher)
        expected = evaluate("cpu", student, teacher)
        torch.testing.assert_close(loss.detach(), expected.loss)
        torch.testing.assert_close(torch.autograd.grad(loss, student)[0], expected.gradient)
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1


def test_autocast_leaves_the_logits_as_they_are() -> None:
    """Another library's einsum casts probabilities to fp16 there, in which 1/65,536 is subnormal."""
    student, teacher = logits(3, 4, 30), logits(2, 4, 30)
    expected = evaluate("cpu", student, teacher)
    student.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = K.dino_loss(student, teacher)
        assert loss.dtype == torch.float32
        loss.backward()
    assert torch.equal(loss.detach(), expected.loss)
    assert torch.equal(student.grad, expected.gradient)  # type: ignore[arg-type]


def test_inference_mode() -> None:
    student, teacher = logits(3, 4, 30), logits(2, 4, 30)
    expected = K.dino_loss(student, teacher)
    with torch.inference_mode():
        assert torch.equal(K.dino_loss(student.clone().requires_grad_(), teacher), expected)


# ---- memory


@linux_only
def test_memory_is_the_gradient_and_a_few_rows() -> None:
    """A plain implementation's softmaxes take as much as all logits, and a loop over pairs more."""
    student, teacher = logits(10, 64, 16_384).requires_grad_(), logits(2, 64, 16_384)
    gradient_mb = student.numel() * 4 / 2**20
    K.dino_loss(student[:, :2], teacher[:, :2]).backward()
    student.grad = None

    def step() -> None:
        with saved_bytes() as sizes:
            loss = K.dino_loss(student, teacher, want_teacher_sum=True)[0]
        assert sum(sizes) in (student.numel() * 4, student.numel() * 4 + 64)  # memory that is held has room to align
        loss.backward()
        student.grad = None

    with ssl_kernels.use_tile_budget(0):
        assert peak_mb(step, calls=3) < gradient_mb + 2
    with torch.no_grad():
        assert peak_mb(lambda: K.dino_loss(student, teacher), calls=3) < 2
    step()
    assert peak_mb(step, calls=3) < 2  # in the memory of the step before


@pytest.mark.parametrize("backend", FUSED)
def test_a_gradient_that_is_still_in_use_is_not_written_over(backend: str) -> None:
    """However it is held: as the leaf's own, as a view of a part, or by a graph whose backward is yet to come."""
    teacher = logits(2, 4, 65_536)
    steps = [logits(6, 4, 65_536).requires_grad_() for _ in range(7)]
    with ssl_kernels.use_tile_budget(0):
        expected = [evaluate(backend, student, teacher).gradient for student in steps]
    views, waiting = [], []
    with ssl_kernels.use_backend(backend):
        for i, student in enumerate(steps):
            loss = K.dino_loss(student, teacher)
            if i % 2:
                waiting.append(loss)
            else:
                loss.backward()
                assert student.grad is not None
                views.append(student.grad[3, 1:].clone() if i == 0 else student.grad[3, 1:])
                if i == 2:
                    student.grad = None
        for loss in waiting:
            loss.backward()
    for i, (student, gradient) in enumerate(zip(steps, expected, strict=True)):
        if i != 2:
            assert torch.equal(student.grad, gradient)  # type: ignore[arg-type]
        if i % 2 == 0:
            assert torch.equal(views[i // 2], gradient[3, 1:])


def test_nothing_is_saved_where_no_gradient_is_wanted() -> None:
    student, teacher = logits(3, 4, 30), logits(2, 4, 30)
    with saved_bytes() as sizes:
        K.dino_loss(student, teacher)
        with torch.no_grad():
            K.dino_loss(student.requires_grad_(), teacher)
    assert not sizes


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": torch.ones(3, 4)}, ValueError, r"student: expected shape \[crops, B, K\], got \(3, 4\)"),
        ({"student": []}, ValueError, "student: expected at least one crop, got an empty list"),
        ({"teacher": (t for t in torch.ones(2, 4, 5))}, TypeError, "teacher: .* sequence of tensors, got generator"),
        ({"student": torch.ones(0, 4, 5)}, ValueError, r"student: expected at least one crop, got shape \(0, 4, 5\)"),
        ({"student": [torch.ones(4, 5), None]}, TypeError, r"student\[1\]: expected a tensor, got NoneType"),
        ({"student": [torch.ones(4, 5), torch.ones(5)]}, ValueError, r"student\[1\]: .*\[crops, B, K\], got \(5,\)"),
        ({"student": [torch.ones(4, 5), torch.ones(3, 5)]}, ValueError, r"student\[1\]: expected \[B, K\] = \(4, 5\)"),
        (
            {"student": [torch.ones(4, 5), torch.ones(4, 5).half()]},
            TypeError,
            r"student\[1\]: expected the dtype of student\[0\] \(torch.float32\), got torch.float16",
        ),
        ({"student": torch.ones(3, 4, 5).int()}, TypeError, "student: expected dtype float32, .* got torch.int32"),
        ({"student": torch.ones(3, 4, 0), "teacher": torch.ones(2, 4, 0)}, ValueError, "student: .* one prototype"),
        ({"student": torch.ones(1, 4, 5), "teacher": torch.ones(1, 4, 5)}, ValueError, "student: .* got 1 for 1 of"),
        ({"teacher": torch.ones(2, 3, 5)}, ValueError, r"teacher: expected \[B, K\] = \(4, 5\) .* got \(3, 5\)"),
        (
            {"teacher": torch.ones(2, 4, 5, requires_grad=True)},
            ValueError,
            r"teacher: .* without gradient.* detach\(\)",
        ),
        ({"teacher": torch.ones(2, 4, 5, device="meta")}, ValueError, r"teacher: expected the device .* got meta"),
        ({"center": torch.ones(4)}, ValueError, r"center: expected 5 elements, .* got shape \(4,\)"),
        ({"center": torch.ones(5).int()}, TypeError, "center: expected a floating tensor, got torch.int32"),
        ({"center": torch.ones(5, requires_grad=True)}, ValueError, "center: expected a tensor without gradient"),
        ({"center": torch.ones(5, device="meta")}, ValueError, "center: expected the device of teacher .* got meta"),
        ({"student_temp": 0.0}, ValueError, "student_temp: expected a positive number, got 0.0"),
        ({"teacher_temp": -1.0}, ValueError, "teacher_temp: expected a positive number, got -1.0"),
        ({"teacher_temp": "warm"}, TypeError, "teacher_temp: expected a float or a tensor of one element, got str"),
        (
            {"student_temp": torch.tensor(0.1, requires_grad=True)},
            ValueError,
            "student_temp: expected a tensor without gradient",
        ),
        ({"center": torch.ones(5), "teacher_probs": True}, ValueError, "center: expected None beside teacher_probs"),
        ({"pairs": "some"}, ValueError, "pairs: expected one of 'distinct', 'all', got 'some'"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"student": torch.ones(3, 4, 5), "teacher": torch.ones(2, 4, 5)}
    with pytest.raises(error, match=message):
        K.dino_loss(**(arguments | change))


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_wider_student_widens_what_it_meets(backend: str) -> None:
    """A centre in float64 keeps its digits beside a float32 teacher, and the teacher is added up in float64."""
    student, teacher = logits(2, 3, 5).double(), logits(2, 3, 5)
    center = torch.full((5,), 1e-9, dtype=torch.float64).cumsum(0)
    with ssl_kernels.use_backend(backend):
        loss, total = K.dino_loss(student, teacher, teacher_temp=1e-6, center=center, want_teacher_sum=True)
    exact = K.dino_loss(student, teacher.double(), teacher_temp=1e-6, center=center)
    torch.testing.assert_close(loss, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(total, teacher.double().sum((0, 1)), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("backend", ["eager", "reference", "cpu"])
def test_large_teacher_logits_keep_the_digits_of_their_differences(backend: str) -> None:
    teacher = 1000 + logits(1, 50, 17)[0]
    exact = torch.softmax((teacher.double() - 1000) / 0.04, 1)
    with ssl_kernels.use_backend(backend):
        torch.testing.assert_close(K.centered_softmax(teacher, 0.04).double(), exact, rtol=1e-5, atol=1e-6)
