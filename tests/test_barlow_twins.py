"""Barlow Twins beside lightly's and solo-learn's. What it shares with VICReg: test_covariance.py, test_vicreg.py."""

from __future__ import annotations

import pytest
import torch
from contrastive import BACKENDS
from peers import assert_same_signature, value_and_gradients
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import BarlowTwinsLoss
from ssl_kernels.integrations.solo import barlow_loss_func


def views(*shape: int) -> list[Tensor]:
    base = torch.randn(shape)
    return [(3 * base + torch.randn(shape) + 2).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (200, 64)])
@pytest.mark.parametrize("lambda_param", [5e-3, 1.0])
def test_lightly(backend: str, shape: tuple[int, int], lambda_param: float) -> None:
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    leaves = views(*shape)
    theirs = value_and_gradients(lightly.BarlowTwinsLoss(lambda_param)(*leaves), leaves)
    with ssl_kernels.use_backend(backend):
        ours = value_and_gradients(BarlowTwinsLoss(lambda_param)(*leaves), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


def test_lightly_has_the_same_signature() -> None:
    lightly = pytest.importorskip("lightly.loss", reason="lightly is not installed")
    assert_same_signature(BarlowTwinsLoss, lightly.BarlowTwinsLoss)


def test_solo_learn() -> None:
    """From its equation: batch normalisation, squared differences from the identity, weights, and a factor."""
    leaves = views(40, 12)
    a, b = (torch.nn.BatchNorm1d(12, affine=False)(z) for z in leaves)
    weights = torch.full((12, 12), 5e-3).fill_diagonal_(1)
    expected = 0.025 * (weights * (a.t() @ b / 40 - torch.eye(12)).square()).sum()
    ours = value_and_gradients(barlow_loss_func(*leaves), leaves)
    for mine, theirs in zip(ours, value_and_gradients(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_identical_views_of_uncorrelated_features_cost_nothing() -> None:
    z = torch.randn(64, 8)
    z = torch.linalg.qr(z - z.mean(0))[0]
    assert K.barlow_twins_loss(100 * z, 100 * z) < 1e-8
    torch.testing.assert_close(K.barlow_twins_loss(100 * z, -100 * z).item(), 32.0)
    both = torch.cat([100 * z, 100 * z], 1)  # each feature is another's copy
    torch.testing.assert_close(K.barlow_twins_loss(both, both, lambda_param=0.5).item(), 8.0, rtol=1e-5, atol=0)
