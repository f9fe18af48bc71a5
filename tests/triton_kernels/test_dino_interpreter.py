"""The Triton kernels of the distillation cross-entropy in the strict interpreter, against all pairs in float64.

The oracle is given the logits that the kernels read. What is left is fp32 arithmetic, and in 16 bits the rounding of
the gradient.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from covering import covering
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from panels import DTYPES, TINY, UNIT, rows_far_apart
from torch import Tensor

from ssl_kernels.kernels.dino import _slots, dino, scale_, teacher_sum

pytestmark = pytest.mark.usefixtures("strict")
INF, NAN = float("inf"), float("nan")


def logits(crops: int, batch: int, width: int, dtype: torch.dtype = torch.float32, spread: float = 2.0) -> Tensor:
    return (spread * torch.randn(crops, batch, width)).to(dtype)


def dense(
    students: Tensor,
    teachers: Tensor,
    center: Tensor | None,
    weights: Tensor | None,
    student_temp: float,
    teacher_temp: float,
    distinct: bool,
    probs: bool,
) -> tuple[Tensor, ...]:
    """The losses and their gradient; n, and n softmax(S) + q, which its two terms are made of."""
    s = students.clone().requires_grad_()
    p = teachers if probs else ((teachers if center is None else teachers - center) / teacher_temp).softmax(-1)
    log_s = (s / student_temp).log_softmax(-1)
    loss = (0 * s).sum((0, 2))
    mass, q = s.new_zeros(s.shape[:2]), torch.zeros_like(s)
    for t, v in itertools.product(range(len(p)), range(len(s))):
        if not (distinct and t == v):
            loss = loss - (p[t] * log_s[v]).sum(-1)
            mass[v] += p[t].sum(-1)
            q[v] += p[t]
    if weights is not None:
        loss = loss * weights
    (grad,) = torch.autograd.grad(loss.sum(), s)
    return loss.detach(), grad, mass, mass[..., None] * log_s.detach().exp() + q


def check(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    *,
    center: Tensor | None = None,
    weights: Tensor | None = None,
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
    distinct: bool = True,
    probs: bool = False,
    grad_scale: float = 1.0,
    span: int | None = None,
) -> tuple[Tensor, Tensor]:
    temps = torch.tensor(student_temp), torch.tensor(teacher_temp)
    s, t = torch.cat(list(students)), torch.cat(list(teachers))
    grad = torch.full_like(s, NAN, memory_format=torch.contiguous_format)
    loss = dino(list(students), list(teachers), center, weights, *temps, distinct, probs, grad, grad_scale, span=span)
    assert loss.dtype == torch.float32

    constants = (*(None if x is None else x.double() for x in (center, weights)), *(x.item() for x in temps))
    want, want_grad, mass, terms = dense(s.double(), t.double(), *constants, distinct, probs)
    rounded = [x if x is None else x.float() for x in constants[:2]]
    eager, eager_grad, _, _ = dense(s.float(), t.float(), *rounded, *constants[2:], distinct, probs)
    # Logits in units of the temperature carry an error relative to their height, which probabilities take over.
    z_s = 1e-6 + 2e-7 * s.double().abs().max() / student_temp
    p_error = (
        1e-6 if probs else 1e-6 + 2e-7 * (t.double() - (0 if center is None else center)).abs().max() / teacher_temp
    )
    weight = torch.ones(s.shape[1]).double() if weights is None else weights.double().abs()
    tolerance = (p_error + 1e-6) * want.abs() + z_s * weight * mass.sum(0) + 1e-30
    error = (loss - want).abs()
    assert (error <= tolerance).all(), (error / tolerance).max()
    assert (error <= 2 * (eager - want).abs() + tolerance).all()
    if s.dtype == torch.float16:  # which is given the gradient by logits over temperature
        grad_scale *= temps[0].item()
    factor = abs(grad_scale)
    tolerance = factor * weight[None, :, None] / student_temp * terms * (z_s + p_error)
    tolerance = tolerance + UNIT[s.dtype] * factor * want_grad.abs() + TINY[s.dtype]
    error = (grad.double() - grad_scale * want_grad).abs()
    assert (error <= tolerance).all(), (error / tolerance).max()
    assert (error <= 2 * factor * (eager_grad - want_grad).abs() + tolerance).all()
    return loss, grad


@covering(1, dtype=DTYPES, teacher_dtype=[*DTYPES[1:], DTYPES[0]], distinct=[True, False])
def test_dtypes(dtype, teacher_dtype, distinct):
    center = torch.randn(1040)
    check([logits(3, 2, 1040, dtype)], [logits(2, 2, 1040, teacher_dtype)], center=center, distinct=distinct)
    check([logits(3, 2, 33, dtype)], [logits(2, 2, 33, teacher_dtype)], center=center[:33], distinct=distinct)


@covering(
    1,
    size=[(1, 1, 5, 7), (2, 2, 3, 5), (2, 1, 1, 1), (10, 2, 3, 70), (3, 5, 2, 30), (13, 1, 2, 16), (26, 3, 2, 9)],
    distinct=[True, False],
)
def test_numbers_of_crops_and_sizes(size, distinct):
    v, t, b, k = size
    check([logits(v, b, k)], [logits(t, b, k)], distinct=distinct)


@covering(1, k=[1023, 1024, 1025, 3079, 4096, 4112, 8192], dtype=DTYPES)
def test_blocks_of_columns(k, dtype):
    """Whole ones and ragged ones, of rows that are aligned and not."""
    check([logits(3, 2, k, dtype)], [logits(2, 2, k, dtype)], center=torch.randn(k))


@pytest.mark.parametrize(("v", "k"), [(1, 17 * 1024 + 1), (33, 1030)])
def test_more_blocks_or_crops_than_are_merged_at_a_time(v, k):
    ramp = torch.linspace(-1, 1, k)  # maxima that rise and fall from block to block
    check([logits(v, 2, k) + 5 * ramp], [logits(1, 2, k) - 2 * ramp], distinct=False)


def test_loss_alone():
    s, t, temp = logits(4, 3, 1100), logits(2, 3, 1100), torch.tensor(0.1)
    loss = dino([s], [t], None, None, temp, temp, True, False, None, 1.0)
    assert torch.equal(loss, check([s], [t], teacher_temp=0.1)[0])


@covering(1, k=[40, 1040], dtype=[torch.float32, torch.bfloat16])
def test_lists_of_crops(k, dtype):
    s, t, center = logits(12, 2, k, dtype), logits(2, 2, k, dtype), torch.randn(k)
    whole = check([s], [t], center=center)
    several = [
        ([s[:2], s[2:]], [t]),
        (list(s.clone().split(1)), list(t.clone().split(1))),
        ([s[:1], s[1:9], s[9:12]], [t[:1], t[1:]]),
        ([s[:5], s[5:].transpose(0, 1).contiguous().transpose(0, 1)], [t[:1], t[1:].mT.contiguous().mT]),
    ]
    for students, teachers in several:
        again = check(students, teachers, center=center)
        assert torch.equal(again[0], whole[0])
        assert torch.equal(again[1], whole[1])
    check([s, s[:5]], [t, t[:1]], center=center)


def test_crops_are_not_copied():
    crops = [torch.randn(4, 16) for _ in range(10)]
    slots, _ = _slots([crop[None] for crop in crops], 12)
    assert [slot.data_ptr() for slot in slots] == [c.data_ptr() for c in [*crops, crops[0], crops[0]]]
    block = torch.randn(30, 2, 16)
    slots, strides = _slots([block], 12)
    assert strides == (12 * 32, 16, 1)
    assert [slot.data_ptr() for slot in slots] == [block[i].data_ptr() for i in range(12)]
    assert [slot.shape[0] for slot in slots] == [3] * 6 + [2] * 6


def test_strides():
    half, single = torch.bfloat16, torch.float32
    k, b = 48, 3
    check([logits(b, 4, k, half).transpose(0, 1)], [logits(3, k, b, single).mT[1:]], center=torch.randn(k))
    check([logits(8, 2 * b, 2 * k, single)[::3, ::2, 1::2]], [logits(1, b, k, half).expand(2, b, k)])
    check([logits(4, b, 3 * k, half)[:, :, k : 2 * k]], [logits(2, 1, k, half).expand(2, b, k)], distinct=False)


def test_offsets_beyond_32_bits():
    rows, k = 4, 5
    near, far = logits(1, rows, k, torch.bfloat16), rows_far_apart(rows, k)
    far.copy_(near[0])
    for view, s in ((far[None], near), (far[:, None], near.transpose(0, 1)), (far.mT[None], near.mT)):
        t = torch.randn(2, *s.shape[1:])
        assert torch.equal(check([view], [t])[0], check([s], [t])[0])
        many = torch.randn(3, *s.shape[1:])
        assert torch.equal(check([many], [view])[0], check([many], [s])[0])


def test_samples_of_a_program_change_nothing():
    s, t, center, weights = logits(3, 5, 1100), logits(2, 5, 1100), torch.randn(1100), torch.rand(5)
    loss, grad = check([s], [t], center=center, weights=weights)
    for span in (1, 2, 100):
        again = check([s], [t], center=center, weights=weights, span=span)
        assert torch.equal(loss, again[0])
        assert torch.equal(grad, again[1])


@covering(1, temps=[(1.0, 1.0), (0.1, 0.04), (0.01, 0.007), (50.0, 30.0)], dtype=DTYPES)
def test_temperatures(temps, dtype):
    student_temp, teacher_temp = temps
    s, t = logits(4, 3, 65, dtype, 5.0), logits(2, 3, 65, dtype, 5.0)
    check([s], [t], center=torch.randn(65), student_temp=student_temp, teacher_temp=teacher_temp)


@pytest.mark.parametrize("height", [-300.0, 300.0])
def test_nothing_cancels_however_high_the_logits(height):
    """Multiples of 1/16, so that a shift changes no difference between logits."""
    s, t = (torch.randint(-64, 64, (n, 4, 1100)) / 16 for n in (4, 2))
    low, _ = check([s], [t], student_temp=0.5, teacher_temp=0.25)
    high, _ = check([s + height], [t + height], student_temp=0.5, teacher_temp=0.25)
    torch.testing.assert_close(high, low, rtol=1e-6, atol=0)


def test_confident_students_that_agree_have_a_small_loss():
    """Of some e^-8, which a difference of two large numbers would not show."""
    s = torch.zeros(3, 2, 40)
    s[:, 0, 7] = s[:, 1, 39] = 1.2
    loss, _ = check([s + 100], [s[:2]], student_temp=0.1, teacher_temp=0.01)
    want = 4 * torch.log1p(39 * torch.exp(torch.tensor(-12.0)))
    torch.testing.assert_close(loss, want.expand(2), rtol=2e-3, atol=0)  # 101.2 has an ulp of 8e-6, 8e-5 in z


@covering(1, dtype=DTYPES, distinct=[True, False])
def test_given_probabilities_of_any_mass(dtype, distinct):
    t = logits(2, 4, 1111).softmax(-1)
    t[0, 1] *= 0.25
    t[:, 2] = 0
    t[1, 3, :500] = 0
    center = torch.full((1111,), 1e6)
    check([logits(5, 4, 1111, dtype)], [t.to(dtype)], center=None, probs=True, distinct=distinct)
    ignored = dino(
        [logits(2, 4, 1111)], [t], center, None, torch.tensor(0.1), torch.tensor(NAN), False, True, None, 1.0
    )
    assert ignored.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_scale_of_masked_patches(dtype):
    s, t = logits(1, 9, 130, dtype), logits(1, 9, 130, dtype)
    weights = torch.tensor([0.0, 1.0, 0.5, 1 / 3, -2.0, 1e-3, 7.0, 1.0, 0.25])
    loss, grad = check([s], [t], center=torch.randn(130), weights=weights, distinct=False, grad_scale=2.0**-5)
    assert loss[0] == 0
    assert not grad[:, 0].any()
    check([s], [t], weights=weights[1::2].repeat(3)[:9], distinct=False, grad_scale=3.0)


def test_no_pairs():
    assert not any(x.any() for x in check([logits(1, 3, 20)], [logits(1, 3, 20)]))


def test_no_samples():
    s, t, temp = torch.ones(3, 0, 8), torch.ones(2, 0, 8), torch.tensor(1.0)
    grad = torch.empty(3, 0, 8)
    assert dino([s], [t], None, None, temp, temp, True, False, grad, 1.0).shape == (0,)
    assert torch.equal(teacher_sum([t]), torch.zeros(8))
    scale_(grad, torch.ones(0))


def test_prototypes_that_the_teacher_rules_out():
    """Whole blocks of them."""
    t = logits(2, 3, 2100)
    t[0, 1, :1030] = t[1, :, 1024:] = t[1, 2, 5:] = -INF
    s = logits(4, 3, 2100)
    temps = torch.tensor(0.1), torch.tensor(0.04)
    grad = torch.empty_like(s)
    loss = dino([s], [t], None, None, *temps, True, False, grad, 1.0)
    want, want_grad, *_ = dense(s.double(), t.double(), None, None, 0.1, 0.04, True, False)
    torch.testing.assert_close(loss, want.float(), rtol=2e-5, atol=0)
    torch.testing.assert_close(grad, want_grad.float(), rtol=2e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN:RuntimeWarning")
@pytest.mark.parametrize("k", [pytest.param(24, marks=pytest.mark.slow), 1100])
def test_nan_comes_out_and_only_where_it_belongs(k):
    temps = torch.tensor(0.1), torch.tensor(0.04)

    def run(s: Tensor, t: Tensor, center: Tensor | None = None, probs: bool = False) -> tuple[list[bool], Tensor]:
        grad = torch.zeros_like(s)
        loss = dino([s], [t], center, None, *temps, True, probs, grad, 1.0)
        bad = grad.isnan()
        assert torch.equal(bad.any(-1), bad.all(-1))
        return loss.isnan().tolist(), bad.any(-1)

    s, t = logits(4, 3, k), logits(2, 3, k)
    for value in (NAN, INF):
        broken = s.clone()
        broken[2, 1, k - 1] = value
        lost, bad = run(broken, t)
        assert lost == [False, True, False]
        assert bad.nonzero().tolist() == [[2, 1]]
        broken = t.clone()
        broken[0, 2, 3] = value
        lost, bad = run(s, broken)  # student 0 is not paired with teacher 0
        assert lost == [False, False, True]
        assert bad.nonzero().tolist() == [[1, 2], [2, 2], [3, 2]]
    lost, bad = run(s, torch.full_like(t, NAN).softmax(-1), probs=True)
    assert all(lost)
    assert bad.all()
    center = torch.zeros(k)
    center[k // 2] = NAN
    lost, bad = run(s, t, center)
    assert all(lost)
    assert bad.all()
    assert dino([s], [t], None, None, torch.tensor(NAN), temps[1], True, False, None, 1.0).isnan().all()


@covering(1, k=[7, 4096, 9 * 4096 + 1], dtype=DTYPES)
def test_scaling_in_place(k, dtype):
    g = logits(3, 2, k, dtype)
    for factor in (torch.tensor(0.3), torch.tensor([2.5, -0.125]), torch.tensor([0.0, 9.0, 3.0])[::2]):
        got = g.clone()
        scale_(got, factor)
        want = (g.float() * (factor if factor.dim() == 0 else factor[:, None])).to(dtype)
        assert torch.equal(got, want)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_scaling_by_one_does_not_touch_memory():
    """The bits of a signalling NaN, which do not survive a multiplication."""
    signalling = torch.full((1, 3, 40), 0x7C01, dtype=torch.int16)
    for factor, kept in ((torch.tensor(1.0), [True] * 3), (torch.tensor([1.0, 2.0, 1.0]), [True, False, True])):
        bits = signalling.clone()
        scale_(bits.view(torch.float16), factor)
        assert (bits == signalling).all(-1)[0].tolist() == kept


def test_sum_of_teachers():
    blocks = [logits(2, 3, 50, torch.bfloat16), logits(1, 50, 3, torch.bfloat16).mT]
    want = torch.cat(blocks).double().sum((0, 1))
    torch.testing.assert_close(teacher_sum(blocks), want.float(), rtol=1e-6, atol=1e-6)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    students=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    teachers=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    b=st.integers(1, 5),
    k=st.one_of(st.integers(1, 80), st.integers(1000, 1100), st.integers(60, 70).map(lambda n: 16 * n)),
    dtype=st.sampled_from(DTYPES),
    teacher_dtype=st.sampled_from(DTYPES),
    distinct=st.booleans(),
    has_center=st.booleans(),
    has_weights=st.booleans(),
    probs=st.booleans(),
    transposed=st.booleans(),
    temps=st.tuples(st.floats(0.02, 2), st.floats(0.02, 2)),
    seed=st.integers(0, 2**31),
)
def test_any_crops(
    students, teachers, b, k, dtype, teacher_dtype, distinct, has_center, has_weights, probs, transposed, temps, seed
):
    torch.manual_seed(seed)
    s = [logits(b, n, k, dtype).transpose(0, 1) if transposed else logits(n, b, k, dtype) for n in students]
    t = [logits(n, b, k) for n in teachers]
    check(
        s,
        [(x.softmax(-1) if probs else x).to(teacher_dtype) for x in t],
        center=torch.randn(k) if has_center and not probs else None,
        weights=torch.rand(b) if has_weights else None,
        student_temp=temps[0],
        teacher_temp=temps[1],
        distinct=distinct,
        probs=probs,
    )
