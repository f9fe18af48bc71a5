"""The torch-free kernel of the moving average on NumPy arrays, on every instruction set of this machine."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

native = pytest.importorskip("ssl_kernels._native", reason="the wheel was built by another version of Python")
ISAS = native.build_info()["available_isas"]
KINDS = ("float32", "float16", "bfloat16")


def pack(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bfloat16":
        return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return values.astype(kind)


def unpack(values: np.ndarray, kind: str) -> np.ndarray:
    return (values.astype(np.uint32) << 16).view(np.float32) if kind == "bfloat16" else values.astype(np.float32)


entries = st.tuples(
    st.one_of(st.integers(0, 70), st.integers(1000, 1100)),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
    st.sampled_from(KINDS),
)


@pytest.mark.parametrize("isa", ISAS)
@given(
    drawn=st.lists(entries, max_size=6),
    copied=st.integers(0, 6),
    momentum=st.one_of(st.sampled_from([0.0, 0.999, 1.0]), st.floats(0, 1)),
    parts=st.sampled_from([1, 2, 3, 40]),
    seed=st.integers(0, 2**16),
)
def test_follows_the_equation(isa: str, drawn: list[Any], copied: int, momentum: float, parts: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    targets, sources = (
        [pack(rng.normal(size=entry[0]).astype(np.float32), entry[which]) for entry in drawn] for which in (1, 2)
    )
    copies = [pack(np.full(entry[0], 7, np.float32), entry[3]) for entry in drawn[:copied]]
    expected = [
        momentum * unpack(target, entry[1]).astype(np.float64) + (1 - momentum) * unpack(source, entry[2])
        for target, source, entry in zip(targets, sources, drawn, strict=True)
    ]
    native.ema_update(targets, sources, momentum, copies, parts, isa)
    for target, there, (_, kind, _, _) in zip(targets, expected, drawn, strict=True):
        eps = {"float32": 2e-7, "float16": 2**-11, "bfloat16": 2**-8}[kind]
        # What is lost where target and source cancel is a rounding of these, which are at most about 5.
        np.testing.assert_allclose(unpack(target, kind), there, rtol=eps, atol=1e-6)
    for copy, target, (_, kind, _, copy_kind) in zip(copies, targets, drawn, strict=False):
        np.testing.assert_array_equal(copy, pack(unpack(target, kind), copy_kind))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_the_ends_are_exact_for_every_16_bit_pattern(isa: str, kind: str, momentum: float) -> None:
    patterns = np.arange(65536, dtype=np.uint16)
    if kind == "float32":
        bits = patterns.astype(np.uint32) << 16
        target, source = bits.view(np.float32).copy(), bits[::-1].copy().view(np.float32)
    else:
        dtype = np.float16 if kind == "float16" else np.uint16
        target, source = patterns.view(dtype).copy(), patterns[::-1].copy().view(dtype)
    wanted = (target if momentum else source).copy()
    native.ema_update([target], [source], momentum, isa=isa)
    numbers = ~np.isnan(unpack(wanted, kind))
    np.testing.assert_array_equal(np.isnan(unpack(target, kind)), ~numbers)
    integers = np.uint32 if kind == "float32" else np.uint16
    np.testing.assert_array_equal(target.view(integers)[numbers], wanted.view(integers)[numbers])


def test_bad_arrays_are_named() -> None:
    a, b = np.zeros((4, 3), np.float32), np.ones((4, 3), np.float32)
    for arguments, message in (
        (([a], [], 0.5), "sources: expected 1 tensors, got 0"),
        (([a], [b], 0.5, [b.copy(), b.copy()]), "copies: expected at most 1 tensors, got 2"),
        (([a], [b], 1.5), r"momentum: expected a number in \[0, 1\], got 1.5"),
        (([a], [b], 0.5, [], 0), "parts: expected at least 1, got 0"),
        (([a[:, :2]], [b], 0.5), r"targets\[0\]: expected a contiguous tensor"),
        (([a], [b[:2]], 0.5), r"sources\[0\]: expected the shape of targets\[0\]"),
        (([a], [b], 0.5, [b.T]), r"copies\[0\]: expected a contiguous tensor"),
        (([a], [a[::-1][::-1]], 0.5, [a]), r"copies\[0\]: expected memory of its own"),
        (([a.astype(np.float64)], [b], 0.5), "targets: expected dtype Float, .* got Double"),
    ):
        with pytest.raises(ValueError, match=message):
            native.ema_update(*arguments)
    assert not a.any()
