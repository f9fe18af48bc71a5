"""solo-learn's loss functions and momentum updater, called as its methods call them. Of a method one line changes:

    - from solo.losses.barlow import barlow_loss_func
    - from solo.losses.mocov2plus import mocov2plus_loss_func
    - from solo.losses.mocov3 import mocov3_loss_func
    - from solo.losses.simclr import simclr_loss_func
    - from solo.losses.vicreg import vicreg_loss_func
    - from solo.utils.momentum import MomentumUpdater
    + from ssl_kernels.integrations.solo import MomentumUpdater, barlow_loss_func, mocov2plus_loss_func
    + from ssl_kernels.integrations.solo import mocov3_loss_func, simclr_loss_func, vicreg_loss_func

    python examples/solo_learn.py simclr      # or barlow, vicreg, mocov2plus, mocov3
"""

import copy
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from ssl_kernels.integrations.solo import MomentumUpdater, barlow_loss_func, mocov2plus_loss_func
from ssl_kernels.integrations.solo import mocov3_loss_func, simclr_loss_func, vicreg_loss_func

images = torch.tensor(load_digits().data).float() / 16  # [1797, 64]


def main(method: str = "simclr", epochs: int = 5) -> list[float]:
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    momentum = copy.deepcopy(online).requires_grad_(False)
    updater = MomentumUpdater(base_tau=0.95, final_tau=1.0)
    queue = F.normalize(torch.randn(64, 1024), dim=0)  # [features, keys]
    optimizer = torch.optim.SGD(online.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for epoch in range(epochs):
        for indexes in torch.randperm(len(images)).split(128)[:-1]:
            views = [images[indexes] * (torch.rand(128, 64) > 0.5) for _ in range(2)]  # each loses half of its pixels
            z1, z2 = (online(view) for view in views)
            k1, k2 = (momentum(view) for view in views)
            if method == "simclr":
                loss = simclr_loss_func(torch.cat([z1, z2]), indexes=indexes.repeat(2), temperature=0.2)
            elif method == "barlow":
                loss = barlow_loss_func(z1, z2, lamb=5e-3, scale_loss=0.1)
            elif method == "vicreg":
                loss = vicreg_loss_func(z1, z2, sim_loss_weight=25.0, var_loss_weight=25.0, cov_loss_weight=1.0)
            elif method == "mocov2plus":
                query, key = F.normalize(z1, dim=1), F.normalize(k2, dim=1)
                loss = mocov2plus_loss_func(query, key, queue, temperature=0.2)
                queue = torch.cat([key.T, queue], dim=1)[:, :1024]
            else:
                loss = mocov3_loss_func(z1, k2, temperature=0.2) + mocov3_loss_func(z2, k1, temperature=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            updater.update(online, momentum)
            losses.append(loss.item())
            updater.update_tau(cur_step=len(losses), max_steps=epochs * 14)
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
