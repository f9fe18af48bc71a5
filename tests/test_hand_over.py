"""Gradients of features reach their parameters on a CPU as the tensors that the forward pass has made, uncopied."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contrastive import unit_rows
from memory import leave_out_onednn, linux_only, peak_mb
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels.ops import panels

LOSSES: dict[str, Callable[..., Tensor]] = {
    "sigmoid": lambda x, y: K.sigmoid_contrastive_loss(x, y, 10.0, -10.0),
    "clip": lambda x, y: K.clip_loss(x, y, 20.0),
    "row_softmax": lambda x, y: K.row_softmax_loss(x, y, 20.0),
    "nt_xent": lambda x, y: K.nt_xent_loss(x, y, 0.1),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


def leaves_of(rows: int, width: int) -> list[Tensor]:
    return [unit_rows(rows, width).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("workspace_mb", [64, 0.1])
@pytest.mark.parametrize("rows", [40, 300])  # one call of C++, and panels
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@each_loss
def test_a_gradient_lies_as_its_parameter_does_and_is_not_copied(
    name: str, backend: str, rows: int, workspace_mb: float
) -> None:
    leaves, arrived = leaves_of(rows, 24), []
    for leaf in leaves:
        leaf.register_hook(lambda gradient: arrived.append((gradient.data_ptr(), gradient.stride())))
    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(workspace_mb):
        LOSSES[name](*leaves).backward()
    kept = [(leaf.grad.data_ptr(), leaf.stride()) for leaf in leaves if leaf.grad is not None]
    assert len(kept) == 2
    assert sorted(arrived) == sorted(kept)


@each_loss
def test_the_same_where_onednn_multiplies(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, what is by columns is transposed until all tiles are added."""
    found = []
    for onednn in (False, True):
        monkeypatch.setattr(panels, "onednn_is_faster", lambda onednn=onednn: onednn)
        torch.manual_seed(0)
        leaves = leaves_of(300, 100)  # wider than the block that turns it back
        with ssl_kernels.use_workspace(0.1):
            LOSSES[name](*leaves).backward()
        found.append([leaf.grad for leaf in leaves])
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(a, b)
        assert b.is_contiguous()


@pytest.mark.parametrize("options", [{"retain_graph": True}, {"create_graph": True}])
@each_loss
def test_a_gradient_that_can_be_asked_for_again_is_not_overwritten(name: str, options: dict[str, Any]) -> None:
    leaves = leaves_of(300, 24)
    loss = LOSSES[name](*leaves)
    once = torch.autograd.grad(loss, leaves, torch.tensor(3.0), **options)
    again = torch.autograd.grad(loss, leaves, torch.tensor(3.0))
    for a, b in zip(once, again, strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("by", ["is_grads_batched", "vmap"])
@each_loss
def test_batched_upstream_gradients_do_not_overwrite_it(name: str, by: str) -> None:
    leaves = leaves_of(300, 24)
    loss, upstream = LOSSES[name](*leaves), torch.tensor([1.0, -2.0])
    if by == "vmap":
        batched = torch.func.vmap(lambda u: torch.autograd.grad(loss, leaves, u))(upstream)
    else:
        batched = torch.autograd.grad(loss, leaves, upstream, is_grads_batched=True)
    alone = torch.autograd.grad(LOSSES[name](*leaves), leaves)
    for a, b in zip(batched, alone, strict=True):
        torch.testing.assert_close(a, torch.stack([b, -2 * b]))


@linux_only
@pytest.mark.parametrize("name", ["sigmoid", "clip", "row_softmax"])
def test_peak_memory_is_that_of_the_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_out_onednn(monkeypatch)
    leaves = leaves_of(256, 8192)
    with ssl_kernels.use_workspace(4), ssl_kernels.use_tile_budget(0):
        peak = peak_mb(lambda: LOSSES[name](*leaves).backward(), calls=2)
    assert peak < 1.25 * 2 * 8
