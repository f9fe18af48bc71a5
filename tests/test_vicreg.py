"""VICReg beside lightly's, and in several processes. What it shares: test_covariance.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contrastive import BACKENDS
from peers import assert_same, assert_same_signature, value_and_gradients
from processes import run_processes
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import BarlowTwinsLoss, NTXentLoss, VICRegLoss
from ssl_kernels.integrations.solo import vicreg_loss_func


def views(*shape: int) -> list[Tensor]:
    base = torch.randn(shape)
    return [(base + 0.5 * torch.randn(shape)).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (2, 3), (8, 5, 12), (20, 2, 3, 4)])
def test_lightly(backend: str, shape: tuple[int, ...]) -> None:
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    leaves = views(*shape)
    for options in ({}, {"lambda_param": 10.0, "mu_param": 3.0, "nu_param": 7.0, "eps": 1e-2}):
        theirs = value_and_gradients(lightly.VICRegLoss(**options)(*leaves), leaves)
        with ssl_kernels.use_backend(backend):
            assert_same(value_and_gradients(VICRegLoss(**options)(*leaves), leaves), theirs)


def test_lightly_has_the_same_signature() -> None:
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    assert_same_signature(VICRegLoss, lightly.VICRegLoss)


def test_each_term_alone() -> None:
    """Equal views of orthogonal features with a variance of 4 cost nothing; the terms respond to what is theirs."""
    z = torch.randn(16, 4)
    z = 2 * 15**0.5 * torch.linalg.qr(z - z.mean(0))[0]
    off = {"invariance_weight": 0.0, "variance_weight": 0.0, "covariance_weight": 0.0}
    assert K.vicreg_loss(z, z) < 1e-6
    torch.testing.assert_close(K.vicreg_loss(z, z + 3, **off | {"invariance_weight": 1.0}), torch.tensor(9.0))
    shrunk = K.vicreg_loss(z / 8, z / 8, **off | {"variance_weight": 1.0}, eps=1e-12)
    torch.testing.assert_close(shrunk, torch.tensor(0.75))
    mixed = torch.cat([z, z], 1)  # each feature has a covariance of 4 with its copy
    copied = K.vicreg_loss(mixed, mixed, **off | {"covariance_weight": 1.0})
    torch.testing.assert_close(copied, torch.tensor(2 * 16.0))


def test_views_of_different_shapes_are_named() -> None:
    for a, b in (((4, 3), (4, 2)), ((4,), (4,))):
        with pytest.raises(ValueError, match=r"z_a, z_b: expected one shape \[batch, ..., features\], got \(4,"):
            VICRegLoss()(torch.ones(a), torch.ones(b))


WORKER = """
from ssl_kernels import VICRegLoss
from ssl_kernels.integrations import solo

torch.manual_seed(0)
everyone = [torch.randn(12, 5) for _ in range(2)]
own = slice(12 * rank // world, 12 * (rank + 1) // world)
whole = [z.clone().requires_grad_() for z in everyone]
part = [z[own].clone().requires_grad_() for z in everyone]

# The mean over processes is the loss of one process with all rows, in value and gradients.
for ours, alone in (
    (VICRegLoss(gather_distributed=True), VICRegLoss()), (solo.vicreg_loss_func, VICRegLoss(mu_param=50.0))
):
    expected, mean = alone(*whole), ours(*part)
    gradients = torch.autograd.grad(mean, part), torch.autograd.grad(expected, whole)
    mean = mean.detach().clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(mean / world, expected.detach())
    for a, b in zip(*gradients):
        torch.testing.assert_close(a / world, b[own])
try:
    from lightly.loss import VICRegLoss as Theirs
except ImportError:
    pass
else:
    again = [z.detach().clone().requires_grad_() for z in part]
    theirs = torch.autograd.grad(Theirs(gather_distributed=True)(*again), again)
    for a, b in zip(torch.autograd.grad(VICRegLoss(gather_distributed=True)(*part), part), theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
torch.testing.assert_close(VICRegLoss()(*part), VICRegLoss()(*(z[own] for z in everyone)))
"""


def test_torch_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that are to gather say so at once, as lightly's do; solo-learn's functions do without."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    for module in (VICRegLoss, BarlowTwinsLoss, NTXentLoss):
        module()
        with pytest.raises(ValueError, match="gather_distributed: expected False, for this build of torch has no"):
            module(gather_distributed=True)
    z = torch.randn(4, 3)
    torch.testing.assert_close(vicreg_loss_func(z, z), VICRegLoss(mu_param=50.0)(z, z))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    run_processes(WORKER, tmp_path)
