"""The iBOT patch loss against its definition in float64, and its module beside lightly's."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from contrastive import HALF_EPS, distance, dtypes, workspaces_mb
from distillation import BACKENDS, FUSED, lay_out, layouts
from hypothesis import given
from hypothesis import strategies as st
from memory import linux_only, peak_mb, saved_bytes
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import IBOTPatchLoss


class Result(NamedTuple):
    loss: Tensor
    gradient: Tensor
    teacher_sum: Tensor


def run(backend: str, student: Tensor, teacher: Tensor, weight: Tensor | None = None, **options: Any) -> Result:
    """Loss and gradient; ``weight`` is the upstream gradient."""
    leaf = student.detach().requires_grad_()
    with ssl_kernels.use_backend(backend):
        loss, teacher_sum = K.ibot_patch_loss(leaf, teacher, want_teacher_sum=True, **options)
        loss.backward(torch.ones_like(loss) if weight is None else weight.to(loss.dtype))
    assert leaf.grad is not None
    return Result(loss.detach(), leaf.grad, teacher_sum)


def oracle(student: Tensor, teacher: Tensor, weight: Tensor | None = None, **options: Any) -> Result:
    return run("reference", student.double(), teacher.double(), weight, **options)


def patches(rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)


# ---- values and gradients


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(
    rows=st.integers(1, 12),
    width=st.one_of(st.integers(1, 70), st.sampled_from([500, 2049])),
    dtype=dtypes,
    teacher_dtype=dtypes,
    layout=layouts,
    teacher_layout=layouts,
    weighted=st.sampled_from(["no", "fp32", "bf16", "tiny"]),
    reduction=st.sampled_from(["sum", "none"]),
    centred=st.booleans(),
    teacher_probs=st.booleans(),
    workspace_mb=workspaces_mb,
    seed=st.integers(0, 2**16),
)
def test_matches_the_float64_reference(
    backend: str, rows: int, width: int, dtype: torch.dtype, teacher_dtype: torch.dtype, layout: str,
    teacher_layout: str, weighted: str, reduction: str, centred: bool, teacher_probs: bool, workspace_mb: float,
    seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    student, teacher = patches(rows, width)
    teacher = (teacher.softmax(-1) if teacher_probs else teacher).to(teacher_dtype)
    student, teacher = (
        lay_out(t[None], kind)[0] for t, kind in ((student.to(dtype), layout), (teacher, teacher_layout))
    )
    weights = {
        "no": None,
        "fp32": torch.rand(rows),
        "bf16": torch.rand(rows).bfloat16(),
        "tiny": torch.rand(rows, dtype=torch.float64) / 65_536,
    }[weighted]
    options: dict[str, Any] = {
        "weights": weights,
        "center": torch.randn(1, width) if centred and not teacher_probs else None,
        "teacher_probs": teacher_probs,
        "reduction": reduction,
    }
    weight = torch.randn(rows) if reduction == "none" else torch.tensor(-1.7)
    with ssl_kernels.use_workspace(workspace_mb):
        ours = run(backend, student, teacher, weight, **options)
    exact = oracle(student, teacher, weight, **options)
    eager = run("reference", student.float(), teacher.float(), weight, **options)
    assert ours.loss.dtype == ours.teacher_sum.dtype == torch.float32
    assert ours.gradient.dtype == dtype
    on_rows = weight * (1.0 if weights is None else weights.float())
    factor = on_rows.expand(rows).double().norm().item()
    spread = 10 * (student.double().amax(-1) - student.double().amin(-1)).amax().item() + math.log(width)
    half = 2 * HALF_EPS.get(dtype, 0) * exact.gradient.norm().item()  # rounded once more by the upstream gradient
    subnormal = 2**-24 * ours.gradient.numel() ** 0.5 if dtype == torch.float16 else 0
    rounding = {
        "loss": 2e-6 * factor * spread * (rows**0.5 if reduction == "sum" else 1),
        "gradient": 1e-6 * 10 * factor + half + subnormal,
        "teacher_sum": 2e-6 * exact.teacher_sum.norm().item(),
    }
    for name, a, e, o in zip(Result._fields, ours, eager, exact, strict=True):
        assert a.shape == o.shape
        assert distance(a, o) <= 2 * distance(e, o) + rounding[name] + 1e-30, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_formula_of_the_paper(backend: str) -> None:
    """The mean over images of the mean over their masked patches, written over all patches."""
    student, teacher, center = torch.randn(3, 10, 40, requires_grad=True), torch.randn(3, 10, 40), torch.randn(40)
    mask = torch.rand(3, 10) < 0.4
    entropy = -(torch.softmax((teacher - center) / 0.04, -1) * torch.log_softmax(student / 0.1, -1)).sum(-1)
    expected = ((entropy * mask).sum(1) / mask.sum(1)).mean()
    weights = (1 / (3 * mask.sum(1, keepdim=True))).expand(3, 10)[mask]
    with ssl_kernels.use_backend(backend):
        loss = K.ibot_patch_loss(student[mask], teacher[mask], weights, center=center)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradcheck(backend: str) -> None:
    student, teacher, weights = torch.randn(4, 5).double().requires_grad_(), torch.randn(4, 5).double(), torch.rand(4)
    with ssl_kernels.use_backend(backend):
        assert torch.autograd.gradcheck(lambda s: K.ibot_patch_loss(s, teacher, weights, student_temp=0.5), student)


@pytest.mark.parametrize("backend", FUSED)
def test_fp16_gradients_with_small_weights_survive(backend: str) -> None:
    """Weights of 1 / (64 images x 60 patches), of 65,536 prototypes, under a loss scale of 65,536."""
    student, teacher = (0.05 * t for t in patches(8, 65_536, torch.float16))
    weights, scale = torch.full((8,), 1 / 3840), torch.tensor(65_536.0)
    ours, exact = (
        run(backend, student, teacher, scale, weights=weights),
        oracle(student, teacher, scale, weights=weights),
    )
    floor = 2**-24 * exact.gradient.numel() ** 0.5
    assert distance(ours.gradient, exact.gradient) <= 2**-9 * exact.gradient.norm() + floor
    assert floor < 0.01 * exact.gradient.norm()
    options: dict[str, Any] = {"weights": weights[:3], "student_temp": 1e-5}  # and with cold students
    student, teacher = (1e-5 * t for t in patches(3, 9, torch.float16))
    ours, exact = run(backend, student.half(), teacher, **options), oracle(student.half(), teacher, **options)
    assert distance(ours.gradient, exact.gradient) <= 2**-9 * exact.gradient.norm()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_patches_of_weight_zero_have_no_gradient(backend: str, dtype: torch.dtype) -> None:
    student, teacher = patches(6, 30, dtype)
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 2.0])
    ours = run(backend, student, teacher, weights=weights)
    kept = weights > 0
    alone = run(backend, student[kept], teacher[kept], weights=weights[kept])
    torch.testing.assert_close(ours.loss, alone.loss, rtol=1e-6, atol=0)
    assert ours.gradient[~kept].eq(0).all()
    torch.testing.assert_close(ours.gradient[kept], alone.gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_patches(backend: str, reduction: str) -> None:
    """An image without masked patches adds nothing."""
    ours = run(backend, *patches(0, 7), weights=torch.ones(0), reduction=reduction)
    assert ours.loss.sum() == 0
    assert ours.gradient.shape == (0, 7)
    assert torch.equal(ours.teacher_sum, torch.zeros(7))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("argument", ["student", "teacher", "weights"])
def test_nan_shows_in_its_row(backend: str, argument: str) -> None:
    student, teacher = patches(5, 41)
    weights = torch.ones(5)
    {"student": student, "teacher": teacher, "weights": weights[:, None]}[argument][3, 0] = math.nan
    ours = run(backend, student, teacher, weights=weights, reduction="none")
    assert ours.loss.isnan().tolist() == [False, False, False, True, False]
    assert ours.gradient.isnan().all(1).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_double_backward_is_refused(backend: str, dtype: torch.dtype) -> None:
    student, teacher = patches(4, 5, dtype)
    student.requires_grad_()
    with ssl_kernels.use_backend(backend):
        loss = K.ibot_patch_loss(student, teacher, torch.rand(4))
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="use_backend\\('reference'\\)"):
            gradient.sum().backward()


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(compiler: str) -> None:
    torch._dynamo.reset()
    student, teacher = patches(6, 70)
    weights = torch.rand(6)

    def step(s: Tensor) -> Tensor:
        return 2 * K.ibot_patch_loss(s * 1.5, teacher, weights, center=K.sinkhorn_center(teacher, 0.04))

    compiled = torch.compile(step, fullgraph=True, backend=compiler)
    results = []
    for function in (compiled, step):
        leaf = student.clone().requires_grad_()
        value = function(leaf)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@linux_only
def test_memory_is_the_gradient_and_a_few_rows() -> None:
    student, teacher = patches(1024, 16_384)
    student.requires_grad_()
    weights = torch.rand(1024)
    K.ibot_patch_loss(student[:2], teacher[:2]).backward()
    student.grad = None

    def step() -> None:
        with saved_bytes() as sizes:
            loss = K.ibot_patch_loss(student, teacher, weights, center=K.sinkhorn_center(teacher, 0.04))
        assert sum(sizes) == student.numel() * 4
        loss.backward()
        student.grad = None

    with ssl_kernels.use_tile_budget(0):
        assert peak_mb(step, calls=3) < student.numel() * 4 / 2**20 + 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"student": torch.ones(2, 3, 5)}, ValueError, r"student: expected shape \[patches, K\], got \(2, 3, 5\)"),
        ({"student": None}, TypeError, "student: expected a tensor, got NoneType"),
        ({"teacher": torch.ones(3, 6)}, ValueError, r"teacher: expected .* \(4, 5\) as student has, got \(3, 6\)"),
        ({"teacher": torch.ones(4, 5, requires_grad=True)}, ValueError, "teacher: expected a tensor without gradient"),
        ({"weights": torch.ones(3)}, ValueError, r"weights: expected shape \(4,\), got \(3,\)"),
        ({"weights": torch.ones(4).int()}, TypeError, "weights: expected a floating tensor, got torch.int32"),
        ({"weights": torch.ones(4, requires_grad=True)}, ValueError, "weights: expected a tensor without gradient"),
        ({"weights": torch.ones(4, device="meta")}, ValueError, "weights: expected the device of student .* got meta"),
        ({"reduction": "mean"}, ValueError, "reduction: expected one of 'sum', 'none', got 'mean'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"student": torch.ones(4, 5), "teacher": torch.ones(4, 5)}
    with pytest.raises(error, match=message):
        K.ibot_patch_loss(**(arguments | change))


# ---- the module


def masked(images: int = 4, side: int = 6, width: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the teacher and of the student, and a mask that leaves out some images altogether."""
    mask = torch.rand(images, side, side) < 0.3
    mask[1] = False
    mask[-1] = False
    student, teacher = patches(int(mask.sum()), width)
    return teacher, student.requires_grad_(), mask


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_module_compiles_without_a_graph_break(compiler: str) -> None:
    torch._dynamo.reset()
    teacher, student, mask = masked()
    ours, compiled = (IBOTPatchLoss(32) for _ in range(2))
    function = torch.compile(compiled, fullgraph=True, backend=compiler)
    for _ in range(3):
        a, b = function(teacher, student, mask), ours(teacher, student, mask)
        torch.testing.assert_close(a, b)
        for x, y in zip(torch.autograd.grad(a, student), torch.autograd.grad(b, student), strict=True):
            torch.testing.assert_close(x, y)
    torch.testing.assert_close(compiled.center.center, ours.center.center)
    assert compiled.center.center.any()


def test_micro_batches_move_the_center_once() -> None:
    batches = [masked() for _ in range(3)]
    ours, whole = IBOTPatchLoss(32), IBOTPatchLoss(32)
    for i, batch in enumerate(batches):
        ours(*batch, accumulate=i < 2)
        assert ours.center.center.any() == (i == 2)
    whole.center.update(torch.cat([teacher for teacher, _, _ in batches]))
    torch.testing.assert_close(ours.center.center, whole.center.value)


def test_evaluation_leaves_the_center_alone() -> None:
    criterion = IBOTPatchLoss(32).eval()
    criterion(*masked())
    assert not criterion.center.value.any()


def test_a_batch_without_masked_patches() -> None:
    criterion = IBOTPatchLoss(32)
    criterion.center.center.fill_(0.5)
    loss = criterion(torch.ones(0, 32), torch.ones(0, 32, requires_grad=True), torch.zeros(2, 3, 3, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert criterion.center.value.eq(0.5).all()


def test_bad_masks_are_named() -> None:
    teacher, student, mask = masked()
    criterion = IBOTPatchLoss(32)
    mask[0] = ~mask[0]
    with pytest.raises(ValueError, match=r"mask: expected \d+ masked patches, one to a row of logits, got \d+"):
        criterion(teacher, student, mask)
    with pytest.raises(TypeError, match=r"mask: expected a boolean tensor \[B, H, W\], got torch.float32 of shape"):
        criterion(teacher, student, mask.float())
    with pytest.raises(ValueError, match=r"teacher_temp: expected a positive number, got 0"):
        IBOTPatchLoss(32, teacher_temp=0)
    with pytest.raises(ValueError, match=r"center_momentum: expected a number in \[0, 1\], got 2"):
        IBOTPatchLoss(32, center_momentum=2)
    with pytest.raises(ValueError, match=r"center_mode: expected 'mean', got 'median'"):
        IBOTPatchLoss(32, center_mode="median")


def test_a_mask_that_does_not_fit_is_nan_where_the_host_does_not_count_it() -> None:
    teacher, student, mask = masked()
    compiled = torch.compile(IBOTPatchLoss(32), backend="aot_eager")
    assert compiled(teacher, student, mask).isfinite()
    for changed in (mask & False, mask | True):
        assert compiled(teacher, student, changed).isnan()
