"""The supervised contrastive loss of pytorch-metric-learning, argument for argument."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ssl_kernels import losses
from ssl_kernels.ops.unit_rows import fused_unit_rows


class SupConLoss(losses.SupConLoss):
    """Replaces ``pytorch_metric_learning.losses.SupConLoss`` with its default distance and reducer.

    Embeddings are normalised here. Rows without a positive contribute nothing, and a batch with a single label has the
    loss 0. pytorch-metric-learning also leaves out of the mean all rows whose loss rounds to 0; this class does not.

    Args:
        temperature: divides the similarities.

    Raises:
        NotImplementedError: for a miner's ``indices_tuple``, and for reference embeddings.

    >>> import torch
    >>> from ssl_kernels.integrations.pytorch_metric_learning import SupConLoss
    >>> round(SupConLoss(temperature=0.5)(2 * torch.eye(3), torch.tensor([7, 7, 8])).item(), 4)
    0.6931
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__(temperature)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        """The loss of ``embeddings`` [N, D] with integer ``labels`` [N]."""
        for name, value in (("indices_tuple", indices_tuple), ("ref_emb", ref_emb), ("ref_labels", ref_labels)):
            if value is not None:
                raise NotImplementedError(f"SupConLoss: {name}: only None is implemented, got {type(value).__name__}")
        labels = labels.to(embeddings.device)
        return super().forward(fused_unit_rows(embeddings, name="embeddings"), labels) * (labels != labels[:1]).any()
