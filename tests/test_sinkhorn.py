"""Sinkhorn-Knopp against its algorithm in float64, and the softmax that it ends with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive import dtypes, workspaces_mb
from distillation import BACKENDS, FUSED, assignment, lay_out, layouts
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from memory import linux_only, peak_mb
from processes import run_processes
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import SinkhornKnopp
from ssl_kernels.ops.sinkhorn import _centered_softmax, _column_lse, _column_sums


def center(backend: str, teacher: Tensor, temp: Tensor | float, **options: Any) -> Tensor:
    with ssl_kernels.use_backend(backend):
        return K.sinkhorn_center(teacher, temp, **options)


def assigned(backend: str, teacher: Tensor, temp: Tensor | float, **options: Any) -> Tensor:
    with ssl_kernels.use_backend(backend):
        return K.sinkhorn_knopp(teacher, temp, **options)


# ---- values


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(
    rows=st.integers(1, 20),
    width=st.one_of(st.integers(1, 70), st.sampled_from([500, 1025, 2049])),
    dtype=dtypes,
    layout=layouts,
    temp=st.sampled_from([1.0, 0.07, 0.04]),
    size=st.sampled_from([0.1, 1.0, 4.0]),
    iterations=st.integers(1, 5),
    workspace_mb=workspaces_mb,
    seed=st.integers(0, 2**16),
)
def test_matches_the_float64_reference(
    backend: str, rows: int, width: int, dtype: torch.dtype, layout: str, temp: float, size: float, iterations: int,
    workspace_mb: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    teacher = lay_out((size * torch.randn(1, rows, width)).to(dtype), layout)[0]
    with ssl_kernels.use_workspace(workspace_mb):
        ours = center(backend, teacher, temp, n_iterations=iterations)
        q = assigned(backend, teacher, temp, n_iterations=iterations)
    exact = center("reference", teacher.double(), temp, n_iterations=iterations)
    plain = center("reference", teacher.float(), temp, n_iterations=iterations)
    assert ours.dtype == q.dtype == torch.float32
    assert (ours.shape, q.shape) == ((width,), teacher.shape)
    # A logit's rounding is divided by the temperature in the exponents, where it is spread by the potentials.
    rounding = 1e-6 * (exact.abs().amax().item() + temp)
    assert (ours - exact).abs().amax() <= 2 * (plain - exact).abs().amax() + rounding
    expected = assigned("reference", teacher.double(), temp, n_iterations=iterations)
    torch.testing.assert_close(q.double(), expected, rtol=20 * rounding / temp, atol=1e-6)
    torch.testing.assert_close(q.sum(1), torch.ones(rows), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iterations", [1, 3, 10])
@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (2, 30, 24)])
def test_the_algorithm_of_the_papers(backend: str, iterations: int, shape: tuple[int, ...]) -> None:
    """Scaling the columns and rows of exp(T / tau) in turn, at logits for which that exponential is finite."""
    teacher = 0.5 * torch.randn(shape)
    q = assigned(backend, teacher, 0.07, n_iterations=iterations)
    expected = assignment(teacher.flatten(0, -2), 0.07, iterations).view(shape)
    torch.testing.assert_close(q.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shift", [0.0, 4.0, -500.0])
def test_large_logits_do_not_overflow(backend: str, shift: float) -> None:
    """exp(T / 0.04) in fp32 is infinite for logits above 3.55, and then another library's assignment is NaN."""
    teacher = 100 * torch.randn(30, 50) + shift
    q = assigned(backend, teacher, 0.04)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(1), torch.ones(30))
    exact = assigned("reference", teacher.double(), 0.04)
    differ = (q.double() - exact).abs().amax(1) > 1e-2  # ties of two prototypes hang on the last digit of a logit
    assert differ.sum() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prototype_that_nobody_likes_receives_its_share(backend: str) -> None:
    """Its column underflows in exp(T / tau), where another library divides by 0."""
    teacher = torch.randn(24, 6)
    teacher[:, 2] -= 1000
    q = assigned(backend, teacher, 0.2, n_iterations=60)
    assert q.isfinite().all()
    torch.testing.assert_close(q.sum(0), torch.full((6,), 4.0), rtol=2e-2, atol=0)
    shifted = teacher.clone()
    shifted[:, 2] += 1000
    torch.testing.assert_close(q, assigned(backend, shifted, 0.2, n_iterations=60), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("backend", FUSED)
@hypothesis_settings(max_examples=30)
@given(rows=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 2**16))
def test_many_iterations_are_doubly_stochastic(backend: str, rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    q = assigned(backend, torch.randn(rows, width), 0.5, n_iterations=200)
    torch.testing.assert_close(q.sum(1), torch.ones(rows), rtol=1e-5, atol=0)
    torch.testing.assert_close(q.sum(0), torch.full((width,), rows / width), rtol=1e-3, atol=0)


@pytest.mark.parametrize("backend", FUSED)
def test_what_is_added_to_a_sample_or_to_a_prototype_is_forgotten(backend: str) -> None:
    teacher = torch.randn(20, 30)
    q = assigned(backend, teacher, 0.07)
    by_prototype = assigned(backend, teacher + 10 * torch.randn(30), 0.07)
    torch.testing.assert_close(by_prototype, q, rtol=1e-3, atol=1e-6)
    everywhere = assigned(backend, teacher + 7, 0.07)
    torch.testing.assert_close(everywhere, q, rtol=1e-3, atol=1e-6)
    by_sample = assigned(backend, teacher + 10 * torch.randn(20, 1), 0.07, n_iterations=300)
    torch.testing.assert_close(by_sample, assigned(backend, teacher, 0.07, n_iterations=300), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("backend", FUSED)
def test_the_order_of_samples_and_prototypes_does_not_matter(backend: str) -> None:
    teacher, rows, cols = torch.randn(20, 300), torch.randperm(20), torch.randperm(300)
    q = assigned(backend, teacher, 0.07)
    torch.testing.assert_close(assigned(backend, teacher[rows][:, cols], 0.07), q[rows][:, cols], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_with_the_center_is_the_loss_with_the_assignment(backend: str, dtype: torch.dtype) -> None:
    student, teacher = torch.randn(4, 6, 50, requires_grad=True), torch.randn(2, 6, 50).to(dtype)
    with ssl_kernels.use_backend(backend):
        loss = K.dino_loss(student, teacher, teacher_temp=0.07, center=K.sinkhorn_center(teacher, 0.07))
        written = K.dino_loss(student, K.sinkhorn_knopp(teacher, 0.07), teacher_probs=True)
    exact = assignment(teacher.flatten(0, 1), 0.07).view(2, 6, 50)
    log_s = torch.log_softmax(student.double() / 0.1, -1)
    expected = -sum((exact[t] * log_s[v]).sum(1).mean() for t in range(2) for v in range(4) if t != v) / 6
    for value in (loss, written):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_65537_prototypes(backend: str) -> None:
    teacher = torch.randn(5, 65_537)
    q, exact = assigned(backend, teacher, 0.07), assigned("reference", teacher.double(), 0.07)
    torch.testing.assert_close(q.double(), exact, rtol=1e-4, atol=1e-9)


def test_same_bits_every_time() -> None:
    teacher = torch.randn(33, 3000)
    first, *others = (K.sinkhorn_center(teacher, 0.04) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)


# ---- edges


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_samples(backend: str, shape: tuple[int, ...]) -> None:
    assert torch.equal(center(backend, torch.ones(shape), 0.04), torch.zeros(5))
    assert assigned(backend, torch.ones(shape), 0.04).shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sample_is_spread_over_all_prototypes(backend: str) -> None:
    torch.testing.assert_close(assigned(backend, 5 * torch.randn(1, 8), 0.04), torch.full((1, 8), 1 / 8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_prototype_receives_all_samples(backend: str) -> None:
    assert torch.equal(assigned(backend, torch.randn(7, 1), 0.04), torch.ones(7, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("at", [(0, 0), (12, 3), (19, 40)])
def test_non_finite_logits_show(backend: str, bad: float, at: tuple[int, int]) -> None:
    teacher = torch.randn(20, 41)
    teacher[at] = bad
    assert center(backend, teacher, 0.04).isnan().any()
    assert assigned(backend, teacher, 0.04)[at[0]].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_minus_infinity_is_a_probability_of_0(backend: str) -> None:
    teacher = torch.randn(20, 41)
    teacher[3, 5] = teacher[0, 0] = -math.inf
    q = assigned(backend, teacher, 0.04)
    assert q[3, 5] == q[0, 0] == 0
    torch.testing.assert_close(q.double(), assignment(teacher, 0.04), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_of_minus_infinity_is_nan(backend: str) -> None:
    """No assignment gives it a share."""
    teacher = torch.randn(20, 7)
    teacher[:, 4] = -math.inf
    assert assigned(backend, teacher, 0.04).isnan().all()


# ---- the softmax


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(
    rows=st.integers(0, 9),
    width=st.one_of(st.integers(1, 70), st.sampled_from([500, 2049, 9000])),
    dtype=dtypes,
    layout=layouts,
    temp=st.sampled_from([1.0, 0.04]),
    centred=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_softmax_matches_float64(
    backend: str, rows: int, width: int, dtype: torch.dtype, layout: str, temp: float, centred: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    teacher = lay_out(torch.randn(1, rows, width).to(dtype), layout)
    c = torch.randn(1, 1, width) if centred else None
    with ssl_kernels.use_backend(backend):
        p = K.centered_softmax(teacher, temp, c)
    assert p.dtype == torch.float32
    expected = torch.softmax((teacher.double() - (0 if c is None else c)) / temp, -1)
    torch.testing.assert_close(p.double(), expected, rtol=5e-6 / temp, atol=1e-27)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_stays_float64(backend: str) -> None:
    teacher = torch.randn(6, 9).double()
    with ssl_kernels.use_backend("eager" if backend == "cpu" else backend):
        assert K.centered_softmax(teacher, 0.04).dtype == K.sinkhorn_center(teacher, 0.04).dtype == torch.float64
        torch.testing.assert_close(K.sinkhorn_knopp(teacher, 0.1), assignment(teacher, 0.1), rtol=1e-10, atol=1e-14)


# ---- torch's machinery


@pytest.mark.parametrize("backend", FUSED)
def test_opcheck(backend: str) -> None:
    for rows in (torch.randn(5, 9), torch.randn(0, 9), torch.randn(5, 9).bfloat16()):
        temp, c = torch.tensor(0.1), torch.randn(9)
        torch.library.opcheck(_column_lse.in_graphs, (rows, None, temp, backend))
        torch.library.opcheck(_column_sums.in_graphs, (rows, c, temp, backend))
        for given_center in (c, None):
            torch.library.opcheck(_centered_softmax.in_graphs, (rows, given_center, temp, backend))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_a_graph_break(compiler: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(SinkhornKnopp(), fullgraph=True, backend=compiler, dynamic=True)
    for rows in (5, 12, 9):
        teacher = torch.randn(rows, 30)
        torch.testing.assert_close(compiled(teacher, 0.07), K.sinkhorn_knopp(teacher, 0.07))


def test_under_autocast_and_inference_mode() -> None:
    teacher = torch.randn(8, 30)
    expected = K.sinkhorn_knopp(teacher, 0.07)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        assert torch.equal(K.sinkhorn_knopp(teacher, torch.tensor(0.07)), expected)


@linux_only
def test_the_center_needs_no_matrix() -> None:
    """Peers copy exp(T / tau) several times, 32 MB each here."""
    teacher = torch.randn(128, 65_536)
    K.sinkhorn_center(teacher[:2], 0.04)
    assert peak_mb(lambda: K.sinkhorn_center(teacher, 0.04), calls=3) < 8


def test_the_module() -> None:
    teacher, module = torch.randn(2, 8, 30, requires_grad=True), SinkhornKnopp(n_iterations=5)
    q = module(teacher, 0.07)
    expected = assignment(teacher.detach().flatten(0, 1), 0.07, 5).view(2, 8, 30)
    torch.testing.assert_close(q.double(), expected, rtol=1e-4, atol=1e-7)
    assert torch.equal(K.centered_softmax(teacher.detach(), 0.07, module.center(teacher, 0.07)), q)
    assert not q.requires_grad
    assert repr(module) == "SinkhornKnopp(n_iterations=5)"


# ---- processes

WORKER = """
import ssl_kernels, ssl_kernels.functional as K
torch.manual_seed(0)
everyone = torch.randn(20, 13)

for shares in ([10, 10], [13, 7], [0, 20], [0, 0]):
    begin = sum(shares[:rank])
    own = everyone[begin : begin + shares[rank]]
    for backend in ("cpu", "eager", "reference"):
        with ssl_kernels.use_backend(backend):
            center = K.sinkhorn_center(own, 0.07)
            q = K.sinkhorn_knopp(own, 0.07)
            alone = dist.new_subgroups(group_size=1)[0]
            expected = K.sinkhorn_center(everyone[: sum(shares)], 0.07, group=alone)
        torch.testing.assert_close(center, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(q, K.centered_softmax(own, 0.07, expected), rtol=1e-3, atol=1e-6)
        both = [torch.empty_like(center) for _ in range(world)]
        dist.all_gather(both, center)
        assert torch.equal(*both)

group = dist.new_group([0])
try:
    K.sinkhorn_knopp(everyone, 0.07, group=group)
    assert rank == 0
except ValueError as error:
    assert rank == 1 and str(error) == "group: expected a group that this process is in, got one of other processes"
"""


def test_two_processes_assign_as_one_would(tmp_path: Path) -> None:
    run_processes(WORKER, tmp_path)


# ---- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"teacher": None}, TypeError, "teacher: expected a tensor, got NoneType"),
        ({"teacher": torch.ones(5)}, ValueError, r"teacher: expected shape \[..., K\] .* got \(5,\)"),
        ({"teacher": torch.ones(5, 0)}, ValueError, r"teacher: expected shape \[..., K\] .* got \(5, 0\)"),
        ({"teacher": torch.ones(5, 3).int()}, TypeError, "teacher: expected dtype float32, .* got torch.int32"),
        ({"teacher": torch.ones(5, 3, requires_grad=True)}, ValueError, "teacher: expected a tensor without gradient"),
        ({"teacher_temp": 0.0}, ValueError, "teacher_temp: expected a positive number, got 0.0"),
        ({"teacher_temp": torch.ones(2)}, ValueError, "teacher_temp: expected a float or .* of one element"),
        ({"n_iterations": 0}, ValueError, "n_iterations: expected an int, at least 1, got 0"),
        ({"n_iterations": 1.5}, ValueError, "n_iterations: expected an int, at least 1, got 1.5"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"teacher": torch.ones(5, 3), "teacher_temp": 0.1}
    with pytest.raises(error, match=message):
        K.sinkhorn_knopp(**(arguments | change))


def test_bad_centers_are_named() -> None:
    with pytest.raises(ValueError, match=r"center: expected 3 elements, .* got shape \(4,\)"):
        K.centered_softmax(torch.ones(5, 3), 0.1, torch.ones(4))
