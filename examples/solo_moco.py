"""solo-learn's MoCo v2+ and MoCo v3, with the calls of its methods. For either two lines change:

    - from solo.losses.mocov2plus import mocov2plus_loss_func
    - from solo.losses.mocov3 import mocov3_loss_func
    - from solo.utils.momentum import MomentumUpdater
    + from ssl_kernels.integrations.solo import MomentumUpdater, mocov2plus_loss_func, mocov3_loss_func

Run it: `python examples/solo_moco.py mocov2plus`, or `mocov3`
"""

import copy
import sys

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from ssl_kernels.integrations.solo import MomentumUpdater, mocov2plus_loss_func, mocov3_loss_func

images = torch.tensor(load_digits().data).float() / 16  # [1797, 64]


def main(method: str = "mocov2plus", epochs: int = 5) -> list[float]:
    torch.manual_seed(0)
    online = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 64))
    momentum = copy.deepcopy(online).requires_grad_(False)
    updater = MomentumUpdater(base_tau=0.99, final_tau=1.0)
    queue = F.normalize(torch.randn(64, 1024), dim=0)  # [features, keys]
    optimizer = torch.optim.AdamW(online.parameters(), lr=1e-3)
    losses = []
    for epoch in range(epochs):
        for batch in images[torch.randperm(len(images))].split(128)[:-1]:
            views = [batch * (torch.rand_like(batch) > 0.5) for _ in range(2)]  # each loses half of its pixels
            z1, z2 = (online(view) for view in views)
            k1, k2 = (momentum(view) for view in views)
            if method == "mocov2plus":
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
