"""solo-learn's SimCLR, VICReg and Barlow Twins, with the calls of its methods. For any of them one line changes:

    - from solo.losses.barlow import barlow_loss_func
    - from solo.losses.simclr import simclr_loss_func
    - from solo.losses.vicreg import vicreg_loss_func
    + from ssl_kernels.integrations.solo import barlow_loss_func, simclr_loss_func, vicreg_loss_func

Run it: `python examples/solo_two_views.py simclr`, or `vicreg`, or `barlow`
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from ssl_kernels.integrations.solo import barlow_loss_func, simclr_loss_func, vicreg_loss_func

images = torch.tensor(load_digits().data).float() / 16  # [1797, 64]


def main(method: str = "simclr", epochs: int = 5) -> list[float]:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.005, momentum=0.9)
    losses = []
    for epoch in range(epochs):
        for indexes in torch.randperm(len(images)).split(128):
            batch = images[indexes]
            z1, z2 = (encoder(batch * (torch.rand_like(batch) > 0.5)) for _ in range(2))  # half of the pixels are lost
            if method == "simclr":
                loss = simclr_loss_func(torch.cat([z1, z2]), indexes=indexes.repeat(2), temperature=0.2)
            elif method == "vicreg":
                loss = vicreg_loss_func(z1, z2, sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=1.0)
            else:
                loss = barlow_loss_func(z1, z2, lamb=5e-3, scale_loss=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
