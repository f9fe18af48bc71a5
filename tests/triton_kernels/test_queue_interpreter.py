"""The Triton kernel of the key queue in the strict interpreter, against a loop over the keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from panels import DTYPES, rows_far_apart
from torch import Tensor

from ssl_kernels.kernels.queue import enqueue

pytestmark = pytest.mark.usefixtures("strict")
UNIT = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}


def check(queue: Tensor, start: int, keys: Tensor, normalize: bool = False, *, shape: tuple[int, ...] = (1,)) -> None:
    pointer, kept = torch.full(shape, start), keys.clone()
    want = queue.clone()
    values = F.normalize(keys.double(), dim=1) if normalize else keys
    for r in range(keys.shape[0]):
        want[(start + r) % queue.shape[0]] = values[r].to(queue.dtype)
    enqueue(queue, pointer, keys, normalize)
    assert pointer.shape == shape
    assert pointer.item() == (start + keys.shape[0]) % queue.shape[0]
    torch.testing.assert_close(keys, kept, rtol=0, atol=0, equal_nan=True)
    if normalize:
        torch.testing.assert_close(queue.float(), want.float(), rtol=2 * UNIT[queue.dtype], atol=1e-7, equal_nan=True)
    else:
        torch.testing.assert_close(queue, want, rtol=0, atol=0, equal_nan=True)


@covering(2, dtype=DTYPES, key_dtype=DTYPES, normalize=[False, True])
def test_dtypes(dtype, key_dtype, normalize):
    check(torch.randn(19, 40).to(dtype), 15, (torch.randn(11, 40) * 3).to(key_dtype), normalize)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("capacity", "start", "batch"),
    [(64, 0, 64), (64, 63, 1), (64, 60, 8), (64, 64 - 8, 8), (10, 3, 10), (10, 7, 37), (1, 0, 5), (7, 6, 0)],
)
def test_around_the_end(capacity, start, batch, normalize):
    for shape in ((), (1,)):
        check(torch.randn(capacity, 24), start, torch.randn(batch, 24), normalize, shape=shape)


def test_batches_of_any_size_one_after_the_other():
    queue, pointer = torch.zeros(11, 3), torch.zeros(1, dtype=torch.int64)
    history = torch.empty(0, 3)
    for batch in (4, 4, 1, 9, 11, 3):
        keys = torch.randn(batch, 3)
        history = torch.cat([history, keys])
        enqueue(queue, pointer, keys, False)
        rows = torch.arange(len(history))[-11:] % 11
        assert torch.equal(queue[rows], history[-11:])
        assert pointer.item() == len(history) % 11


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("width", [1, 3, 1023, 1025, 2500])
def test_widths(width, normalize):
    check(torch.randn(5, width), 4, torch.randn(3, width), normalize)


@pytest.mark.parametrize("normalize", [False, True])
def test_strides_and_what_lies_between(normalize):
    transposed = torch.randn(20, 9)
    check(transposed.t(), 7, torch.randn(40, 5).t()[:, ::2], normalize)
    wide = torch.full((9, 50), 7.0)
    check(wide[:, 1:41:2], 7, torch.randn(1, 20).expand(5, 20), normalize)
    wide[:, 1:41:2] = 7.0
    assert (wide == 7.0).all()


def test_a_pointer_out_of_range_stays_within_the_queue():
    for start in (-3, 25, 2**40):
        check(torch.randn(10, 4), start, torch.randn(6, 4))


def test_norms_as_normalize_has_them():
    """Zero stays zero, a tiny key is divided by 1e-12, NaN comes out in the whole row."""
    keys = torch.randn(5, 30)
    keys[0] = 0
    keys[1] = 1e-14
    keys[2, 3] = float("nan")
    queue = torch.zeros(8, 30)
    check(queue, 0, keys, True)
    assert queue[2].isnan().all()
    assert not queue[0].any()
    torch.testing.assert_close(queue[1], torch.full((30,), 0.01))


def test_offsets_beyond_32_bits():
    rows, width = 4, 5
    far = rows_far_apart(rows, width)
    keys, near = torch.randn(rows, width).bfloat16(), torch.zeros(rows, width).bfloat16()
    enqueue(far, torch.tensor(2), keys, False)
    enqueue(near, torch.tensor(2), far, False)
    assert torch.equal(far, keys.roll(2, 0))
    assert torch.equal(near, keys.roll(4, 0))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    capacity=st.integers(1, 50),
    batch=st.integers(0, 120),
    width=st.integers(1, 70),
    start=st.integers(0, 49),
    dtype=st.sampled_from(DTYPES),
    key_dtype=st.sampled_from(DTYPES),
    normalize=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_queue(capacity, batch, width, start, dtype, key_dtype, normalize, seed):
    torch.manual_seed(seed)
    keys = torch.randn(batch, width).to(key_dtype)
    check(torch.randn(capacity, width).to(dtype), start % capacity, keys, normalize)
