"""timm's average of a model during training, in one pass over all parameters. One line changes:

    - from timm.utils import ModelEmaV3
    + from ssl_kernels.integrations.timm import ModelEmaV3

Run it: `python examples/timm_ema.py`
"""

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from ssl_kernels.integrations.timm import ModelEmaV3

digits = load_digits()
images = F.interpolate(torch.tensor(digits.images).float()[:, None] / 16, scale_factor=2.0)  # [1797, 1, 16, 16]
labels = torch.tensor(digits.target)
train, test = images[:1400], images[1400:]


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    model.eval()
    return F.cross_entropy(model(test), labels[1400:]).item()


def main(epochs: int = 6) -> list[float]:
    """The average's loss on 397 held-out digits, after each epoch."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet.r160_in1k", in_chans=1, num_classes=10)
    average = ModelEmaV3(model, decay=0.9, use_warmup=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses, step = [], 0
    for epoch in range(epochs):
        model.train()
        for batch in torch.randperm(len(train)).split(100):
            loss = F.cross_entropy(model(train[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model, step=step)
            step += 1
        losses.append(loss_of(average.module))
        print(f"epoch {epoch}: loss of the model {loss_of(model):.4f}, of the average {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
