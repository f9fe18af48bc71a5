"""SigLIP on one screen (Zhai et al. 2023, arXiv:2303.15343): images and captions meet in a sigmoid loss over all pairs.

    python examples/siglip.py

A small convolutional net and a bag of words learn 548 coloured shapes in some seconds. Then 100 captions, none of which
was seen, look for their images. Before training one of them finds its own, by chance.
"""

import math

import torch
import torch.nn.functional as F
from shapes import held_out, images, tokens, train, vocabulary
from torch import Tensor, nn

from ssl_kernels import SigLipLoss


class SigLIP(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.image_tower = nn.Sequential(
            nn.Conv2d(3, 64, 4, stride=4), nn.ReLU(), nn.Conv2d(64, 64, 2, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 4 * 4, width),
        )  # fmt: skip
        self.text_tower = nn.Sequential(nn.EmbeddingBag(len(vocabulary), 64), nn.ReLU(), nn.Linear(64, width))
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = F.normalize(self.image_tower(image), dim=1)  # [B, D]
        y = F.normalize(self.text_tower(text), dim=1)  # [B, D]
        return x, y, self.log_scale.exp(), self.bias


@torch.no_grad()
def recall(model: SigLIP) -> float:
    """The share of the held-out captions whose nearest image is their own."""
    x, y, *_ = model(images[held_out], tokens[held_out])
    return ((y @ x.T).argmax(1) == torch.arange(len(y))).float().mean().item()


def main(steps: int = 200, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    model, criterion = SigLIP(), SigLipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    untrained = recall(model)
    for step in range(steps):
        batch = train[torch.randperm(len(train))[:128]]
        loss = criterion(*model(images[batch], tokens[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")
    trained = recall(model)
    print(f"held-out captions that find their image: {trained:.2f}, before training {untrained:.2f}")
    return {"trained": trained, "untrained": untrained}


if __name__ == "__main__":
    main()
