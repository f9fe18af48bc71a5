"""The torch-free kernel of the queue on NumPy arrays, on every instruction set of this machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

native = pytest.importorskip("ssl_kernels._native", reason="the wheel was built by another version of Python")
ISAS = native.build_info()["available_isas"]


def bf16_bits(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("isa", ISAS)
def test_every_half_and_bfloat16_widens_exactly(isa: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)[:, None]
    queue = np.zeros((65536, 1), np.float32)
    assert native.enqueue(queue, 5, bits.view(np.float16), isa=isa) == 5
    np.testing.assert_array_equal(np.roll(queue, -5), bits.view(np.float16).astype(np.float32))
    native.enqueue(queue, 0, bits, isa=isa)
    np.testing.assert_array_equal(queue[:, 0], (np.arange(65536, dtype=np.uint32) << 16).view(np.float32))


@pytest.mark.parametrize("isa", ISAS)
def test_floats_round_to_nearest_even(isa: str) -> None:
    """A million bit patterns, and every midpoint between neighbouring halves with its neighbours, as torch rounds."""
    patterns = np.random.default_rng(0).integers(2**32, size=2**20, dtype=np.uint32)
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    midpoints = ((halves[1:] + halves[:-1]) / 2).view(np.uint32)
    around = np.concatenate([midpoints - 1, midpoints, midpoints + 1])
    values = np.concatenate([patterns, around, around | 0x80000000]).view(np.float32)[:, None]
    for dtype, expected in ((np.float16, torch.float16), (np.uint16, torch.bfloat16)):
        queue = np.zeros(values.shape, dtype)
        native.enqueue(queue, 0, values, isa=isa)
        ours = torch.from_numpy(queue.view(np.int16)).view(expected)
        theirs = torch.from_numpy(values).to(expected)
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours[~theirs.isnan()].view(torch.int16), theirs[~theirs.isnan()].view(torch.int16))


@pytest.mark.parametrize("isa", ISAS)
@given(
    size=st.integers(1, 9),
    batch=st.integers(0, 25),
    width=st.integers(0, 45),
    gap=st.integers(0, 3),
    pointer=st.integers(-2, 30),
    queue_kind=st.sampled_from(["float32", "float16", "bfloat16"]),
    key_kind=st.sampled_from(["float32", "float16", "bfloat16"]),
    normalize=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_writes_each_key_where_it_belongs(
    isa: str, size: int, batch: int, width: int, gap: int, pointer: int, queue_kind: str, key_kind: str,
    normalize: bool, seed: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)

    def pack(values: np.ndarray, kind: str) -> np.ndarray:
        return bf16_bits(values) if kind == "bfloat16" else values.astype(kind)

    def unpack(values: np.ndarray, kind: str) -> np.ndarray:
        wide = (values.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else values
        return wide.astype(np.float64)

    queue = pack(rng.normal(size=(size, width + gap)).astype(np.float32), queue_kind)
    keys = pack(rng.normal(size=(batch, width + gap)).astype(np.float32), key_kind)
    expected = unpack(queue, queue_kind)
    at = pointer % size
    for key in unpack(keys, key_kind)[:, :width]:
        expected[at, :width] = key / max(np.linalg.norm(key), 1e-12) if normalize else key
        at = (at + 1) % size
    assert native.enqueue(queue[:, :width], pointer, keys[:, :width], normalize, isa) == at
    eps = {"float32": 3e-7, "float16": 2**-10, "bfloat16": 2**-8}[queue_kind]
    np.testing.assert_allclose(unpack(queue, queue_kind), expected, rtol=eps, atol=2**-24)


def test_bad_arrays_are_named() -> None:
    queue, keys = np.zeros((4, 3), np.float32), np.zeros((2, 3), np.float32)
    for arguments, message in (
        ((queue[:, ::2], 0, keys), "queue: expected unit stride along columns, got 2"),
        ((queue, 0, keys.T), "keys: expected unit stride along columns, got 3"),
        ((queue[:0], 0, keys), "queue: expected at least 1 row, got 0"),
        ((queue, 0, keys[:, :2]), "keys: expected size 3 in dimension 1, got 2"),
        ((queue.astype(np.float64), 0, keys), "queue: expected dtype Float, .* got Double"),
        ((queue, 0, keys.astype(np.int64)), "keys: expected dtype Float, .* got Long"),
        ((queue, 0, keys.astype(">f2")), "keys: expected dtype Float, .* got UNKNOWN_SCALAR"),
    ):
        with pytest.raises(ValueError, match=message):
            native.enqueue(*arguments)
