"""Where the queue's pointer may stand, and a momentum that the host cannot check, emulated."""

from __future__ import annotations

import itertools

import pytest
import torch
from emulation import load_ops

from ssl_kernels.ops import queue


@pytest.mark.parametrize("start", [-1, -3, -12, -(2**40), -(2**52), 12, 30, 2**40 + 1, 2**52 - 1])
def test_a_pointer_outside_of_the_queue(start: int) -> None:
    """Blocks count their tickets above its bits, whatever its sign."""
    emulator = load_ops()
    for size, batch in itertools.product((1, 5, 12, 100), (0, 3, 60)):
        rows, pointer = torch.zeros(size, 2), torch.tensor(start)
        expected, at = rows.clone(), pointer.clone()
        keys = torch.arange(1.0, 2 * batch + 1).view(batch, 2)
        queue.reference(expected, at, keys, False)
        with emulator.order(size + batch):
            torch.ops.ssl_kernels_emulated.enqueue_cuda_(rows, pointer, keys, False)
        assert torch.equal(rows, expected)
        assert torch.equal(pointer, at)


def test_as_many_tickets_as_there_are_blocks() -> None:
    emulator = load_ops()
    rows, pointer, keys = torch.zeros(9000, 1), torch.tensor(-(2**52)), torch.arange(8200.0)[:, None]
    with emulator.order(3):
        torch.ops.ssl_kernels_emulated.enqueue_cuda_(rows, pointer, keys, False)
    assert pointer.item() == (8200 - 2**52) % 9000
    assert torch.equal(rows.roll(-(-(2**52) % 9000), 0)[:8200], keys)


def test_no_momentum_that_is_nan_goes_unseen() -> None:
    """On a device nobody can raise an error for it; equal numbers are no exception."""
    load_ops()
    target, source = torch.tensor([1.0, 2.0, torch.inf]), torch.tensor([1.0, 3.0, torch.inf])
    for dtype in (torch.float32, torch.float64):
        t = target.clone()
        momentum = torch.tensor(torch.nan, dtype=dtype)
        torch.ops.ssl_kernels_emulated.ema_update_cuda_([t], [source], [], 0.5, momentum)
        assert t.isnan().all()


def test_a_bad_momentum_is_refused() -> None:
    load_ops()
    x, y = torch.zeros(2, 3)
    for momentum, message in (
        (torch.tensor(0.5).half(), "device_momentum: expected dtype Float or Double, got Half"),
        (torch.tensor([0.5, 0.5]), "device_momentum: expected one element, got 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.ssl_kernels_emulated.ema_update_cuda_([x], [y], [], 0.5, momentum)
