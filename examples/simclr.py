"""SimCLR on one screen (Chen et al. 2020, arXiv:2002.05709): a view finds the other view of its image in the batch.

    python examples/simclr.py

A small net learns 1,397 digits of 8 x 8 pixels without their labels, in some seconds; a view has lost half of its pixels.
Then damaged digits that it never saw look for their nearest neighbour among whole ones: is it of the same kind?
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssl_kernels import NTXentLoss

digits = load_digits()
images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
test, train = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split([400, len(images) - 400])


def view(x: Tensor) -> Tensor:
    return x * (torch.rand_like(x) > 0.5)


def encoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU()
    )


@torch.no_grad()
def accuracy(backbone: nn.Module) -> float:
    """The share of damaged test digits whose nearest neighbour among whole training digits shows the same digit."""
    backbone.eval()
    damaged = images[test] * (torch.rand(len(test), 64, generator=torch.Generator().manual_seed(1)) > 0.5)
    queries, gallery = (F.normalize(backbone(x), dim=1) for x in (damaged, images[train]))
    return (labels[train][(queries @ gallery.T).argmax(1)] == labels[test]).float().mean().item()


def main(steps: int = 300, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    backbone, head = encoder(), nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    criterion = NTXentLoss(temperature=0.2)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-3)
    figures = {"untrained": accuracy(backbone), "pixels": accuracy(nn.Identity())}
    backbone.train()
    for step in range(steps):
        batch = images[train[torch.randperm(len(train))[:256]]]
        loss = criterion(head(backbone(view(batch))), head(backbone(view(batch))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")
    figures["trained"] = accuracy(backbone)
    print("neighbours of the same kind:", ", ".join(f"{name} {share:.2f}" for name, share in figures.items()))
    return figures


if __name__ == "__main__":
    main()
