"""The torch-free kernels of DINO and Sinkhorn-Knopp on NumPy arrays, on every instruction set of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python

native = pytest.importorskip("ssl_kernels._native", reason="the wheel was built by another version of Python")
ISAS = native.build_info()["available_isas"]

Array = np.ndarray[Any, Any]
TYPES = ("float32", "float16", "bfloat16")
HALF_EPS = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8}

widths = st.one_of(st.integers(1, 70), st.sampled_from([128, 512, 513, 1024, 2047, 2049, 4096, 4100]))


def rounded(values: Array, kind: str) -> tuple[Array, Array]:
    """What the kernel takes, bfloat16 as its bits, and the numbers that it stands for."""
    t = torch.from_numpy(values).to(getattr(torch, kind))
    given = t.view(torch.int16).numpy().view(np.uint16) if kind == "bfloat16" else t.numpy()
    return given, t.double().numpy()


def widened(values: Array) -> Array:
    if values.dtype == np.uint16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).double().numpy()
    return values.astype(np.float64)


def softmax(z: Array) -> Array:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def definition(
    students: Array,
    teachers: Array,
    center: Array,
    weights: Array,
    temps: tuple[float, float],
    distinct: bool,
    given: bool,
) -> tuple[Array, Array]:
    """Losses [B] and the gradient [V, B, K], over pairs."""
    p = teachers if given else softmax((teachers - center) / temps[1])
    z = students / temps[0]
    log_s = z - z.max(-1, keepdims=True)
    log_s = log_s - np.log(np.exp(log_s).sum(-1, keepdims=True))
    losses, gradient = np.zeros(students.shape[1]), np.zeros_like(students)
    for t, v in np.ndindex(len(p), len(z)):
        if not (distinct and t == v):
            losses -= (p[t] * log_s[v]).sum(-1)
            gradient[v] += (np.exp(log_s[v]) * p[t].sum(-1, keepdims=True) - p[t]) / temps[0]
    return losses * weights, gradient * weights[:, None]


@pytest.mark.parametrize("isa", ISAS)
@given(
    crops=st.integers(1, 4),
    teacher_crops=st.integers(1, 4),
    samples=st.integers(0, 3),
    width=widths,
    kind=st.sampled_from(TYPES),
    teacher_kind=st.sampled_from(TYPES),
    centred=st.booleans(),
    weighted=st.booleans(),
    distinct=st.booleans(),
    teacher_probs=st.booleans(),
    stream_gradient=st.booleans(),
    temps=st.sampled_from([(0.1, 0.04), (1.0, 1.0)]),
    seed=st.integers(0, 2**16),
)
def test_dino_matches_the_definition(
    isa: str, crops: int, teacher_crops: int, samples: int, width: int, kind: str, teacher_kind: str, centred: bool,
    weighted: bool, distinct: bool, teacher_probs: bool, stream_gradient: bool, temps: tuple[float, float], seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    students, s = rounded(rng.normal(size=(crops, samples, width)), kind)
    logits = rng.normal(size=(teacher_crops, samples, width))
    teachers, t = rounded(softmax(logits) if teacher_probs else logits, teacher_kind)
    center = rng.normal(size=width).astype(np.float32) if centred else None
    weights = rng.random(samples).astype(np.float32) if weighted else None
    losses, gradient, teacher_sum = native.dino(
        students, teachers, center, weights, *temps, distinct, teacher_probs, stream_gradient, isa=isa
    )
    expected = definition(
        s,
        t,
        np.zeros(width) if center is None else center,
        np.ones(samples) if weights is None else weights,
        temps,
        distinct,
        teacher_probs,
    )
    pairs = crops * teacher_crops
    np.testing.assert_allclose(losses, expected[0], rtol=2e-5, atol=2e-5 * pairs / temps[0])
    assert gradient.dtype == students.dtype
    error = np.linalg.norm(widened(gradient) - expected[1])
    subnormal = 2**-25 * gradient.size**0.5 if kind == "float16" else 0
    rounding = 2e-5 * teacher_crops * (crops * samples) ** 0.5 / temps[0]
    assert error <= HALF_EPS[kind] * np.linalg.norm(expected[1]) + rounding + subnormal
    np.testing.assert_allclose(teacher_sum, t.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
def test_the_streamed_gradient_is_the_same(isa: str) -> None:
    """Whether or not a row starts at a multiple of a vector."""
    rng = np.random.default_rng(0)
    for width in (512, 515, 4096):
        students, teachers = rng.normal(size=(2, 3, 4, width)).astype(np.float32)
        kept, streamed = (native.dino(students, teachers, stream_gradient=flag, isa=isa) for flag in (False, True))
        for a, b in zip(kept, streamed, strict=True):
            assert np.array_equal(a, b)


@pytest.mark.parametrize("isa", ISAS)
@given(
    rows=st.integers(1, 20),
    width=widths,
    gap=st.integers(0, 3),
    kind=st.sampled_from(TYPES),
    temp=st.sampled_from([1.0, 0.04]),
    centred=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_sinkhorn_matches_the_definition(
    isa: str, rows: int, width: int, gap: int, kind: str, temp: float, centred: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    buffer, values = rounded(rng.normal(size=(rows, width + gap)), kind)
    logits, y = buffer[:, :width], values[:, :width]
    center = rng.normal(size=width).astype(np.float32) if centred else None
    maxima, totals = native.sinkhorn_column_lse(logits, temp, isa=isa)
    assert np.array_equal(maxima, y.max(0))
    np.testing.assert_allclose(totals, np.exp((y - y.max(0)) / temp).sum(0), rtol=2e-5)
    p = softmax((y - (0 if center is None else center)) / temp)
    np.testing.assert_allclose(native.centered_softmax(logits, center, temp, isa=isa), p, rtol=5e-5, atol=1e-26)
    np.testing.assert_allclose(
        native.sinkhorn_column_sums(logits, center, temp, isa=isa), p.sum(0), rtol=5e-5, atol=1e-25
    )


@pytest.mark.parametrize("isa", ISAS)
def test_long_rows_do_not_drift(isa: str) -> None:
    width = 2**20 + 3
    students, teachers = np.full((2, 2, 1, width), 0.5, np.float32)
    students[1, 0, 7] = 0.7
    teachers[0, 0, -1] = 0.6
    losses, _, _ = native.dino(students, teachers, isa=isa)
    weights = np.ones(1)
    expected, _ = definition(
        students.astype(float), teachers.astype(float), np.zeros(1), weights, (0.1, 0.04), True, False
    )
    np.testing.assert_allclose(losses, expected, rtol=2e-7)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("width", [1, 5, 64, 131, 2100])
def test_nan_and_infinity_come_through(isa: str, width: int) -> None:
    for bits in (0x7FC00000, 0x7FC00001, 0xFFC12345, 0x7F800001):  # NaNs of several payloads
        nan = np.array(bits, np.uint32).view(np.float32)
        for col in {0, width // 2, width - 1}:
            for which in ("student", "teacher"):
                students, teachers = np.zeros((2, 3, 3, width), np.float32)
                (students if which == "student" else teachers)[1, 1, col] = nan
                losses, gradient, _ = native.dino(students, teachers, isa=isa)
                assert np.isnan(losses).tolist() == [False, True, False]
                crop = 1 if which == "student" else 0  # of several that the teacher's crop meets
                assert np.isnan(gradient[crop, 1]).all()
                assert np.isfinite(gradient[:, [0, 2]]).all()
            rows = np.zeros((9, width), np.float32)
            rows[4, col] = nan
            _, totals = native.sinkhorn_column_lse(rows, 0.1, isa=isa)
            assert np.flatnonzero(np.isnan(totals)).tolist() == [col]
            p = native.centered_softmax(rows, None, 0.1, isa=isa)
            assert np.isnan(p[4]).all()
            assert np.isfinite(np.delete(p, 4, 0)).all()
            assert np.isnan(native.sinkhorn_column_sums(rows, None, 0.1, isa=isa)).all()


def test_bad_arrays_are_named() -> None:
    crops, rows = np.zeros((2, 3, 4), np.float32), np.zeros((3, 4), np.float32)
    for arguments, message in (
        ((crops[..., ::2], crops), "students: expected unit stride along columns, got 2"),
        ((crops, crops[0]), "teachers: expected 3 dimensions, got 2"),
        ((crops, crops[:, :2].copy()), "teachers: expected size 3 in dimension 1, got 2"),
        ((crops, crops[:0]), "teachers: expected at least one crop"),
        ((crops, crops, np.zeros(3, np.float32)), "center: expected"),
        ((crops, crops, None, np.zeros(4, np.float32)), "weights: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            native.dino(*arguments)
    with pytest.raises(ValueError, match="students: expected dtype Float, BFloat16 or Half, got Double"):
        native.dino(crops.astype(np.float64), crops)
    for function in (native.sinkhorn_column_sums, native.centered_softmax):
        with pytest.raises(ValueError, match="rows: expected unit stride along columns, got 2"):
            function(rows[:, ::2], None, 0.1)
    with pytest.raises(ValueError, match="rows: expected at least 1 row, got 0"):
        native.sinkhorn_column_lse(rows[:0], 0.1)


@pytest.mark.parametrize("isa", ISAS)
def test_the_ops_themselves_on_each_instruction_set(isa: str) -> None:
    code = """
import torch, ssl_kernels, ssl_kernels.functional as K
torch.manual_seed(0)
student, teacher = torch.randn(4, 6, 450, requires_grad=True), torch.randn(2, 6, 450)
results = []
for backend in ("cpu", "reference"):
    with ssl_kernels.use_backend(backend):
        loss = K.dino_loss(student, teacher, center=K.sinkhorn_center(teacher, 0.04))
        results.append([loss.detach(), *torch.autograd.grad(loss, student)])
for a, b in zip(*results):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
print(ssl_kernels._C.active_isa())
"""
    result = run_python(code, SSL_KERNELS_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == isa
