"""InfoNCE loss module."""

from __future__ import annotations

from torch import Tensor, nn

import ssl_kernels.functional as K


class InfoNCELoss(nn.Module):
    r"""InfoNCE: the cross-entropy of one positive among frozen negatives, at a fixed temperature.

    See :func:`ssl_kernels.functional.info_nce_loss`, and call that function if the temperature is learned.

    Args:
        temperature: divides the similarities; 0.07 in MoCo v1, 0.2 in v2.
        reduction: "mean", "sum" or "none".

    >>> import torch
    >>> from ssl_kernels import InfoNCELoss
    >>> keys = torch.eye(4)
    >>> round(InfoNCELoss(temperature=0.2)(keys[:2], keys[:2], keys[2:]).item(), 4)
    0.0134
    """

    def __init__(self, temperature: float = 0.07, reduction: str = "mean") -> None:
        super().__init__()
        self.temperature = positive_temperature(temperature)
        self.reduction = reduction

    def forward(self, query: Tensor, positive: Tensor, negatives: Tensor) -> Tensor:
        """The loss of ``query`` and ``positive`` [B, D] among ``negatives`` [K, D]; normalise all three first."""
        return K.info_nce_loss(query, positive, negatives, 1 / self.temperature, reduction=self.reduction)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}"


def positive_temperature(temperature: float) -> float:
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
    return temperature
