"""DINO of lightly's modules and transforms, with this library's loss and momentum update. Two lines change:

    - from lightly.loss import DINOLoss
    - from lightly.models.utils import update_momentum
    + from ssl_kernels import DINOLoss
    + from ssl_kernels.integrations.lightly import update_momentum

Run it: `python examples/lightly_dino.py`
"""

import torch
from lightly.models.modules import DINOProjectionHead
from lightly.transforms import DINOTransform
from lightly.utils.scheduler import cosine_schedule
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ssl_kernels import DINOLoss
from ssl_kernels.integrations.lightly import update_momentum


class Digits(Dataset):
    """Two large and two small random views of each of some handwritten digits."""

    def __init__(self, size: int) -> None:
        self.images = [Image.fromarray((15 * digit).astype("uint8")).convert("RGB") for digit in load_digits().images]
        self.images = self.images[:size]
        self.transform = DINOTransform(
            global_crop_size=32, global_crop_scale=(0.5, 1.0), local_crop_size=16, local_crop_scale=(0.25, 0.5),
            n_local_views=2, cj_prob=0.0, gaussian_blur=(0.0, 0.0, 0.0), hf_prob=0.0, solarization_prob=0.0,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def backbone() -> nn.Module:
    """[B, 3, S, S] to [B, 512]; a ResNet in its place works as well, and takes longer."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 4, stride=4), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 128, 2, stride=2), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip


class Network(nn.Module):
    def __init__(self, freeze_last_layer: int) -> None:
        super().__init__()
        self.backbone = backbone()
        self.head = DINOProjectionHead(512, 256, 64, 128, batch_norm=True, freeze_last_layer=freeze_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def main(epochs: int = 5, size: int = 1024) -> list[float]:
    torch.manual_seed(0)
    student, teacher = Network(freeze_last_layer=1), Network(freeze_last_layer=-1).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    criterion = DINOLoss(output_dim=128, warmup_teacher_temp_epochs=2)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for epoch in range(epochs):
        momentum = cosine_schedule(epoch, epochs, 0.95, 1)
        for views in DataLoader(Digits(size), batch_size=64, shuffle=True, drop_last=True):
            update_momentum(student, teacher, m=momentum)
            teacher_out = [teacher(view) for view in views[:2]]
            student_out = [student(view) for view in views]
            loss = criterion(teacher_out, student_out, epoch=epoch)
            optimizer.zero_grad()
            loss.backward()
            student.head.cancel_last_layer_gradients(current_epoch=epoch)
            optimizer.step()
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
