"""A loop of Hugging Face's accelerate with open_clip's loss, in one process or several. One line changes:

    - from open_clip import ClipLoss
    + from ssl_kernels import ClipLoss

    python examples/accelerate_loop.py
    torchrun --nproc-per-node 2 examples/accelerate_loop.py

Two processes train as one does: the batch of 128 is split among them.
"""

import math

import shapes
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ssl_kernels import ClipLoss


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(768, 256), nn.ReLU(), nn.Linear(256, 64))
        self.text = nn.Sequential(nn.EmbeddingBag(len(shapes.vocabulary), 64), nn.ReLU(), nn.Linear(64, 64))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y = self.image(images), self.text(tokens)
        return F.normalize(x, dim=1), F.normalize(y, dim=1), self.log_scale.exp()


def main(epochs: int = 20) -> list[float]:
    set_seed(0)
    split = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=split)
    pairs = TensorDataset(shapes.images[shapes.train], shapes.tokens[shapes.train])
    model = Towers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(pairs, batch_size=128, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    criterion = ClipLoss(gather_with_grad=True, rank=accelerator.process_index, world_size=accelerator.num_processes)
    losses = []
    for epoch in range(epochs):
        for images, tokens in loader:
            loss = criterion(*model(images, tokens))
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
        accelerator.print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    x, y, _ = model(shapes.images[shapes.held_out], shapes.tokens[shapes.held_out])
    found = ((y @ x.T).argmax(1).cpu() == torch.arange(len(y))).float().mean().item()
    accelerator.print(f"held-out captions that find their image: {found:.2f}, of chance 0.01")
    accelerator.end_training()
    return losses


if __name__ == "__main__":
    main()
