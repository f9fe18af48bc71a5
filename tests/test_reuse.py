"""Memory of large outputs is given out again once it is free, and never before."""

from __future__ import annotations

import pickle
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.ops import reuse
from ssl_kernels.ops.reuse import empty

SHAPE = (2**20 + 3,)  # just above what is held
LIKE = torch.empty(0)


@pytest.fixture(autouse=True)
def _nothing_held() -> None:
    reuse._held.clear()


def test_free_memory_is_given_out_again() -> None:
    first = empty(SHAPE, LIKE)
    address = first.data_ptr()
    del first
    again = empty((4, 2**18), LIKE)
    assert again.data_ptr() == address
    assert again.data_ptr() % 64 == 0
    assert again.is_contiguous()
    assert again.dtype == torch.float32


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t,
        lambda t: t[5:7],
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: [t.view(-1, 1)],
        lambda t: t.untyped_storage(),
        lambda t: memoryview(t.numpy())[1:],
        lambda t: t.__dlpack__(),
        lambda t: torch.from_dlpack(t),
        lambda t: t.new_empty(0).set_(t),
    ],
    ids=["tensor", "view", "detached", "numpy", "list", "storage", "buffer", "capsule", "dlpack", "set"],
)
def test_memory_in_use_is_not(use: Callable[[Tensor], object]) -> None:
    first = empty(SHAPE, LIKE)
    address, user = first.data_ptr(), use(first)
    del first
    assert empty(SHAPE, LIKE).data_ptr() != address
    del user
    assert empty(SHAPE, LIKE).data_ptr() == address


def test_who_else_refers_to_the_memory_makes_no_difference() -> None:
    """References are not counted: without Python's global lock a count says little."""
    address = empty(SHAPE, LIKE).data_ptr()
    reference = reuse._held[0].bytes
    assert empty(SHAPE, LIKE).data_ptr() == address
    del reference


def test_a_tensor_sent_to_another_process_leaves_its_memory() -> None:
    """As a DataLoader's worker does; a pickle is a copy."""
    sent, pickled = empty(SHAPE, LIKE).fill_(1.0), pickle.dumps(empty((4,), LIKE).fill_(2.0))
    address = sent.data_ptr()
    ForkingPickler.dumps(sent)  # moves the storage to shared memory
    again = empty(SHAPE, LIKE).fill_(3.0)
    assert again.data_ptr() == address
    assert sent.unique().tolist() == [1.0]
    assert pickle.loads(pickled).tolist() == 4 * [2.0]


def test_another_size_gets_memory_of_its_own() -> None:
    small = empty(SHAPE, LIKE).data_ptr()
    assert empty((4 * SHAPE[0],), LIKE).data_ptr() != small
    assert empty(SHAPE, LIKE.double()).element_size() == 8


def test_no_more_than_a_few_are_held() -> None:
    outputs = [empty((SHAPE[0] + i,), LIKE) for i in range(9)]
    assert len(reuse._held) == 4
    assert len({t.data_ptr() for t in outputs}) == 9


def test_small_outputs_are_plain_tensors() -> None:
    empty((1000,), LIKE)
    assert not reuse._held


def test_a_tile_budget_of_zero_lets_go() -> None:
    memory = empty(SHAPE, LIKE).untyped_storage()
    del memory
    held = reuse._held[0].bytes
    with ssl_kernels.use_tile_budget(0):
        empty(SHAPE, LIKE)
    assert not reuse._held
    assert sys.getrefcount(held) == 2


def test_gradients_of_two_steps_do_not_share_memory_while_both_live() -> None:
    student, teacher = torch.randn(3, 4, 2**17), torch.randn(2, 4, 2**17)
    gradients = []
    for _ in range(3):
        leaf = student.clone().requires_grad_()
        K.dino_loss(leaf, teacher).backward()
        gradients.append(leaf.grad)
    assert len({g.data_ptr() for g in gradients}) == 3
    assert all(torch.equal(g, gradients[0]) for g in gradients)


def test_accumulated_gradients_survive_the_next_step() -> None:
    """What .backward() adds to must not be what the next forward pass writes to."""
    student, teacher = torch.randn(3, 4, 2**17), torch.randn(2, 4, 2**17)
    once, twice = student.clone().requires_grad_(), student.clone().requires_grad_()
    K.dino_loss(once, teacher).backward()
    for _ in range(2):
        K.dino_loss(twice, teacher).backward()
    torch.testing.assert_close(twice.grad, 2 * once.grad)


def test_a_graph_that_is_kept_and_gradients_that_hooks_keep() -> None:
    student, teacher = torch.randn(3, 4, 2**17), torch.randn(2, 4, 2**17)
    once, leaf = (student.clone().requires_grad_() for _ in range(2))
    K.dino_loss(once, teacher).backward()
    seen: list[Tensor] = []
    leaf.register_hook(seen.append)
    loss = K.dino_loss(leaf, teacher)
    for keep in (True, True, False):
        loss.backward(retain_graph=keep)
        K.dino_loss(student.clone().requires_grad_(), teacher).backward()  # another step in between
    torch.testing.assert_close(leaf.grad, 3 * once.grad)
    assert len(seen) == 3
    for gradient in seen[:2]:  # .backward() adds to the first, as it does in plain PyTorch
        assert gradient is leaf.grad or torch.equal(gradient, once.grad)


def test_threads_do_not_share_memory() -> None:
    """Each makes steps of its own numbers at the same time, and meets no others in its gradients."""
    steps, threads = 4, 2
    barrier = threading.Barrier(threads)
    students, teacher = torch.randn(threads, 3, 4, 2**17), torch.randn(2, 4, 2**17)

    def gradients(student: Tensor) -> list[Tensor]:
        found = []
        for _ in range(steps):
            leaf = student.clone().requires_grad_()
            loss = K.dino_loss(leaf, teacher)
            barrier.wait(60)
            loss.backward()
            assert leaf.grad is not None
            found.append(leaf.grad.double().square().sum())
        return found

    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(gradients, students))
    for student, sums in zip(students, found, strict=True):
        leaf = student.clone().requires_grad_()
        K.dino_loss(leaf, teacher).backward()
        assert leaf.grad is not None
        assert sums == steps * [leaf.grad.double().square().sum()]


def test_an_output_that_varies_has_one_memory() -> None:
    """As the gradient of iBOT's patches, of which there are more or fewer in each step."""
    for rows in (4, 5, 4, 6, 7):
        empty((rows, 2**20), LIKE)
        assert len(reuse._held) == 1
    in_use = empty((7, 2**20), LIKE)
    empty((8, 2**20), LIKE)
    assert len(reuse._held) == 2
    del in_use
