"""A `LightningModule` that learns by SimCLR, and Lightning's `WeightAveraging`. Three lines change:

    - from lightly.loss import NTXentLoss
    - from torch.optim.swa_utils import get_ema_multi_avg_fn
    + from ssl_kernels import NTXentLoss
    + from ssl_kernels.ema import ema_multi_avg_fn

    - averaging = WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.9))
    + averaging = WeightAveraging(multi_avg_fn=ema_multi_avg_fn(0.9))

Run it: `python examples/lightning_module.py`
"""

import tempfile

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ssl_kernels import NTXentLoss
from ssl_kernels.ema import ema_multi_avg_fn

images = torch.tensor(load_digits().data).float() / 16  # [1797, 64]


class SimCLR(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
        self.criterion = NTXentLoss(temperature=0.2)
        self.losses: list[float] = []

    def loss_of(self, batch: Tensor) -> Tensor:
        first, second = (batch * (torch.rand_like(batch) > 0.5) for _ in range(2))  # each loses half of its pixels
        return self.criterion(self.encoder(first), self.encoder(second))

    def training_step(self, batch: Tensor, number: int) -> Tensor:
        loss = self.loss_of(batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(epochs: int = 5) -> list[float]:
    """The loss of each step and, last, that of the averaged weights, which the model has in the end."""
    lightning.seed_everything(0, verbose=False)
    model = SimCLR()
    averaging = WeightAveraging(multi_avg_fn=ema_multi_avg_fn(0.9))
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[averaging], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.fit(model, DataLoader(images, batch_size=128, shuffle=True, drop_last=True))
    with torch.no_grad():
        averaged = model.loss_of(images[:128]).item()
    print(f"loss {model.losses[0]:.3f} at the first step, {model.losses[-1]:.3f} at the last, {averaged:.3f} averaged")
    return [*model.losses, averaged]


if __name__ == "__main__":
    main()
