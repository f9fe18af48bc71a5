"""SimCLR and Barlow Twins over several processes, in Lightning as lightly's distributed examples. One line changes:

    - from lightly.loss import BarlowTwinsLoss, NTXentLoss
    + from ssl_kernels import BarlowTwinsLoss, NTXentLoss

Run it: `torchrun --nproc-per-node 2 examples/lightly_distributed.py simclr`
"""

import os
import sys
import tempfile

import lightning
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ssl_kernels import BarlowTwinsLoss, NTXentLoss

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))
CRITERIA = {  # both meet the rows of all processes
    "simclr": lambda: NTXentLoss(temperature=0.2, gather_distributed=True),
    "barlow": lambda: BarlowTwinsLoss(gather_distributed=True),
}


def views() -> TensorDataset:
    """Two copies of each of 1,797 handwritten digits, each without half of its pixels."""
    images = torch.tensor(load_digits().data).float() / 16
    keep = torch.rand(2, *images.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    return TensorDataset(images * keep[0], images * keep[1])


class TwoViews(lightning.LightningModule):
    def __init__(self, method: str) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
        self.criterion = CRITERIA[method]()
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], number: int) -> Tensor:
        view0, view1 = batch
        loss = self.criterion(self.encoder(view0), self.encoder(view1))
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(method: str = "simclr", epochs: int = 5) -> list[float]:
    """The loss of each step; the batch of 256 is that of all processes."""
    lightning.seed_everything(0, verbose=False)
    model = TwoViews(method)
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=WORLD_SIZE, strategy="ddp", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    trainer.fit(model, DataLoader(views(), batch_size=256 // WORLD_SIZE, shuffle=True, drop_last=True))
    if trainer.is_global_zero:
        print(f"loss {model.losses[0]:.3f} at the first step, {model.losses[-1]:.3f} at the last")
    return model.losses


if __name__ == "__main__":
    main(*sys.argv[1:])
