"""Ctrl-C during a long kernel on the CPU: it waits for one range of rows, not for all."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.ops import dino, hand_over, sinkhorn
from ssl_kernels.ops.spans import spans

ROWS = torch.zeros(1, 1024).expand(2**21, 1024)  # seconds of work on a few kilobytes of memory
RUNS = {
    "dino": lambda: K.dino_loss([ROWS, ROWS], [ROWS]),
    "ibot": lambda: K.ibot_patch_loss(ROWS, ROWS, torch.ones(1).expand(2**21)),
    "sinkhorn": lambda: K.sinkhorn_center(ROWS, 0.05, n_iterations=2),
}


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Raises KeyboardInterrupt, also where the tests run in the background and SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges of rows that were begun."""
    seen = []

    def watched(rows: int, elements: int) -> Iterator[tuple[int, int]]:
        for span in spans(rows, elements):
            seen.append(span)
            yield span

    monkeypatch.setattr(dino, "spans", watched)
    monkeypatch.setattr(sinkhorn, "spans", watched)
    return seen


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.usefixtures("ctrl_c")
def test_a_kernel_of_seconds_lets_go(run: Callable[[], Tensor], begun: list[tuple[int, int]]) -> None:
    timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run()
    timer.join()
    assert 0 < begun[-1][1] < len(ROWS) / 2


@pytest.mark.usefixtures("ctrl_c")
def test_a_backward_pass_lets_go(monkeypatch: pytest.MonkeyPatch) -> None:
    student = torch.randn(9, 7, requires_grad=True)
    loss = K.ibot_patch_loss(student, torch.randn(9, 7))
    begun = []

    def interrupted(rows: int, _: int) -> Iterator[tuple[int, int]]:
        for row in range(rows):
            begun.append(row)
            if row == 3:
                signal.raise_signal(signal.SIGINT)
            yield row, row + 1

    monkeypatch.setattr(hand_over, "spans", interrupted)
    with pytest.raises(KeyboardInterrupt):
        (3 * loss).backward()
    assert begun == [0, 1, 2, 3]
    assert student.grad is None


def test_ranges_of_rows_give_what_all_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than a thread each, and a number that does not divide them."""
    student, teacher = torch.randn(3, 37, 50, dtype=torch.float16), torch.randn(2, 37, 50)

    def results() -> list[Tensor]:
        leaf = student.clone().requires_grad_()
        loss, teacher_sum = K.dino_loss(leaf, teacher, reduction="none", want_teacher_sum=True)
        loss.sum().backward()
        assert leaf.grad is not None
        return [loss.detach(), leaf.grad, teacher_sum, K.sinkhorn_knopp(teacher, 0.1)]

    expected = results()
    for step in (1, 16):

        def cut(rows: int, _: Any, step: int = step) -> Iterator[tuple[int, int]]:
            return ((begin, min(begin + step, rows)) for begin in range(0, rows, step))

        for module in (dino, hand_over, sinkhorn):
            monkeypatch.setattr(module, "spans", cut)
        for ours, whole in zip(results(), expected, strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)


def test_ranges_cover_all_rows_and_none_is_long() -> None:
    for rows, elements in ((0, 5), (1, 2**40), (2**21, 1024), (1000, 2**20), (7, 0)):
        found = list(spans(rows, elements))
        assert [begin for begin, _ in found] == [0, *(end for _, end in found)][: len(found)]
        assert rows == 0 or found[-1][1] == rows
        longest = max((end - begin for begin, end in found), default=0)
        assert longest <= 1 or longest * elements <= 2**23 * torch.get_num_threads()
