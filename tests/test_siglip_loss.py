"""The SigLipLoss module, and a training run on it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssl_kernels
from ssl_kernels import SigLipLoss


def test_several_processes_are_refused_for_now() -> None:
    with pytest.raises(NotImplementedError, match="world_size=2"):
        SigLipLoss(world_size=2)


def test_every_argument_of_one_process_is_accepted() -> None:
    loss = SigLipLoss(cache_labels=True, rank=0, world_size=1, dist_impl="gather", chunk_size=64)
    features = torch.eye(3)
    expected = SigLipLoss()(features, features, 10.0, -10.0)
    assert torch.equal(loss(features, features, 10.0, -10.0), expected)
    assert loss.state_dict() == {}


def test_numbers_of_rows_must_agree() -> None:
    with pytest.raises(ValueError, match="text_features: expected 3 rows as image_features has, got 2"):
        SigLipLoss()(torch.eye(3), torch.eye(3)[:2], 10.0, -10.0)


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16))
        self.text = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.Linear(32, 16))
        self.log_scale = nn.Parameter(torch.tensor(10.0).log())
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, y = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return x, y, self.log_scale.exp(), self.bias


def losses_of_a_run(model: Towers, backend: str, steps: int = 30) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(24, 12, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    criterion = SigLipLoss()
    losses = []
    for _ in range(steps):
        image = torch.randn(64, 24, generator=generator)
        with ssl_kernels.use_backend(backend):
            loss = criterion(*model(image, image @ truth))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_thirty_steps_follow_the_reference(backend: str) -> None:
    model = Towers()
    expected = losses_of_a_run(copy.deepcopy(model), "reference")
    losses = losses_of_a_run(model, backend)
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=2e-4)
