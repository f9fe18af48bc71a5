"""The losses of Meta's DINOv3, called as its `SSLMetaArch` calls them. One line changes:

    - from dinov3.loss import DINOLoss, KoLeoLoss, iBOTPatchLoss
    + from ssl_kernels.integrations.dinov3 import DINOLoss, KoLeoLoss, iBOTPatchLoss

Run it: `python examples/meta_dinov3.py`
"""

import copy

import torch
from meta_dinov2 import ViT, images

from ssl_kernels.integrations.dinov3 import DINOLoss, KoLeoLoss, iBOTPatchLoss


def main(epochs: int = 3, prototypes: int = 128) -> list[float]:
    torch.manual_seed(0)
    student = ViT(prototypes)
    teacher = copy.deepcopy(student).requires_grad_(False)
    dino_loss, ibot_loss, koleo_loss = DINOLoss(prototypes), iBOTPatchLoss(prototypes), KoLeoLoss()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for epoch in range(epochs):
        for batch in images[torch.randperm(len(images))].split(128):
            views = torch.cat([batch * (torch.rand_like(batch) < 0.8) for _ in range(2)])  # [2 B, 8, 8]
            masks = torch.rand(len(views), 16) < 0.3
            cls, patches = teacher(views)
            teacher_cls = dino_loss.sinkhorn_knopp_teacher(teacher.head(cls), teacher_temp=0.07)
            teacher_patches = ibot_loss.sinkhorn_knopp_teacher(
                teacher.head(patches[masks]), teacher_temp=0.07, n_masked_patches_tensor=masks.sum()
            )
            cls, patches = student(views, masks)
            cls = cls.unflatten(0, (2, -1))
            loss = dino_loss(
                student_logits=student.head(cls),
                teacher_probs=teacher_cls.unflatten(0, (2, -1)),
                ignore_diagonal=True,  # each view is told of the other
            )
            loss += ibot_loss.forward_masked(student.head(patches[masks]), teacher_patches, student_masks_flat=masks)
            loss += 0.1 * sum(koleo_loss(view) for view in cls)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for average, parameter in zip(teacher.parameters(), student.parameters(), strict=True):
                    average.lerp_(parameter, 0.01)
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
