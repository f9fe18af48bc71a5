"""The CUDA ops, emulated, against the definitions in float64, in many orders of blocks and threads."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contrastive import lay_out, layouts
from emulation import Emulator, address_environment, build_ops, load_ops
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from ssl_kernels.ops import ema, queue

SANITIZER = os.environ.get("SSL_KERNELS_EMULATION", "races")
IS_THOROUGH = hypothesis_settings.default.max_examples > 100  # in make test-all
ORDERS = range(1) if SANITIZER == "address" else range(20) if IS_THOROUGH else range(8)
TIMEOUT_S = 600
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {4: torch.int32, 2: torch.int16}

orders = st.integers(1, 2**31)


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return load_ops(SANITIZER)


def view_of(values: Tensor, offset: int) -> Tensor:
    """The values behind `offset` elements of 7, at the very end of their memory."""
    return torch.cat([torch.full((offset,), 7.0), values.float()]).to(values.dtype)[offset:]


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(INTEGERS[t.element_size()])


# ---- the moving average of a list


def update(targets: list[Tensor], sources: list[Tensor], copies: list[Tensor], m: float, on_device: bool) -> None:
    momentum = torch.tensor(m, dtype=torch.float64) if on_device else None
    torch.ops.ssl_kernels_emulated.ema_update_cuda_(targets, sources, copies, 0.5 if on_device else m, momentum)


def check_update(
    emulator: Emulator, seeds: range | list[int], targets: list[Tensor], sources: list[Tensor], copies: list[Tensor],
    m: float, on_device: bool = False,
) -> None:  # fmt: skip
    """No worse than twice plain arithmetic of the same dtypes, and every order gives the same bits."""
    momentum = torch.tensor(m, dtype=torch.float64)
    plain, there = [t.clone() for t in targets], [t.double() for t in targets]
    ema.reference(plain, sources, [], momentum)
    ema.reference(there, [s.double() for s in sources], [], momentum)
    starts = [t.clone() for t in (*targets, *copies)]
    first: list[Tensor] = []
    for seed in seeds:
        for t, start in zip((*targets, *copies), starts, strict=True):
            t.copy_(start)
        with emulator.order(seed):
            update(targets, sources, copies, m, on_device)
        results = [bits(t) for t in (*targets, *copies)]
        first = first or [t.clone() for t in results]
        assert all(map(torch.equal, results, first))
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.numel():
            allowed = 2 * (plain[i].double() - there[i]).abs().max()
            allowed += 3e-7 * (there[i].abs().max() + source.double().abs().max())
            assert (target.double() - there[i]).abs().max() <= allowed
        if i < len(copies):
            assert torch.equal(bits(copies[i]), bits(target.to(copies[i].dtype)))
    for t in (*targets, *copies):
        if t._base is not None:
            assert (t._base[: t.storage_offset()] == 7).all()


@pytest.mark.parametrize("size", [1, 2, 7, 16, 67, 8193])
def test_every_mix_of_types_in_one_launch(emulator: Emulator, size: int) -> None:
    """Of targets, sources and copies; alike and differently past a whole vector."""
    mixes = [*itertools.product(DTYPES, DTYPES, DTYPES), *itertools.product(DTYPES, DTYPES)]
    for offset, other in [(0, 0), (1, 1), (3, 3), (2, 5)] if size < 1000 else [(5, 5)]:
        targets = [view_of(torch.randn(size).to(mix[0]), offset) for mix in mixes]
        sources = [view_of(torch.randn(size).to(mix[1]), other) for mix in mixes]
        copies = [view_of(torch.zeros(size, dtype=mix[2]), offset) for mix in mixes if len(mix) == 3]
        launches = emulator.launches
        seeds = ORDERS[:: 4 if size > 1000 else 1] if offset else ORDERS[:2]
        check_update(emulator, list(seeds), targets, sources, copies, 0.75)
        assert emulator.launches == launches + len(seeds)


@hypothesis_settings(max_examples=50 if SANITIZER == "races" else 25)
@given(
    entries=st.lists(
        st.tuples(
            st.integers(0, 300), st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.sampled_from(DTYPES),
            st.integers(0, 8), st.integers(0, 8), st.integers(0, 8),
        ),
        min_size=1, max_size=6,
    ),
    n_copies=st.integers(0, 6), m=st.one_of(st.sampled_from([0.0, 0.999, 1.0]), st.floats(0, 1)),
    on_device=st.booleans(), order=orders,
)  # fmt: skip
def test_updates_any_list(
    emulator: Emulator, entries: list[tuple[int, torch.dtype, torch.dtype, torch.dtype, int, int, int]], n_copies: int,
    m: float, on_device: bool, order: int,
) -> None:  # fmt: skip
    torch.manual_seed(order)
    targets = [view_of(torch.randn(size).to(dtype), offset) for size, dtype, _, _, offset, _, _ in entries]
    sources = [view_of(torch.randn(size).to(dtype), offset) for size, _, dtype, _, _, offset, _ in entries]
    copies = [view_of(torch.zeros(size, dtype=dtype), offset) for size, _, _, dtype, _, _, offset in entries]
    check_update(emulator, [order], targets, sources, copies[:n_copies], m, on_device)


def test_more_tensors_than_the_parameters_of_a_launch_hold(emulator: Emulator) -> None:
    """Some of them empty; each launch is as full as it can be."""
    sizes = [i % 7 for i in range(700)]
    targets, sources = ([torch.randn(size) for size in sizes] for _ in range(2))
    copies = [torch.zeros(size, dtype=torch.bfloat16) for size in sizes[:333]]
    launches = emulator.launches
    orders = ORDERS[:4]  # what differs between launches is what they are given
    check_update(emulator, orders, targets, sources, copies, 0.9)
    per_update = (emulator.launches - launches) / len(orders)
    assert 3 <= per_update <= 600 / 90


def test_large_tensors_take_several_blocks(emulator: Emulator) -> None:
    sizes = [40_000, 3, 8192, 16_383]
    targets, sources = ([view_of(torch.randn(size), 1) for size in sizes] for _ in range(2))
    check_update(emulator, ORDERS, targets, sources, [view_of(torch.zeros(40_000), 1).half()], 0.996)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("m", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ends_are_exact(emulator: Emulator, dtype: torch.dtype, m: float, on_device: bool) -> None:
    special = [0.0, -0.0, 1.5, torch.inf, -torch.inf, torch.nan, 6e4, 1e-7]
    pairs = torch.tensor(list(itertools.product(special, repeat=2)), dtype=dtype)
    target, source = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    wanted, beside = (target if m else source).clone(), torch.zeros(64, dtype=dtype)
    with emulator.order(1):
        update([target], [source], [beside], m, on_device)
    assert torch.equal(bits(target), bits(wanted))
    assert torch.equal(bits(beside), bits(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_come_through(emulator: Emulator, dtype: torch.dtype) -> None:
    target = torch.tensor([torch.nan, 1.0, torch.inf, torch.inf, 1.0, -torch.inf, torch.inf], dtype=dtype)
    source = torch.tensor([1.0, torch.nan, -torch.inf, 1.0, -torch.inf, -torch.inf, torch.inf], dtype=dtype)
    with emulator.order(1):
        update([target], [source], [], 0.5, False)
    assert target[:3].isnan().all()
    assert not target[3:5].isfinite().any()
    assert target[5:].tolist() == [-torch.inf, torch.inf]


def test_nothing_is_launched_for_nothing(emulator: Emulator) -> None:
    launches = emulator.launches
    update([torch.empty(0)], [torch.empty(0)], [torch.empty(0)], 0.5, True)
    assert emulator.launches == launches


def test_a_bad_list_is_refused(emulator: Emulator) -> None:
    x, y = torch.zeros(2, 4)
    launches = emulator.launches
    for targets, sources, copies, message in (
        ([x], [], [], "sources: expected 1 tensors, got 0"),
        ([x], [y], [y.clone(), y.clone()], "copies: expected at most 1 tensors, got 2"),
        ([x], [y[:3]], [], r"sources\[0\]: expected"),
        ([torch.zeros(4, 2)[:, 0]], [y], [], r"targets\[0\]: expected a contiguous tensor"),
        ([x, x], [y, y], [], r"targets\[1\]: expected memory of its own, got an overlap with targets\[0\]"),
        ([x.long()], [y], [], "targets: expected dtype Float, BFloat16 or Half, got Long"),
    ):
        with pytest.raises(RuntimeError, match=message):
            update(targets, sources, copies, 0.5, False)
    with pytest.raises(RuntimeError, match=r"momentum: expected a number in \[0, 1\], got 1.5"):
        update([x], [y], [], 1.5, False)
    assert emulator.launches == launches


# ---- the queue


def check_enqueue(
    emulator: Emulator, seeds: range | list[int], values: Tensor, gap: int, start: int, keys: Tensor, normalize: bool
) -> None:
    """Equal to the definition, but for the last digits of what is normalised, and the same bits in every order."""
    size, width = values.shape
    storage = torch.cat([values, torch.full((size, gap), 7.0, dtype=values.dtype)], dim=1)
    there, plain, pointer = values.double(), values.clone(), torch.tensor(start)
    queue.reference(there, pointer.clone(), keys.double(), normalize)
    queue.reference(plain, pointer, keys, normalize)
    first = None
    for seed in seeds:
        written, at = storage.clone(), torch.tensor(start)
        with emulator.order(seed):
            torch.ops.ssl_kernels_emulated.enqueue_cuda_(written[:, :width], at, keys, normalize)
        assert at.item() == pointer.item()
        first = written if first is None else first
        assert torch.equal(bits(written), bits(first))
    assert first is not None
    assert (first[:, width:] == 7).all()
    ours = first[:, :width]
    if not normalize:
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)
    elif ours.numel():
        allowed = 2 * (plain.double() - there).abs().max() + 3e-7 * there.abs().max()
        assert (ours.double() - there).abs().max() <= allowed


@pytest.mark.parametrize(("queue_dtype", "key_dtype"), itertools.product(DTYPES, repeat=2))
@pytest.mark.parametrize("normalize", [False, True])
def test_a_batch_wraps_around(
    emulator: Emulator, queue_dtype: torch.dtype, key_dtype: torch.dtype, normalize: bool
) -> None:
    """Of three blocks, of rows in vectors, with and without whole ones, and of more keys than the queue has rows."""
    for size, width, batch, gap in ((40, 24, 19, 0), (40, 13, 19, 3), (18, 67, 41, 1)):
        keys = torch.randn(batch, width).to(key_dtype)
        seeds = list(ORDERS) if width == 13 else [0, 1]
        check_enqueue(emulator, seeds, torch.randn(size, width).to(queue_dtype), gap, 30, keys, normalize)


@hypothesis_settings(max_examples=60 if SANITIZER == "races" else 30)
@given(
    size=st.integers(1, 12), width=st.integers(0, 70), batch=st.integers(0, 40), start=st.integers(-3, 30),
    queue_dtype=st.sampled_from(DTYPES), key_dtype=st.sampled_from(DTYPES), layout=layouts, gap=st.integers(0, 5),
    normalize=st.booleans(), order=orders,
)  # fmt: skip
def test_enqueues_any_batch(
    emulator: Emulator, size: int, width: int, batch: int, start: int, queue_dtype: torch.dtype,
    key_dtype: torch.dtype, layout: str, gap: int, normalize: bool, order: int,
) -> None:  # fmt: skip
    torch.manual_seed(order)
    keys = lay_out(torch.randn(batch, width).to(key_dtype), layout)
    check_enqueue(emulator, [order], torch.randn(size, width).to(queue_dtype), gap, start, keys, normalize)


@pytest.mark.parametrize("start", [-5 * 2**40 - 4, -1, 0, 10, 11, 2**50])
def test_the_pointer_may_be_any_number(emulator: Emulator, start: int) -> None:
    check_enqueue(emulator, [0, 1, 2], torch.randn(11, 5), 0, start, torch.randn(17, 5), False)
    check_enqueue(emulator, [0, 1, 2], torch.randn(11, 5), 0, start, torch.randn(3, 5), False)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_keys_and_rows_that_start_anywhere(emulator: Emulator, offset: int) -> None:
    """Rows of odd strides are each past a whole vector by another number, that of the key or not."""
    for key_offset in (offset, 3):
        keys = torch.randn(9, 33 + key_offset).half()[:, key_offset:]
        for normalize in (False, True):
            check_enqueue(emulator, list(ORDERS)[:5], torch.randn(11, 33).half(), offset, 7, keys, normalize)


def test_more_keys_than_blocks_can_have_each_of_their_own(emulator: Emulator) -> None:
    keys = torch.arange(9000.0)[:, None]
    check_enqueue(emulator, [0, 1], torch.zeros(9001, 1), 0, 8000, keys, False)


def test_batches_follow_each_other(emulator: Emulator) -> None:
    rows, pointer, count = torch.full((7, 3), -1.0), torch.tensor(0), 0
    expected = rows.clone()
    for batch in (3, 0, 7, 2, 11, 1, 5):
        keys = torch.arange(count, count + batch, dtype=torch.float32)[:, None].expand(batch, 3)
        for key in range(count, count + batch):
            expected[key % 7] = key
        count += batch
        with emulator.order(count):
            torch.ops.ssl_kernels_emulated.enqueue_cuda_(rows, pointer, keys, False)
        assert torch.equal(rows, expected)
        assert pointer.item() == count % 7


@pytest.mark.parametrize("queue_dtype", DTYPES)
def test_small_and_odd_norms(emulator: Emulator, queue_dtype: torch.dtype) -> None:
    keys = torch.stack([torch.zeros(5), torch.full((5,), 1e-15), torch.full((5,), torch.nan), torch.full((5,), 1e10)])
    keys[2, 1:] = 0
    rows, plain = torch.full((2, 4, 5), 7.0).to(queue_dtype)
    with emulator.order(1):
        torch.ops.ssl_kernels_emulated.enqueue_cuda_(rows, torch.tensor(0), keys, True)
    queue.reference(plain, torch.tensor(0), keys, True)
    torch.testing.assert_close(rows, plain, equal_nan=True)
    assert rows[2].isnan().all()


def test_a_bad_batch_is_refused(emulator: Emulator) -> None:
    launches = emulator.launches
    rows, pointer = torch.zeros(3, 4), torch.tensor(0)
    for written, at, keys, message in (
        (rows, pointer, torch.zeros(2, 5), "keys: expected size 4 in dimension 1, got 5"),
        (rows[:0], pointer, torch.zeros(2, 4), "queue: expected at least 1 row, got 0"),
        (torch.zeros(4, 3).t(), pointer, torch.zeros(2, 4), "queue: expected unit stride along columns, got 3"),
        (rows[:1].expand(3, 4), pointer, torch.zeros(2, 4), "queue: expected rows that do not overlap, got stride 0"),
        (rows, pointer.int(), torch.zeros(2, 4), "pointer: expected one int64 element"),
        (rows, pointer, torch.zeros(2, 4).long(), "keys: expected dtype Float, BFloat16 or Half, got Long"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.ssl_kernels_emulated.enqueue_cuda_(written, at, keys, False)
    assert emulator.launches == launches


# ---- the very tests of the public functions


@pytest.mark.skipif(SANITIZER == "address", reason="once is enough")
def test_the_kernels_pass_the_tests_of_the_ops(emulator: Emulator) -> None:
    """Those that name the CPU's kernel, for which this one stands in."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider"]
    files = ("test_ema_update.py", "test_queue.py")
    command += ["-p", "as_cuda", "-k", "cpu and not opcheck", *(str(here.parent / file) for file in files)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        command, cwd=here.parents[1], capture_output=True, text=True, timeout=TIMEOUT_S, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for file in files:
        assert int(re.findall(rf"{file}: (\d+) passed", done.stdout)[-1]) >= 7
        assert int(re.findall(rf"{file}: .* (\d+) launches", done.stdout)[-1]) >= 15


# ---- all of it again


@pytest.mark.skipif(SANITIZER == "address", reason="this is that run")
def test_no_access_is_out_of_bounds() -> None:
    build_ops("address")  # here: a compiler would be slow under the sanitizer
    command = [sys.executable, "-m", "pytest", "-qs", "--no-header", "--tb=short", "-p", "no:cacheprovider", __file__]
    command += ["--hypothesis-profile=brief", "--each-once"]
    environment = {**address_environment(), "SSL_KERNELS_EMULATION": "address"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
