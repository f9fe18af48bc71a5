"""Barlow Twins beside lightly's. What it shares with VICReg: test_covariance.py, test_vicreg.py."""

from __future__ import annotations

import pytest
import torch
from contrastive import BACKENDS
from peers import assert_same_signature, value_and_gradients
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import BarlowTwinsLoss


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


def test_identical_views_of_uncorrelated_features_cost_nothing() -> None:
    z = torch.randn(64, 8)
    z = torch.linalg.qr(z - z.mean(0))[0]
    assert K.barlow_twins_loss(100 * z, 100 * z) < 1e-8
    torch.testing.assert_close(K.barlow_twins_loss(100 * z, -100 * z).item(), 32.0)
    both = torch.cat([100 * z, 100 * z], 1)  # each feature is another's copy
    torch.testing.assert_close(K.barlow_twins_loss(both, both, lambda_param=0.5).item(), 8.0, rtol=1e-5, atol=0)
