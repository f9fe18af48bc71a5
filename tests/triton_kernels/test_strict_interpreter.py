"""The strict interpreter finds what is planted, and finds nothing in what is right."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from strict_interpreter import OutOfBoundsError, RaceError, strict_interpreter
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _bf16_sum_kernel(A, B, OUT, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(A + at, mask=at < n, other=0.0)
    b = tl.load(B + at, mask=at < n, other=0.0)
    tl.store(OUT + at, a * b + a - b / 3.0, mask=at < n)


@triton.jit
def _bf16_functions_kernel(A, OUT, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a = tl.load(A + at, mask=at < n, other=1.0)
    tl.store(OUT + at, tl.where(a > 1.0, tl.maximum(-a, -2.0), tl.abs(a)), mask=at < n)


@triton.jit
def _extremes_kernel(A, COUNT, OUT):
    first, second = tl.load(A), tl.load(A + 1)
    tl.store(OUT, tl.minimum(first, second))
    tl.store(OUT + 1, tl.maximum(first, second))
    least, most = first, first
    for k in range(tl.load(COUNT)):
        least, most = tl.minimum(least, tl.load(A + k)), tl.maximum(most, tl.load(A + k))
    tl.store(OUT + 2, least)
    tl.store(OUT + 3, most)


@triton.jit
def _dot_kernel(A, B, OUT, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a = tl.load(A + i * BLOCK + j)
    b = tl.load(B + i * BLOCK + j)
    tl.store(OUT + i * BLOCK + j, tl.dot(a, b, input_precision=PRECISION))


@triton.jit
def _copy_kernel(A, OUT, n, stride, shift, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    loaded = at < n if MASKED else at >= 0
    tl.store(OUT + at, tl.load(A + (at + shift) * stride, mask=loaded, other=0.0), mask=at < n)


@triton.jit
def _no_other_kernel(A, OUT, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT, tl.sum(tl.load(A + at, mask=at < n), axis=0))


@triton.jit
def _overlap_kernel(A, OUT, step, BLOCK: tl.constexpr):
    at = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(OUT + at, tl.load(A + at))


@triton.jit
def _shift_in_place_kernel(A, by, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + at + by)
    tl.store(A + at, a)


@triton.jit
def _broadcast_read_then_write_kernel(A, OUT, BLOCK: tl.constexpr):
    first = tl.load(A)
    tl.store(OUT + tl.program_id(0), first)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(A, first + 1.0)


@triton.jit
def _atomic_kernel(A, OUT, PLAIN_READ: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(OUT, tl.sum(tl.load(A + at), axis=0))
    if PLAIN_READ:
        tl.store(A + at, tl.load(OUT) + tl.zeros((BLOCK,), tl.float32))


@triton.jit
def _collide_kernel(OUT, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(OUT + at // 2, at.to(tl.float32))


@triton.jit
def _store_block_kernel(OUT, BLOCK: tl.constexpr):
    OUT.store([0, 0], tl.full((BLOCK, BLOCK), 2.0, tl.float32).to(OUT.dtype))


@triton.jit
def _linear_kernel(A, OUT, factor, term):
    tl.store(OUT, tl.load(A) * factor - term)


def test_bf16_arithmetic_is_right_where_the_stock_interpreter_is_wrong():
    torch.manual_seed(0)
    a, b = torch.randn(60).bfloat16(), torch.randn(60).bfloat16()
    want = (a * b).add(a).sub((b / 3).bfloat16())  # each step rounded, as Triton's semantics have it
    out = torch.empty_like(a)
    _bf16_sum_kernel[(1,)](a, b, out, 60, BLOCK=64)
    assert not torch.allclose(out.float(), want.float(), atol=0.1), "the stock interpreter has learnt bf16: simplify"
    with strict_interpreter():
        _bf16_sum_kernel[(1,)](a, b, out, 60, BLOCK=64)
    torch.testing.assert_close(out, want, rtol=2**-7, atol=2**-7)


def test_of_a_number_and_nan_the_number_is_the_extreme():
    """As on a GPU, where kernels count on it; and a loop may end at a number that was loaded."""
    a, out = torch.tensor([torch.nan, 2.0, 3.0]), torch.empty(4)
    with strict_interpreter():
        _extremes_kernel[(1,)](a, torch.tensor([3]), out)
    assert out.tolist() == [2.0, 2.0, 2.0, 3.0]


def test_bf16_comparisons_and_functions():
    a = torch.tensor([-3.0, -0.5, 0.0, 0.75, 1.5, 6.0, float("inf"), float("nan")]).bfloat16()
    out = torch.empty_like(a)
    with strict_interpreter():
        _bf16_functions_kernel[(1,)](a, out, 8, BLOCK=8)
    want = torch.where(a > 1, (-a).clamp(min=-2), a.abs())
    torch.testing.assert_close(out, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("value", [1 + 2**-8, 1 + 2**-7 + 2**-8, 1 + 2**-9, 3.4e38, 1e-40, float("-inf"), float("nan")])
def test_bf16_rounds_to_nearest_even(value):
    @triton.jit
    def cast_kernel(A, OUT):
        tl.store(OUT, tl.load(A).to(tl.bfloat16))

    a, out = torch.tensor([value]), torch.empty(1, dtype=torch.bfloat16)
    with strict_interpreter():
        cast_kernel[(1,)](a, out)
    torch.testing.assert_close(out, a.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_products_accumulate_in_fp32(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype)
    out = torch.empty(16, 16)
    with strict_interpreter():
        _dot_kernel[(1,)](a, b, out, PRECISION="ieee", BLOCK=16)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-5)


def test_tf32_cuts_operands_and_ieee_does_not():
    torch.manual_seed(0)
    a, b = torch.rand(16, 16), torch.rand(16, 16)
    exact = a.double() @ b.double()
    error = {}
    for precision in ("tf32", "ieee"):
        out = torch.empty(16, 16)
        with strict_interpreter():
            _dot_kernel[(1,)](a, b, out, PRECISION=precision, BLOCK=16)
        error[precision] = out - exact
    assert error["ieee"].abs().max() < 1e-5
    assert (error["tf32"] < 0).all()  # of positive numbers, which are cut, not rounded
    assert 2e-4 < error["tf32"].abs().max() < 1e-2


@pytest.mark.parametrize("stride", [1, 3])
def test_a_masked_copy_passes(stride):
    a, out = torch.randn(100 * stride)[::stride], torch.empty(100)
    with strict_interpreter():
        _copy_kernel[(4,)](a, out, 100, stride, 0, MASKED=True, BLOCK=32)
    assert torch.equal(out, a)


def test_an_unmasked_load_past_the_end_is_found():
    backing = torch.randn(200)
    with (
        strict_interpreter(),
        pytest.raises(InterpreterError, match=r"OutOfBoundsError.*28 lanes.*100 elements.* of A"),
    ):
        _copy_kernel[(4,)](backing[:100], torch.empty(100), 100, 1, 0, MASKED=False, BLOCK=32)


@pytest.mark.parametrize("shift", [-1, 10**6])
def test_a_stray_pointer_is_found(shift):
    with strict_interpreter(), pytest.raises(InterpreterError, match="OutOfBoundsError"):
        _copy_kernel[(1,)](torch.randn(32), torch.empty(32), 32, 1, shift, MASKED=True, BLOCK=32)


def test_a_wrong_stride_lands_in_a_gap():
    a = torch.randn(200)[::3]
    with strict_interpreter(), pytest.raises(InterpreterError, match="OutOfBoundsError"):
        _copy_kernel[(1,)](a, torch.empty(32), 32, 2, 0, MASKED=True, BLOCK=32)


def test_masked_lanes_without_other_are_nan():
    out = torch.empty(())
    _no_other_kernel[(1,)](torch.ones(5), out, 5, BLOCK=8)
    assert out.item() == 5
    with strict_interpreter():
        _no_other_kernel[(1,)](torch.ones(5), out, 5, BLOCK=8)
    assert out.isnan()


@pytest.mark.parametrize(("factor", "term", "operation"), [(2, 0, "mul"), (-2, 1, "sub")])
def test_an_integer_that_does_not_fit_is_found(factor, term, operation):
    held, out = torch.tensor([2**30]), torch.empty(1, dtype=torch.int64)
    with strict_interpreter():
        _linear_kernel[(1,)](held, out, factor, term)
        assert out.item() == factor * 2**30 - term
        _linear_kernel[(1,)](held.int(), out, -1, 0)
        with pytest.raises(InterpreterError, match=rf"OverflowError.*{operation} of int32 gives up to -?214748364[89]"):
            _linear_kernel[(1,)](held.int(), out, factor, term)


def test_a_write_race_is_found():
    with strict_interpreter():
        _overlap_kernel[(3,)](torch.randn(96), torch.empty(96), 32, BLOCK=32)
        with pytest.raises(InterpreterError, match=r"RaceError.*store of program \(1, 0, 0\).*OUT"):
            _overlap_kernel[(3,)](torch.randn(96), torch.empty(96), 31, BLOCK=32)


def test_a_read_of_what_another_program_writes_is_found():
    with strict_interpreter():
        _shift_in_place_kernel[(3,)](torch.randn(96), 0, BLOCK=32)
        with pytest.raises(InterpreterError, match="RaceError"):
            _shift_in_place_kernel[(3,)](torch.randn(97), 1, BLOCK=32)


def test_a_write_after_several_programs_read_is_found():
    # The last program both reads and writes: the earlier readers must not be forgotten.
    with strict_interpreter(), pytest.raises(InterpreterError, match="RaceError"):
        _broadcast_read_then_write_kernel[(3,)](torch.randn(1), torch.empty(3), BLOCK=1)


def test_atomics_may_meet_but_not_a_plain_read():
    a, out = torch.ones(96), torch.zeros(1)
    with strict_interpreter():
        _atomic_kernel[(3,)](a, out, PLAIN_READ=False, BLOCK=32)
        assert out.item() == 96
        with pytest.raises(InterpreterError, match="RaceError"):
            _atomic_kernel[(3,)](a, out, PLAIN_READ=True, BLOCK=32)


def test_two_lanes_of_one_store_are_found():
    with strict_interpreter(), pytest.raises(InterpreterError, match=r"RaceError.*twice"):
        _collide_kernel[(1,)](torch.empty(16), BLOCK=32)


@pytest.mark.parametrize(("dtype", "written"), [(torch.float32, 12), (torch.bfloat16, 16)])
def test_a_descriptor_s_store_writes_whole_16_bytes(dtype, written):
    memory = torch.full((5, 32), 7.0, dtype=dtype)
    with strict_interpreter():
        _store_block_kernel[(1,)](TensorDescriptor.from_tensor(memory[:4, :9], [16, 16]), BLOCK=16)
    assert (memory[:4, :9] == 2).all()
    assert memory[:4, 9:written].isnan().all()
    assert (memory[:4, written:] == 7).all()
    assert (memory[4:] == 7).all()


def test_what_a_descriptor_s_store_writes_behind_the_last_column_must_be_padding():
    memory = torch.zeros(4, 32)

    @triton.jit
    def store_beside_kernel(OUT, OTHER, BLOCK: tl.constexpr):
        OUT.store([0, 0], tl.full((BLOCK, BLOCK), 2.0, tl.float32) + tl.load(OTHER))

    short = torch.zeros(3 * 16 + 9)[: 3 * 16 + 9].as_strided((4, 9), (16, 1))
    with strict_interpreter():
        for out, other in ((memory[:, :9], memory[:, 9:]), (short, torch.zeros(1))):
            with pytest.raises(InterpreterError, match=r"OutOfBoundsError.*no padding"):
                store_beside_kernel[(1,)](TensorDescriptor.from_tensor(out, [16, 16]), other, BLOCK=16)
        store_beside_kernel[(1,)](TensorDescriptor.from_tensor(memory[:, :9], [16, 16]), memory[:, 12:], BLOCK=16)


def test_the_stock_interpreter_comes_back():
    with strict_interpreter():
        pass
    out = torch.empty(())
    _no_other_kernel[(1,)](torch.ones(5), out, 5, BLOCK=8)
    assert out.item() == 5


def test_errors_are_of_their_own_types():
    assert issubclass(OutOfBoundsError, IndexError)
    assert issubclass(RaceError, RuntimeError)
