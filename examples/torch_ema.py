"""torch's `AveragedModel`, whose average moves in one pass over all parameters. Two lines change:

    - from torch.optim.swa_utils import get_ema_multi_avg_fn
    + from ssl_kernels.ema import ema_multi_avg_fn

    - average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
    + average = AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.95), use_buffers=True)

Run it: `python examples/torch_ema.py`
"""

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ssl_kernels.ema import ema_multi_avg_fn

digits = load_digits()
images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train, test = images[:1400], images[1400:]


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    return F.cross_entropy(model.eval()(test), labels[1400:]).item()


def main(epochs: int = 6) -> list[float]:
    """The average's loss on 397 held-out digits, after each epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10))
    average = AveragedModel(model, multi_avg_fn=ema_multi_avg_fn(0.95), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(train)).split(100):
            loss = F.cross_entropy(model(train[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
        losses.append(loss_of(average))
        print(f"epoch {epoch}: loss of the model {loss_of(model):.4f}, of the average {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
