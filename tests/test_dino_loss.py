"""The DINO module's state, the losses of Meta's three codes beside their formulas, and the collapse monitor."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from distillation import BACKENDS, assignment, logits
from processes import run_processes
from torch import Tensor, nn

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import CollapseMonitor, DINOHead, DINOLoss, IBOTPatchLoss, SinkhornKnopp
from ssl_kernels.collapse import CollapseWarning
from ssl_kernels.integrations import dino, dinov2, dinov3
from ssl_kernels.losses.center import move_, total_of


def batch(samples: int = 6, width: int = 20, crops: int = 4) -> tuple[list[Tensor], list[Tensor]]:
    """Crops of the teacher and of the student."""
    return list(logits(2, samples, width)), list(logits(crops, samples, width))


def h(p: Tensor, s: Tensor, temp: float = 0.1) -> Tensor:
    """The cross-entropy of every row."""
    return -(p * torch.log_softmax(s / temp, -1)).sum(-1)


# ---- the centre


def test_the_center_moves_after_the_loss() -> None:
    criterion, center = DINOLoss(20, center_momentum=0.8), torch.zeros(20)
    for _ in range(4):
        teacher, student = batch()
        loss = criterion(teacher, student)
        torch.testing.assert_close(loss, K.dino_loss(student, teacher, center=center))
        center = 0.8 * center + 0.2 * torch.stack(teacher).mean((0, 1))
        torch.testing.assert_close(criterion.center, center[None, None])


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_of_the_momentum_are_exact(momentum: float) -> None:
    criterion, (teacher, student) = DINOLoss(20, center_momentum=momentum), batch()
    criterion.center.copy_(torch.randn(20))
    before = criterion.center.clone()
    criterion(teacher, student)
    mean = torch.stack(teacher).mean((0, 1))[None, None]
    torch.testing.assert_close(criterion.center, before if momentum else mean, rtol=0 if momentum else 1e-5, atol=1e-7)


def test_micro_batches_move_the_center_once() -> None:
    """As one batch of all their samples would, whatever their sizes; each sees the centre of before the step."""
    ours, whole = DINOLoss(20), DINOLoss(20)
    for _ in range(3):
        parts = [batch(samples) for samples in (6, 6, 1)]
        losses = [ours(*part, accumulate=i < 2) for i, part in enumerate(parts)]
        joined = [[torch.cat(crops) for crops in zip(*side, strict=True)] for side in zip(*parts, strict=True)]
        loss = whole(*joined)
        torch.testing.assert_close(sum(n * part for n, part in zip((6, 6, 1), losses, strict=True)) / 13, loss)
        torch.testing.assert_close(ours.center, whole.center)
    assert whole.center.any()


def test_evaluation_leaves_the_center_alone() -> None:
    criterion = DINOLoss(20).eval()
    criterion(*batch())
    assert not criterion.center.any()
    criterion.update_center(torch.stack(batch()[0]))
    assert criterion.center.any()


def test_an_empty_batch_leaves_the_center_alone() -> None:
    criterion = DINOLoss(20)
    criterion.center.fill_(0.5)
    assert criterion(*batch(samples=0)).isnan()
    assert criterion.center.eq(0.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """The centre stays in fp32 for 16-bit logits, and moves even if the module itself was cast."""
    teacher, student = ([t.to(dtype) for t in side] for side in batch())
    for criterion in (DINOLoss(20), DINOLoss(20).to(dtype)):
        for _ in range(3):
            loss = criterion(teacher, student)
        assert loss.dtype == torch.float32
        mean = torch.stack(teacher).float().mean((0, 1)) * (1 - 0.9**3)
        eps = 2**-7 if criterion.center.dtype == dtype else 1e-5
        torch.testing.assert_close(criterion.center.float().flatten(), mean, rtol=eps, atol=eps / 10)


def test_resumes_exactly_from_a_checkpoint() -> None:
    ours = DINOLoss(20)
    ours(*batch())
    resumed = DINOLoss(20)
    resumed.load_state_dict(ours.state_dict())
    teacher, student = batch()
    assert torch.equal(ours(teacher, student), resumed(teacher, student))
    assert torch.equal(ours.center, resumed.center)
    assert list(ours.state_dict()) == ["center"]
    assert list(IBOTPatchLoss(20).state_dict()) == ["center.center"]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("stacked", [False, True])
def test_the_module_compiles_without_a_graph_break(compiler: str, stacked: bool) -> None:
    torch._dynamo.reset()
    ours = DINOLoss(20)
    compiled = copy.deepcopy(ours)
    function = torch.compile(compiled, fullgraph=True, backend=compiler)
    for _ in range(3):
        teacher, student = batch()
        given = (torch.stack(teacher), torch.stack(student)) if stacked else (teacher, student)
        torch.testing.assert_close(function(*given), ours(*given))
    torch.testing.assert_close(compiled.center, ours.center)
    assert compiled.center.any()


def test_the_schedule_of_the_temperature() -> None:
    criterion = DINOLoss(20, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=4).eval()
    teacher, student = batch()
    for epoch, temp in enumerate((0.04, 0.05, 0.06, 0.07, 0.07)):
        torch.testing.assert_close(
            criterion(teacher, student, epoch=epoch), K.dino_loss(student, teacher, teacher_temp=temp)
        )
    torch.testing.assert_close(criterion(teacher, student), K.dino_loss(student, teacher, teacher_temp=0.07))
    torch.testing.assert_close(
        criterion(teacher, student, 0.05, epoch=3), K.dino_loss(student, teacher, teacher_temp=0.05)
    )


def test_bad_arguments_are_named() -> None:
    for arguments, message in (
        ({"student_temp": 0}, "student_temp: expected a positive number, got 0"),
        ({"warmup_teacher_temp": -1}, "warmup_teacher_temp: expected a positive number, got -1"),
        ({"center_momentum": 1.5}, r"center_momentum: expected a number in \[0, 1\], got 1.5"),
        ({"center_mode": "max"}, "center_mode: expected 'mean', got 'max'"),
    ):
        with pytest.raises(ValueError, match=message):
            DINOLoss(20, **arguments)
    with pytest.raises(ValueError, match="epoch: expected at least 0, got -1"):
        DINOLoss(20)(*batch(), epoch=-1)
    with pytest.raises(ValueError, match="center: expected 9 elements"):
        DINOLoss(20)(*batch(width=9))


# ---- Meta's codes, from their papers


@pytest.mark.parametrize("backend", BACKENDS)
def test_dino(backend: str) -> None:
    """A loop over pairs of crops, the centre of all processes and the temperature's schedule, over several steps."""
    criterion = dino.DINOLoss(20, 6, 0.04, 0.07, 3, 10)
    center, temps = torch.zeros(1, 20), [0.04, 0.055, 0.07, 0.07, 0.07]
    for epoch, temp in enumerate(temps):
        student, teacher = torch.randn(6 * 5, 20, requires_grad=True), torch.randn(2 * 5, 20)
        p, s = torch.softmax((teacher - center) / temp, -1).chunk(2), student.chunk(6)
        expected = sum(h(p[t], s[v]).mean() for t in range(2) for v in range(6) if t != v) / 10
        with ssl_kernels.use_backend(backend):
            loss = criterion(student, teacher, epoch)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        gradients = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
        center = 0.9 * center + 0.1 * teacher.mean(0, keepdim=True)
        torch.testing.assert_close(criterion.center, center)
    criterion.update_center(teacher)
    torch.testing.assert_close(criterion.center, 0.9 * center + 0.1 * teacher.mean(0, keepdim=True))
    assert {name: value.shape for name, value in criterion.state_dict().items()} == {"center": (1, 20)}


def test_dino_names_what_does_not_divide() -> None:
    criterion = dino.DINOLoss(20, 6, 0.04, 0.07, 3, 10)
    with pytest.raises(ValueError, match=r"student_output: expected shape \[6 B, K\], got \(8, 20\)"):
        criterion(torch.ones(8, 20), torch.ones(2, 20), 0)
    with pytest.raises(ValueError, match=r"teacher_output: expected shape \[2 B, K\], got \(3, 20\)"):
        criterion(torch.ones(6, 20), torch.ones(3, 20), 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_sinkhorn", [False, True])
def test_dinov2(backend: str, by_sinkhorn: bool) -> None:
    """Local crops against both global ones, as its trainer calls it: a list of crops, a tensor of probabilities."""
    criterion, center = dinov2.DINOLoss(20), torch.zeros(1, 20)
    for _ in range(3):
        student, teacher = torch.randn(8, 5, 20, requires_grad=True), torch.randn(10, 20)
        with ssl_kernels.use_backend(backend):
            if by_sinkhorn:
                p, expected_p = criterion.sinkhorn_knopp_teacher(teacher, teacher_temp=0.1), assignment(teacher, 0.1)
            else:
                p, expected_p = (
                    criterion.softmax_center_teacher(teacher, 0.1),
                    torch.softmax((teacher - center) / 0.1, 1),
                )
                criterion.update_center(teacher)
                center = 0.9 * center + 0.1 * teacher.mean(0, keepdim=True)
            torch.testing.assert_close(p, expected_p.float(), rtol=1e-4, atol=1e-7)
            p = p.view(2, 5, 20)
            loss = criterion(list(student), p)
        expected = sum(h(t, s).mean() for t in p for s in student)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        gradients = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    criterion.apply_center_update()
    torch.testing.assert_close(criterion.center, center)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["given", "from the mask", "rows to spare"])
def test_ibot_of_dinov2(backend: str, weights: str) -> None:
    criterion, masks = dinov2.iBOTPatchLoss(20), torch.rand(3, 16) < 0.4
    n = int(masks.sum())
    teacher = torch.randn(n, 20)
    student = torch.randn(n + (3 if weights == "rows to spare" else 0), 20, requires_grad=True)
    of_rows = (1 / masks.sum(1, keepdim=True)).expand(3, 16)[masks]
    count = masks.sum()
    with ssl_kernels.use_backend(backend):
        p = criterion.sinkhorn_knopp_teacher(teacher, 0.1, n_masked_patches_tensor=count)
        arguments = {} if weights == "from the mask" else {"masks_weight": of_rows}
        loss = criterion.forward_masked(student, p, student_masks_flat=masks, n_masked_patches=n, **arguments)
    assert count == n  # theirs adds up the processes' counts in the caller's tensor
    torch.testing.assert_close(p.double(), assignment(teacher, 0.1), rtol=1e-4, atol=1e-7)
    expected = (h(p, student[:n]) * of_rows).sum() / 3
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_ibot_of_dinov2_over_all_patches() -> None:
    """Of which an image may have none that is masked."""
    criterion, masks = dinov2.iBOTPatchLoss(20), torch.rand(3, 16) < 0.4
    masks[1] = False
    student, teacher = torch.randn(3, 16, 20, requires_grad=True), torch.randn(3, 16, 20)
    p = criterion.softmax_center_teacher(teacher, 0.1)
    criterion.update_center(teacher)
    loss = criterion(student, p, masks)
    expected = ((h(torch.softmax(teacher / 0.1, -1), student) * masks).sum(1) / masks.sum(1).clamp(min=1)).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    criterion.apply_center_update()
    torch.testing.assert_close(criterion.center, 0.1 * teacher.mean((0, 1), keepdim=True))
    assert criterion.state_dict()["center"].shape == (1, 1, 20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_diagonal", [False, True])
def test_dinov3(backend: str, ignore_diagonal: bool) -> None:
    criterion = dinov3.DINOLoss(20)
    student, p = torch.randn(5, 6, 20, requires_grad=True), torch.randn(2, 6, 20).softmax(-1)
    pairs = [(t, v) for t in range(2) for v in range(5) if not (ignore_diagonal and t == v)]
    expected = sum(h(p[t], student[v]).mean() for t, v in pairs) / len(pairs)
    with ssl_kernels.use_backend(backend):
        loss = criterion(student, p, ignore_diagonal=ignore_diagonal)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(value, student)[0] for value in (loss, expected))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_sinkhorn_of_dinov3() -> None:
    teacher, count = torch.randn(12, 20), torch.tensor(12)
    for module in (dinov3.SinkhornKnoppTeacher(), dinov3.iBOTPatchLoss(20).sinkhorn_knopp_teacher):
        q = module(teacher, teacher_temp=0.1, n_masked_patches_tensor=count, n_iterations=5)
        torch.testing.assert_close(q.double(), assignment(teacher, 0.1, 5), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", [dinov2.DINOLoss, dinov2.iBOTPatchLoss, dinov3.DINOLoss, dinov3.iBOTPatchLoss])
def test_a_center_that_waits_is_not_lost(loss: Callable[[int], Any]) -> None:
    """It moves at the next softmax, but in a checkpoint it has moved; micro-batches in between count as one update."""
    criterion = loss(20)
    first, second = torch.randn(1, 6, 20), torch.randn(1, 3, 20)
    criterion.update_center(first)
    criterion.update_center(second)
    assert not criterion.center.any()
    assert torch.equal(
        criterion.softmax_center_teacher(first, 0.1, update_centers=False), K.centered_softmax(first, 0.1)
    )
    expected = 0.1 * torch.cat([first, second], 1).mean(1)
    torch.testing.assert_close(criterion.state_dict()["center"].view(1, 20), expected)
    before = criterion.center.clone()
    criterion.softmax_center_teacher(first, 0.1)
    assert torch.equal(criterion.center, before)


def test_init_weights_of_dinov3() -> None:
    with torch.device("meta"):
        criterion = dinov3.DINOLoss(20)
    criterion = criterion.to_empty(device="cpu")
    criterion.center.fill_(math.nan)
    criterion.init_weights()
    assert not criterion.center.any()


@pytest.mark.parametrize("loss", [dinov2.KoLeoLoss, dinov3.KoLeoLoss])
def test_koleo(loss: type[nn.Module]) -> None:
    """The logarithm of each row's distance to its nearest neighbour on the sphere."""
    x = torch.randn(12, 5)
    distances = torch.cdist(nn.functional.normalize(x), nn.functional.normalize(x)).fill_diagonal_(math.inf)
    torch.testing.assert_close(loss()(x, eps=1e-8), -distances.amin(1).log().mean(), rtol=1e-4, atol=1e-5)


WORKER = """
import types
import ssl_kernels
from ssl_kernels import DINOLoss, IBOTPatchLoss
from ssl_kernels.integrations import dino, dinov2, dinov3
from ssl_kernels.losses.center import move_, total_of
torch.manual_seed(0)

for shares in ([4, 4], [5, 2], [0, 3], [0, 0]):
    begin, end = sum(shares[:rank]), sum(shares[: rank + 1])
    teacher, student = torch.randn(2, sum(shares), 20), torch.randn(4, sum(shares), 20)
    expected = torch.zeros(20)
    move_(expected, total_of(teacher), 0.9)

    criterion = DINOLoss(20)
    loss = criterion(teacher[:, begin:end], student[:, begin:end])
    torch.testing.assert_close(criterion.center.flatten(), expected)
    torch.testing.assert_close(loss, ssl_kernels.functional.dino_loss(student[:, begin:end], teacher[:, begin:end]),
                               equal_nan=True)

    meta = dino.DINOLoss(20, 4, 0.04, 0.04, 0, 10)
    meta(student[:, begin:end].flatten(0, 1), teacher[:, begin:end].flatten(0, 1), 0)
    torch.testing.assert_close(meta.center.flatten(), expected)

    own = teacher[:, begin:end].flatten(0, 1)
    patches = IBOTPatchLoss(20)
    patches(own, own, torch.ones(1, len(own), 1, dtype=torch.bool))
    torch.testing.assert_close(patches.center.center.flatten(), expected)

    deferred = dinov2.DINOLoss(20)
    deferred.update_center(own[:1])
    deferred.update_center(own[1:])
    if rank == 0:
        deferred.state_dict()  # what one process alone does: no new communication
    deferred.apply_center_update()
    torch.testing.assert_close(deferred.center.flatten(), expected)


def assignment(teacher, temp):
    q = torch.exp(teacher.double() / temp)
    for _ in range(3):
        q = q / q.sum(0)
        q = q / q.sum(1, keepdim=True)
    return q.float()


# The subgroups of DINOv3, as its own code keeps them.
subgroups = sys.modules["dinov3.distributed"] = types.ModuleType("dinov3.distributed")
everyone = torch.randn(1, 12, 20)
own = everyone[:, [slice(7), slice(7, 12)][rank]]
for group, rows in ((None, everyone), (dist.new_subgroups(group_size=1)[0], own)):
    subgroups.get_process_subgroup = lambda: group
    criterion, patches = dinov3.DINOLoss(20), dinov3.iBOTPatchLoss(20)
    expected = assignment(rows[0], 0.5)[:7 if rank == 0 or group else None][-own.shape[1]:]
    for function in (criterion.sinkhorn_knopp_teacher, patches.sinkhorn_knopp_teacher, dinov3.SinkhornKnoppTeacher()):
        torch.testing.assert_close(function(own[0], 0.5), expected)
    criterion.update_center(own[0])
    patches.update_center(own)
    for loss in (criterion, patches):
        loss.apply_center_update()
        torch.testing.assert_close(loss.center.flatten(), 0.1 * rows[0].mean(0))
"""


def test_two_processes_hold_the_center_of_one(tmp_path: Path) -> None:
    run_processes(WORKER, tmp_path)


def test_a_center_without_rows_stays() -> None:
    center = torch.randn(5)
    before = center.clone()
    move_(center, total_of(torch.ones(0, 5)), 0.9)
    assert torch.equal(center, before)


# ---- runs


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = DINOHead(16, 48, hidden_dim=32, bottleneck_dim=12)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(x))
        return logits


def losses_of_a_run(backend: str, step: Callable[[Tensor, Tensor], Tensor], steps: int = 30) -> list[float]:
    """The losses of training a student with a momentum teacher on noisy views of random points."""
    torch.manual_seed(1)
    student = Student()
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        crops = torch.randn(1, 32, 24) + 0.3 * torch.randn(4, 32, 24)
        with ssl_kernels.use_backend(backend):
            loss = step(teacher(crops[:2]), student(crops))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        for theirs, ours in zip(teacher.parameters(), student.parameters(), strict=True):
            theirs.lerp_(ours.detach(), 0.1)
        losses.append(loss.item())
    return losses


def step_of_v1() -> Callable[[Tensor, Tensor], Tensor]:
    return DINOLoss(48)


def step_of_v2() -> Callable[[Tensor, Tensor], Tensor]:
    """Sinkhorn-Knopp for both losses; samples of the first crop stand for patches."""
    sinkhorn = SinkhornKnopp()

    def step(teacher: Tensor, student: Tensor) -> Tensor:
        loss = K.dino_loss(student, teacher, teacher_temp=0.07, center=sinkhorn.center(teacher, 0.07))
        patches, weights = teacher[0], torch.full((32,), 1 / 32)
        center = sinkhorn.center(patches, 0.07)
        masked = K.ibot_patch_loss(student[0], patches, weights, teacher_temp=0.07, center=center)
        assert isinstance(loss, Tensor)
        assert isinstance(masked, Tensor)
        return loss + masked

    return step


@pytest.mark.parametrize("step", [step_of_v1, step_of_v2])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_training_run_follows_the_reference(backend: str, step: Callable[[], Any]) -> None:
    expected = losses_of_a_run("reference", step())
    ours = losses_of_a_run(backend, step())
    assert abs(expected[-1] - expected[0]) > 0.05 * expected[0]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=2e-3, atol=0)


# ---- the monitor


def numbers_of(p: Tensor) -> dict[str, float]:
    entropy = torch.special.entr(p)
    return {
        "teacher_entropy": entropy.sum(1).mean().item(),
        "marginal_entropy": torch.special.entr(p.mean(0)).sum().item(),
    }


@pytest.mark.parametrize("shape", [(10, 33), (2, 5, 33)])
def test_the_numbers_of_the_monitor(shape: tuple[int, ...]) -> None:
    teacher, center = torch.randn(shape), torch.randn(1, 1, 33)
    found = CollapseMonitor(33)(teacher, torch.tensor(3.5), torch.tensor(0.1), center)
    expected = numbers_of(torch.softmax((teacher - center).flatten(0, -2).double() / 0.1, 1))
    expected |= {"center_norm": center.norm().item(), "kl": 3.5 - expected["teacher_entropy"]}
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_kl_of_a_student_that_agrees_is_0() -> None:
    teacher = torch.randn(2, 8, 33)
    loss = K.dino_loss(teacher.flip(0) * 2.5, teacher, pairs="all")
    same = K.dino_loss(teacher.mean(0).expand(2, 8, 33) * 2.5, teacher.mean(0).expand(2, 8, 33))
    assert CollapseMonitor(33)(teacher.mean(0), same, 0.04)["kl"] == pytest.approx(0, abs=1e-5)
    assert CollapseMonitor(33)(teacher, loss, 0.04)["kl"] > 0.1


def test_the_monitor_looks_at_rows_from_everywhere() -> None:
    teacher = torch.zeros(1000, 8)
    teacher[500:, 3] = 100
    found = CollapseMonitor(8, max_rows=10)(teacher, 0.0, 1.0)
    assert found["teacher_entropy"] == pytest.approx(0.5 * math.log(8))
    assert CollapseMonitor(8, max_rows=10)(teacher[:11], 0.0, 1.0)["teacher_entropy"] == pytest.approx(math.log(8))


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        (0.001 * torch.eye(16, 64), "every sample's is uniform .*teacher_entropy 4.1.*ln K = 4.159"),
        (20 * torch.eye(64)[3].expand(16, 64), "every sample's is the same .*marginal_entropy 0"),
        (0.1 * torch.linspace(-1, 1, 64).expand(16, 64), "every sample's is the same .*marginal_entropy 4.0"),
    ],
)
def test_a_collapse_is_reported_once(teacher: Tensor, message: str) -> None:
    monitor, healthy = CollapseMonitor(64, patience=3), 5 * torch.randn(16, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for logits in (teacher, teacher, healthy, teacher, teacher):  # patience is of calls in a row
            monitor(logits, 1.0, 0.1)
    with pytest.warns(CollapseWarning, match=message) as caught:
        monitor(teacher, 1.0, 0.1)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            monitor(teacher, 1.0, 0.1)
        monitor(healthy, 1.0, 0.1)
        for _ in range(2):
            monitor(teacher, 1.0, 0.1)
    with pytest.warns(CollapseWarning):
        monitor(teacher, 1.0, 0.1)


def test_a_fresh_head_is_no_collapse() -> None:
    monitor, head = CollapseMonitor(4096, patience=1), DINOHead(64, 4096)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monitor(head(torch.randn(64, 64)), math.log(4096), 0.04)


def test_a_teacher_that_is_not_finite_is_no_collapse() -> None:
    monitor, teacher = CollapseMonitor(8, patience=1), torch.randn(4, 8)
    teacher[1, 2] = math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = monitor(teacher, math.nan, 0.1, torch.full((8,), math.nan))
    assert all(math.isnan(value) for value in found.values())


def test_bad_arguments_of_the_monitor_are_named() -> None:
    for arguments, message in (
        ({"out_dim": 1}, "out_dim: expected at least 2, got 1"),
        ({"out_dim": 8, "max_rows": 1}, "max_rows: expected at least 2, got 1"),
        ({"out_dim": 8, "patience": 0}, "patience: expected at least 1, got 0"),
        ({"out_dim": 8, "tolerance": 0.5}, r"tolerance: expected a number in \(0, 0.5\), got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            CollapseMonitor(**arguments)
    with pytest.raises(ValueError, match=r"teacher_logits: expected shape \[..., 8\], got \(4, 9\)"):
        CollapseMonitor(8)(torch.ones(4, 9), 0.0, 0.1)
    with pytest.raises(ValueError, match="teacher_logits: expected at least 2 rows, got 1"):
        CollapseMonitor(8)(torch.ones(1, 8), 0.0, 0.1)


def test_a_compiled_loss_serves_all_temperatures_of_the_schedule() -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    ours, compiled = (DINOLoss(20, 0.04, 0.07, warmup_teacher_temp_epochs=12) for _ in range(2))
    function = torch.compile(compiled, fullgraph=True, backend=counter)
    for epoch in range(15):
        teacher, student = batch()
        torch.testing.assert_close(function(teacher, student, epoch=epoch), ours(teacher, student, epoch=epoch))
    assert counter.frame_count <= 4  # epoch 0 and 1, the warm-up, and what follows


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_temperatures_have_the_precision_of_the_loss(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    student, teacher = logits(3, 4, 20, dtypes[0]), logits(2, 4, 20, dtypes[1])
    exact = K.dino_loss(student.double(), teacher.double())
    torch.testing.assert_close(K.dino_loss(student, teacher), exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize("module", [DINOLoss, IBOTPatchLoss, dinov2.DINOLoss, dinov2.iBOTPatchLoss, dinov3.DINOLoss])
def test_the_modules_can_be_pickled(module: type[nn.Module]) -> None:
    criterion = module(20)
    assert pickle.loads(pickle.dumps(criterion)).state_dict().keys() == criterion.state_dict().keys()


def test_a_loaded_checkpoint_forgets_what_waits() -> None:
    """A run that goes back to a checkpoint after a NaN must not meet it again."""
    ours, meta = DINOLoss(20), dinov2.DINOLoss(20)
    states = copy.deepcopy((ours.state_dict(), meta.state_dict()))
    teacher, student = batch()
    ours([t * torch.nan for t in teacher], student, accumulate=True)
    meta.update_center(teacher[0] * torch.nan)
    ours.load_state_dict(states[0])
    meta.load_state_dict(states[1])
    ours(teacher, student)
    meta.apply_center_update()
    assert ours.center.isfinite().all()
    assert not meta.center.any()


def test_the_monitor_takes_the_loss_as_it_is() -> None:
    """With its gradient, and without torch's warning about that."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert CollapseMonitor(8)(torch.randn(4, 8), torch.ones((), requires_grad=True), 1.0)["kl"] < 1
