"""The losses of self-distillation beside lightly's own: values, gradients and centres, and none of the known faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory import saved_bytes
from peers import assert_same, assert_same_signature, value_and_gradients
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import DINOLoss, IBOTPatchLoss
from ssl_kernels.losses.center import Center

lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
if not hasattr(lightly, "IBOTPatchLoss"):
    pytest.skip("this lightly is older than its iBOT loss", allow_module_level=True)


def crops(crops: int, samples: int = 12, width: int = 48) -> list[Tensor]:
    return [torch.randn(samples, width, requires_grad=True) for _ in range(crops)]


@pytest.mark.parametrize("views", [2, 6])
@pytest.mark.parametrize("options", [{}, {"teacher_temp": 0.07, "student_temp": 0.2, "center_momentum": 0.5}])
def test_dino_over_several_steps(views: int, options: dict[str, Any]) -> None:
    ours, theirs = DINOLoss(48, **options), lightly.DINOLoss(48, **options)
    for step in range(4):
        student, teacher = crops(views), [t.detach() for t in crops(2)]
        given = {1: {"epoch": 5}, 2: {"epoch": 40}, 3: {"teacher_temp": 0.05}}.get(step, {})
        losses = [criterion(teacher, student, **given) for criterion in (ours, theirs)]
        assert_same(*(value_and_gradients(loss, student) for loss in losses))
        torch.testing.assert_close(ours.center, theirs.center, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stacked", [False, True])
def test_a_teacher_that_requires_a_gradient_is_a_constant(stacked: bool) -> None:
    """lightly's losses take one, too, and differentiate through it."""
    teacher = [t.detach().requires_grad_() for t in torch.randn(2, 12, 48)]
    student = crops(4)
    given = (torch.stack(teacher), torch.stack(student)) if stacked else (teacher, student)
    loss = DINOLoss(48)(*given) + IBOTPatchLoss(48)(teacher[0], student[0], torch.ones(3, 2, 2, dtype=torch.bool))
    constants = [t.detach() for t in teacher]
    theirs = lightly.DINOLoss(48)(constants, student)
    theirs = theirs + lightly.IBOTPatchLoss(48)(constants[0], student[0], torch.ones(3, 2, 2, dtype=torch.bool))
    assert torch.autograd.grad(loss, teacher, allow_unused=True, retain_graph=True) == (None, None)
    assert_same(value_and_gradients(loss, student), value_and_gradients(theirs, student))


def test_dino_checkpoints_load_both_ways() -> None:
    ours, theirs = DINOLoss(48), lightly.DINOLoss(48)
    theirs.center.normal_()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.center, theirs.center)
    ours.center.normal_()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.center, theirs.center)


@pytest.mark.parametrize("options", [{}, {"teacher_temp": 0.07, "student_temp": 0.2, "center_momentum": 0.5}])
def test_ibot_over_several_steps(options: dict[str, Any]) -> None:
    ours, theirs = IBOTPatchLoss(48, **options), lightly.IBOTPatchLoss(48, **options)
    for step in range(4):
        mask = torch.rand(5, 4, 4) < 0.4
        mask[step] = False
        teacher, student = (torch.randn(int(mask.sum()), 48) for _ in range(2))
        student.requires_grad_()
        given = {"teacher_temp": 0.05} if step == 2 else {}
        losses = [criterion(teacher, student, mask, **given) for criterion in (ours, theirs)]
        assert_same(*(value_and_gradients(loss, [student]) for loss in losses))
        torch.testing.assert_close(ours.center.value, theirs.center.value, rtol=1e-5, atol=1e-7)


def test_ibot_checkpoints_load_both_ways() -> None:
    ours, theirs = IBOTPatchLoss(48), lightly.IBOTPatchLoss(48)
    theirs.center.center.normal_()
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.center.value, theirs.center.value)


def test_the_same_signatures() -> None:
    assert_same_signature(DINOLoss, lightly.DINOLoss)
    assert_same_signature(IBOTPatchLoss, lightly.IBOTPatchLoss)


def test_the_center_itself() -> None:
    center = pytest.importorskip("lightly.models.modules.center")
    ours, theirs = (kind((1, 48), momentum=0.7) for kind in (Center, center.Center))
    for _ in range(3):
        x = torch.randn(20, 48)
        ours.update(x)
        theirs.update(x)
        torch.testing.assert_close(ours.value, theirs.value)


def test_probabilities_that_are_subnormal_in_fp16_count() -> None:
    """Under autocast lightly's product casts the teacher's probabilities to 16 bits."""
    student, teacher = (list(0.01 * torch.randn(2, 4, 65_536)) for _ in range(2))
    exact = K.dino_loss([s.double() for s in student], [t.double() for t in teacher])
    errors = []
    for criterion in (DINOLoss(65_536), lightly.DINOLoss(65_536)):
        with torch.autocast("cpu", torch.float16):
            errors.append((criterion(teacher, student) - exact).abs().item())
    assert errors[0] < 1e-5
    assert errors[1] > 1e-3


def test_memory_of_a_peer_is_several_times_the_logits_and_ours_is_once() -> None:
    student, teacher = crops(6, 16, 4096), [t.detach() for t in crops(2, 16, 4096)]
    size = 6 * 16 * 4096 * 4
    with saved_bytes() as theirs:
        lightly.DINOLoss(4096)(teacher, student)
    with saved_bytes() as ours:
        DINOLoss(4096)(teacher, student)
    assert sum(ours) == size
    assert sum(theirs) > 1.3 * size
