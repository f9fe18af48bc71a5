"""The loss of Meta's DINO, `main_dino.py`, as its training loop calls it. One line changes:

    - from main_dino import DINOLoss
    + from ssl_kernels.integrations.dino import DINOLoss

Run it: `python examples/meta_dino.py`
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssl_kernels.integrations.dino import DINOLoss

images = torch.tensor(load_digits().data).float() / 16  # [1797, 64]


class Net(nn.Module):
    """A backbone and a head whose prototypes are normalised, as DINO's are."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(64, 256), nn.BatchNorm1d(256), nn.GELU(),
            nn.Linear(256, 256), nn.BatchNorm1d(256), nn.GELU(), nn.Linear(256, 64),
        )  # fmt: skip
        self.prototypes = nn.Parameter(torch.randn(prototypes, 64))

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Crops [B, 64] to logits [crops * B, prototypes]."""
        z = F.normalize(self.layers(torch.cat(crops)), dim=1)
        return z @ F.normalize(self.prototypes, dim=1).T


def crops_of(batch: Tensor) -> list[Tensor]:
    """Two crops that have lost a quarter of their pixels, and two that have lost half."""
    return [batch * (torch.rand_like(batch) < kept) for kept in (0.75, 0.75, 0.5, 0.5)]


def main(epochs: int = 10, prototypes: int = 128) -> list[float]:
    torch.manual_seed(0)
    student = Net(prototypes)
    teacher = copy.deepcopy(student).requires_grad_(False)
    dino_loss = DINOLoss(
        prototypes, 4, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=3, nepochs=epochs
    )
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for epoch in range(epochs):
        for batch in images[torch.randperm(len(images))].split(128):
            crops = crops_of(batch)
            teacher_output = teacher(crops[:2])
            student_output = student(crops)
            loss = dino_loss(student_output, teacher_output, epoch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                    average.lerp_(parameter, 0.05)
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
