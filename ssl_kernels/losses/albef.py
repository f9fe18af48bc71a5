"""ALBEF's image-text contrastive loss module."""

from __future__ import annotations

from torch import Tensor, nn

import ssl_kernels.functional as K


class ALBEFContrastiveLoss(nn.Module):
    r"""Image-text contrastive loss with soft targets from momentum features, and queues.

    See :func:`ssl_kernels.functional.albef_contrastive_loss`.

    Args:
        alpha: weight of the soft targets. ALBEF raises it from 0 to 0.4 over the first epoch.

    Source: Li et al. 2021, arXiv:2107.07651.

    >>> import torch
    >>> from ssl_kernels import ALBEFContrastiveLoss
    >>> batch, queue = torch.eye(5)[:3], torch.eye(5)[3:]
    >>> round(ALBEFContrastiveLoss()(batch, batch, batch, batch, queue, queue, logit_scale=2.0).item(), 4)
    0.7136
    """

    def __init__(self, alpha: float = 0.4) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        image_momentum: Tensor,
        text_momentum: Tensor,
        image_queue: Tensor,
        text_queue: Tensor,
        logit_scale: Tensor | float,
        alpha: float | None = None,
    ) -> Tensor:
        """The loss of normalised features [B, D] with queues [K, D]. ``logit_scale`` is 1 / temperature.

        ``alpha``, if given, replaces the module's alpha in this call.
        """
        return K.albef_contrastive_loss(
            image_features,
            text_features,
            image_momentum,
            text_momentum,
            image_queue,
            text_queue,
            logit_scale,
            self.alpha if alpha is None else alpha,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
