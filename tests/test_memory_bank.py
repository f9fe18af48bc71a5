"""The memory bank beside lightly's own: what it returns, and the faults that it does not share."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.integrations.lightly import MemoryBankModule


def lightly_bank() -> Any:
    return pytest.importorskip("lightly.models.modules.memory_bank", reason="lightly is not installed").MemoryBankModule


def pair(**options: Any) -> tuple[MemoryBankModule, Any]:
    ours, theirs = MemoryBankModule(size=(24, 6), **options), lightly_bank()(size=(24, 6), **options)
    ours.load_state_dict({"bank": theirs.bank, "bank_ptr": theirs.bank_ptr})
    return ours, theirs


@pytest.mark.parametrize("feature_dim_first", [True, False])
def test_returns_what_lightly_returns(feature_dim_first: bool) -> None:
    """Where the batch divides the bank, and lightly's loses no row."""
    ours, theirs = pair(feature_dim_first=feature_dim_first)
    for step in range(9):
        output = torch.randn(8, 6, requires_grad=True)
        update = step % 3 != 1
        a, b = ours(output, None, update), theirs(output, None, update)
        assert a[0] is b[0] is output
        assert torch.equal(a[1], b[1])
        assert a[1].shape == ((6, 24) if feature_dim_first else (24, 6))
        assert torch.equal(ours.bank, theirs.bank)
        assert torch.equal(ours.bank_ptr, theirs.bank_ptr)


@pytest.mark.parametrize("name", ["__init__", "forward"])
def test_has_the_same_signature(name: str) -> None:
    def signature(kind: Any) -> list[tuple[str, Any]]:
        return [(p.name, p.default) for p in inspect.signature(getattr(kind, name)).parameters.values()]

    assert signature(MemoryBankModule) == signature(lightly_bank())


@pytest.mark.parametrize("size", [0, (0, 6)])
def test_a_disabled_bank(size: Any) -> None:
    output = torch.randn(3, 6)
    for bank in (MemoryBankModule(size), lightly_bank()(size)):
        assert bank(output, update=True) == (output, None)


@pytest.mark.parametrize("size", [5, -1, (3, -2), (1, 2, 3)])
def test_an_illegal_size(size: Any) -> None:
    with pytest.raises(ValueError, match="size: expected \\(rows, features\\), or 0 to disable the memory bank, got"):
        MemoryBankModule(size)
    with pytest.raises(ValueError, match="size"):
        lightly_bank()(size)


def test_no_row_is_lost_at_the_wrap_around() -> None:
    """lightly's drops what does not fit before the end."""
    ours, theirs = pair()
    batches = torch.randn(3, 10, 6)
    for batch in batches:
        ours(batch, update=True)
        theirs(batch, update=True)
    assert torch.equal(ours.bank[:6], batches[2, 4:])
    assert not torch.equal(theirs.bank[:6], batches[2, 4:])
    assert ours.bank_ptr.item() == 6


def test_a_checkpoint_holds_the_bank() -> None:
    ours, theirs = pair()
    ours(torch.randn(5, 6), update=True)
    assert set(ours.state_dict()) == {"bank", "bank_ptr"}
    assert not theirs.state_dict()
    other = MemoryBankModule(size=(24, 6))
    other.load_state_dict(ours.state_dict())
    assert torch.equal(other.bank, ours.bank)
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(other.bank, ours.bank)


def test_two_losses_before_one_backward_pass() -> None:
    """A symmetric loss updates the bank twice before it differentiates through what the first call returned."""
    ours, theirs = pair()
    views = F.normalize(torch.randn(2, 8, 6), dim=-1).requires_grad_()

    def loss(bank: Any) -> Tensor:
        total = torch.zeros(())
        for query, key in ((views[0], views[1]), (views[1], views[0])):
            _, negatives = bank(key, update=True)
            total = total + torch.logsumexp(query @ negatives / 0.1, 1).sum()
        return total

    gradients = [torch.autograd.grad(loss(bank), views)[0] for bank in (ours, theirs)]
    assert torch.equal(*gradients)


def test_ntxent_loss_with_a_memory_bank() -> None:
    """lightly's NTXentLoss over its bank is InfoNCE over a queue."""
    ntx_ent = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    criterion = ntx_ent.NTXentLoss(temperature=0.1, memory_bank_size=(64, 8))
    queue, pointer = criterion.memory_bank.bank.clone(), torch.tensor(0)
    for _ in range(4):
        query, key = torch.randn(16, 8, requires_grad=True), torch.randn(16, 8)
        theirs = criterion(query, key)
        key = F.normalize(key, dim=1)
        ours = K.info_nce_loss(F.normalize(query, dim=1), key, queue, 1 / 0.1)
        K.enqueue_(queue, pointer, key)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        gradients = [torch.autograd.grad(loss, query)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
