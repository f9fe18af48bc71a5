"""The three losses of Meta's DINOv2, called as its `SSLMetaArch` calls them. One line changes:

    - from dinov2.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
    + from ssl_kernels.integrations.dinov2 import DINOLoss, KoLeoLoss, iBOTPatchLoss

Run it: `python examples/meta_dinov2.py`
"""

import copy

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssl_kernels.integrations.dinov2 import DINOLoss, KoLeoLoss, iBOTPatchLoss

images = torch.tensor(load_digits().images).float() / 16  # [1797, 8, 8], of 16 patches


class ViT(nn.Module):
    """One transformer block over a class token and 16 patches of 2 x 2 pixels; prototypes for both."""

    def __init__(self, prototypes: int, width: int = 64) -> None:
        super().__init__()
        self.patch = nn.Linear(4, width)
        self.tokens = nn.Parameter(0.02 * torch.randn(2, width))  # the class, and what stands for a hidden patch
        self.places = nn.Parameter(0.02 * torch.randn(17, width))
        self.block = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.prototypes = nn.Parameter(torch.randn(prototypes, width))

    def forward(self, x: Tensor, masks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, 8, 8] to the class token [B, D] and the patches [B, 16, D]."""
        patches = self.patch(F.unfold(x[:, None], 2, stride=2).mT)
        if masks is not None:
            patches = torch.where(masks[..., None], self.tokens[1], patches)
        tokens = torch.cat([self.tokens[0].expand(len(x), 1, -1), patches], dim=1) + self.places
        tokens = self.block(tokens)
        return tokens[:, 0], tokens[:, 1:]

    def head(self, tokens: Tensor) -> Tensor:
        return F.normalize(tokens, dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def main(epochs: int = 3, prototypes: int = 128) -> list[float]:
    torch.manual_seed(0)
    student = ViT(prototypes)
    teacher = copy.deepcopy(student).requires_grad_(False)
    dino_loss, ibot_loss, koleo_loss = DINOLoss(prototypes), iBOTPatchLoss(prototypes), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for epoch in range(epochs):
        for batch in images[torch.randperm(len(images))].split(128):
            views = torch.cat([batch * (torch.rand_like(batch) < 0.8) for _ in range(2)])  # [2 B, 8, 8]
            masks = torch.rand(len(views), 16) < 0.3
            cls, patches = teacher(views)
            teacher_cls = dino_loss.sinkhorn_knopp_teacher(teacher.head(cls), teacher_temp=0.07)
            teacher_patches = ibot_loss.sinkhorn_knopp_teacher(
                teacher.head(patches[masks]), teacher_temp=0.07, n_masked_patches_tensor=masks.sum()
            )
            cls, patches = student(views, masks)
            first, second = teacher_cls.chunk(2)
            loss = dino_loss([student.head(cls)], [torch.cat([second, first])])  # each view is told of the other
            loss += ibot_loss.forward_masked(student.head(patches[masks]), teacher_patches, student_masks_flat=masks)
            loss += 0.1 * sum(koleo_loss(view) for view in cls.chunk(2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                    average.lerp_(parameter, 0.01)
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
