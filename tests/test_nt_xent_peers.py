"""The NT-Xent and SupCon losses beside the peers' own code: the same values and gradients."""

from __future__ import annotations

import pytest
import torch
from memory import saved_bytes
from peers import assert_same, assert_same_signature, value_and_gradients
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels import NTXentLoss


def views(batch: int = 48, width: int = 16) -> list[Tensor]:
    return [torch.randn(batch, width, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.5, 0.07, 0.01])
def test_lightly(temperature: float) -> None:
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    leaves = views()
    ours, theirs = (m(temperature=temperature)(*leaves) for m in (NTXentLoss, lightly.NTXentLoss))
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("batch", [16, 12])
def test_lightly_with_a_memory_bank(batch: int) -> None:
    """The same losses over several steps from the same bank, which is written only while training, after the loss.

    When a batch reaches the end of the bank, lightly drops what lies beyond it: the runs stop there.
    """
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    ours, theirs = (m(temperature=0.2, memory_bank_size=(64, 16)) for m in (NTXentLoss, lightly.NTXentLoss))
    assert ours.memory_bank is not None
    ours.memory_bank.keys.copy_(theirs.memory_bank.bank)
    for step in range(1, 64 // batch + 1):
        leaves = views(batch)
        for _ in range(2):  # evaluation leaves the bank alone
            with torch.no_grad():
                torch.testing.assert_close(ours(*leaves), theirs(*leaves), rtol=1e-5, atol=1e-6)
        assert_same(value_and_gradients(ours(*leaves), leaves), value_and_gradients(theirs(*leaves), leaves))
        torch.testing.assert_close(ours.memory_bank.keys, theirs.memory_bank.bank, rtol=1e-6, atol=1e-7)
        assert ours.memory_bank.pointer == step * batch % 64


@pytest.mark.parametrize("size", [(24, 16), (0, 16), (0,), 0])
def test_checkpoints_of_lightly_load(size: int | tuple[int, ...]) -> None:
    """They hold no bank, which is left as it is. lightly's own has no place for ours."""
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    ours, theirs = (nn.ModuleDict({"criterion": m(memory_bank_size=size)}) for m in (NTXentLoss, lightly.NTXentLoss))
    ours["criterion"](*views(batch=4))
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    ours.load_state_dict(theirs.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    names = ["criterion.memory_bank.keys", "criterion.memory_bank.pointer"] if size == (24, 16) else []
    assert theirs.load_state_dict(ours.state_dict(), strict=False).unexpected_keys == list(before) == names
    if names:
        del before[names[1]]
        with pytest.raises(RuntimeError, match=r"Missing key.*memory_bank.pointer"):
            ours.load_state_dict(before)


def test_lightly_has_the_same_signature() -> None:
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    assert_same_signature(NTXentLoss, lightly.NTXentLoss)


def test_pytorch_metric_learning_nt_xent() -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")
    leaves = views()
    ours = K.nt_xent_loss(*leaves, 0.1)
    theirs = losses.NTXentLoss(temperature=0.1)(torch.cat(leaves), torch.arange(48).repeat(2))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_memory_of_a_peer_grows_with_the_square_of_the_batch_and_ours_does_not() -> None:
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    leaves = views(batch=512)
    with saved_bytes() as theirs:
        lightly.NTXentLoss()(*leaves)
    with saved_bytes() as ours:
        NTXentLoss()(*leaves)
    assert sum(theirs) > 1024 * 1024 * 4
    assert sum(ours) < 6 * 1024 * 16 * 4
