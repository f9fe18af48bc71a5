"""SimCLR of lightly's modules and transforms, with this library's loss. One line changes:

    - from lightly.loss import NTXentLoss
    + from ssl_kernels import NTXentLoss

Run it: `python examples/lightly_simclr.py`
"""

import torch
from lightly.models.modules import SimCLRProjectionHead
from lightly.transforms import SimCLRTransform
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssl_kernels import NTXentLoss


class Digits(Dataset):
    """Two random views of each of some handwritten digits."""

    def __init__(self, size: int) -> None:
        self.images = [Image.fromarray((15 * digit).astype("uint8")).convert("RGB") for digit in load_digits().images]
        self.images = self.images[:size]
        self.transform = SimCLRTransform(input_size=32, min_scale=0.5, cj_prob=0.0, gaussian_blur=0.0, hf_prob=0.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def backbone() -> nn.Module:
    """[B, 3, S, S] to [B, 512]; a ResNet in its place works as well, and takes longer."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, stride=4), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 2, stride=2), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip


class SimCLR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = backbone()
        self.projection_head = SimCLRProjectionHead(512, 512, 128)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x))


def main(epochs: int = 5, size: int = 1024) -> list[float]:
    torch.manual_seed(0)
    model, criterion = SimCLR(), NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    losses = []
    for epoch in range(epochs):
        for view0, view1 in DataLoader(Digits(size), batch_size=64, shuffle=True, drop_last=True):
            loss = criterion(model(view0), model(view1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
