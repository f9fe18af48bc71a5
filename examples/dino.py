"""DINO on one screen (Caron et al. 2021, arXiv:2104.14294): a student says of a view what its teacher says of another.

    python examples/dino.py

A small net learns 1,397 digits of 8 x 8 pixels without their labels, in some seconds; a view turns, scales and shifts
them. Then views of 400 digits that it never saw look for their nearest neighbours: are these of the same kind? Before
training, and by pixels, little more than half of them are.
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from ssl_kernels import DINOHead, DINOLoss, ModelEma

digits = load_digits()
images, labels = torch.tensor(digits.images).float()[:, None] / 16, torch.tensor(digits.target)
test, train = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split([400, len(images) - 400])


def view(x: Tensor) -> Tensor:
    """[N, 1, 8, 8]: each digit is turned by up to half a radian, scaled by a quarter and shifted by a pixel."""
    turn, zoom, right, down = torch.rand(4, len(x)) * 2 - 1
    cos, sin = 1.25**zoom * (turn / 2).cos(), 1.25**zoom * (turn / 2).sin()
    theta = torch.stack([cos, -sin, right / 4, sin, cos, down / 4], dim=1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def network(prototypes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for width in (64, 256):
        layers += [nn.Linear(width, 256), nn.BatchNorm1d(256), nn.ReLU()]
    return nn.Sequential(*layers, DINOHead(256, prototypes, hidden_dim=256, bottleneck_dim=64, batch_norm=True))


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    """The share of views of test digits whose nearest neighbour among the training digits shows the same digit."""
    queries, gallery = (F.normalize(net(x), dim=1) for x in (view(images[test]), images[train]))
    return (labels[train][(queries @ gallery.T).argmax(1)] == labels[test]).float().mean().item()


def main(steps: int = 200, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    student = network(prototypes=128)
    teacher = ModelEma(student, momentum=0.95)
    criterion = DINOLoss(output_dim=128)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    figures = {"pixels": accuracy(nn.Flatten()), "untrained": accuracy(student.eval())}
    student.train()
    for step in range(steps):
        batch = images[train[torch.randperm(len(train))[:256]]]
        views = [view(batch), view(batch)]
        with torch.no_grad():
            teacher_out = [teacher(x) for x in views]
        loss = criterion(teacher_out, [student(x) for x in views])  # and then the centre moves
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update(student)
        if step % 40 == 0 or step == steps - 1:
            print(f"step {step:3}: loss {loss.item():.3f}")
    figures["trained"] = accuracy(teacher.module.eval())
    print("neighbours of the same kind:", ", ".join(f"{name} {share:.2f}" for name, share in figures.items()))
    return figures


if __name__ == "__main__":
    main()
