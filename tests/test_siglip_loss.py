"""The SigLipLoss module, and a training run on it."""

from __future__ import annotations

import copy

import pytest
import torch
from contrastive import Towers, losses_of_a_run
from torch import Tensor, nn

from ssl_kernels import SigLipLoss


def test_what_several_processes_need_is_named() -> None:
    features = torch.eye(3)
    with pytest.raises(RuntimeError, match=r"SigLipLoss: world_size=2: expected torch.distributed to be initialised"):
        SigLipLoss(world_size=2)(features, features, 10.0, -10.0)
    with pytest.raises(ValueError, match="dist_impl: expected 'bidir', 'shift', 'reduce', 'gather' or None, got 'x'"):
        SigLipLoss(dist_impl="x")
    with pytest.raises(ValueError, match="strategy: expected one of 'auto', 'gather', 'ring', got 'tree'"):
        SigLipLoss(strategy="tree")
    with pytest.raises(ValueError, match="grad_reduce: expected one of 'mean', 'sum', got 'max'"):
        SigLipLoss(grad_reduce="max")


def test_every_argument_of_one_process_is_accepted() -> None:
    loss = SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="gather", chunk_size=64)
    features = torch.eye(3)
    expected = SigLipLoss()(features, features, 10.0, -10.0)
    assert torch.equal(loss(features, features, 10.0, -10.0), expected)
    assert loss.state_dict() == {}


def test_numbers_of_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="text_features: expected 3 rows as image_features has, got 2"):
        SigLipLoss()(torch.eye(3), torch.eye(3)[:2], 10.0, -10.0)


class TowersWithBias(Towers):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        return *super().forward(image, text), self.bias


def siglip(x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
    loss = SigLipLoss()(x, y, log_scale.exp(), bias)
    assert isinstance(loss, Tensor)
    return loss


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_thirty_steps_follow_the_reference(backend: str) -> None:
    model = TowersWithBias()
    expected = losses_of_a_run("reference", siglip, copy.deepcopy(model))
    losses = losses_of_a_run(backend, siglip, model)
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=2e-4)
