"""MoCo of lightly's modules and transforms, with this library's loss, queue and momentum update. Two lines change:

    - from lightly.loss import NTXentLoss
    - from lightly.models.utils import update_momentum
    + from ssl_kernels import NTXentLoss
    + from ssl_kernels.integrations.lightly import update_momentum

Run it: `python examples/lightly_moco.py`
"""

import copy

import torch
from lightly.models.modules import MoCoProjectionHead
from lightly.transforms import MoCoV2Transform
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssl_kernels import NTXentLoss
from ssl_kernels.integrations.lightly import update_momentum


class Digits(Dataset):
    """A query and a key, two random views, of each of some handwritten digits."""

    def __init__(self, size: int) -> None:
        self.images = [Image.fromarray((15 * digit).astype("uint8")).convert("RGB") for digit in load_digits().images]
        self.images = self.images[:size]
        self.transform = MoCoV2Transform(input_size=32, min_scale=0.5, cj_prob=0.0, gaussian_blur=0.0, hf_prob=0.0)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def encoder() -> nn.Module:
    """[B, 3, S, S] to [B, 128]; a ResNet in its place works as well, and takes longer."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, stride=4), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 2, stride=2), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), MoCoProjectionHead(512, 512, 128),
    )  # fmt: skip


def main(epochs: int = 5, size: int = 1024) -> list[float]:
    torch.manual_seed(0)
    query_encoder = encoder()
    key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)
    criterion = NTXentLoss(temperature=0.1, memory_bank_size=(1024, 128))
    optimizer = torch.optim.AdamW(query_encoder.parameters(), lr=1e-3)
    losses = []
    for epoch in range(epochs):
        for query, key in DataLoader(Digits(size), batch_size=64, shuffle=True, drop_last=True):
            update_momentum(query_encoder, key_encoder, m=0.99)
            loss = criterion(query_encoder(query), key_encoder(key))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
