"""SigLIP loss module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group
from ssl_kernels.losses.in_group import LossInGroup, overridden


class SigLipLoss(LossInGroup):
    r"""Pairwise sigmoid loss; replaces ``open_clip.loss.SigLipLoss`` argument for argument.

    :math:`L = \frac{1}{B} \sum_{ij} \operatorname{softplus}(-s_{ij} (t\, x_i \cdot y_j + b))`, where :math:`s_{ij}` is
    +1 for i = j and -1 elsewhere. See :func:`ssl_kernels.functional.sigmoid_contrastive_loss`, and for the trainers of
    open_clip :func:`ssl_kernels.integrations.open_clip.replaced_losses`.

    :meth:`get_logits` and :meth:`get_ground_truth` exist for subclasses that call or override them, as with open_clip's
    class. They make B x B matrices, and the loss itself does not call them, unless a subclass overrides one: the loss
    is then computed from what they return.

    Args:
        cache_labels: accepted because open_clip has it; there are no labels to cache.
        rank, world_size: this process's rank and the number of processes, as ``torch.distributed`` numbers them.
        dist_impl: how open_clip exchanges features. Here "bidir" and "shift" mean the strategy "ring", "gather" means
            "gather", and "reduce" and None leave the choice to ``strategy``.
        chunk_size: accepted because open_clip has it, for rows at a time; memory is linear in the batch without it.
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group, these are all processes if ``world_size`` is above 1,
            otherwise this one alone.

    Source: Zhai et al. 2023, arXiv:2303.15343.

    >>> import torch
    >>> from ssl_kernels import SigLipLoss
    >>> features = torch.eye(4)
    >>> round(SigLipLoss()(features, features, logit_scale=torch.tensor(10.0), logit_bias=torch.tensor(-5.0)).item(), 4)
    0.0269
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        even_batches: bool = False,
    ) -> None:
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(f"dist_impl: expected 'bidir', 'shift', 'reduce', 'gather' or None, got {dist_impl!r}")
        if strategy == "auto":
            strategy = {"bidir": "ring", "shift": "ring", "gather": "gather"}.get(dist_impl or "", "auto")
        super().__init__(group, strategy, grad_reduce, even_batches, rank=rank, world_size=world_size)
        self.cache_labels = cache_labels
        self.dist_impl = dist_impl
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of normalised features [B, D]. ``logit_scale`` is the scale, not its logarithm; a bias of None is 0.

        With ``output_dict`` the result is ``{"contrastive_loss": loss}``.
        """
        if image_features.shape[:1] != text_features.shape[:1]:
            raise ValueError(
                f"text_features: expected {image_features.shape[0]} rows as image_features has, "
                f"got {text_features.shape[0]}"
            )
        if overridden(self, SigLipLoss):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, image_features.dtype, len(image_features))
            loss = -F.logsigmoid(labels * logits).sum() / len(image_features)
        else:
            bias = 0.0 if logit_bias is None else logit_bias
            loss = K.sigmoid_contrastive_loss(image_features, text_features, logit_scale, bias, **self.how())
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """The logits t x y + b of all pairs, as a matrix [images, texts]."""
        logits = logit_scale * image_features @ text_features.t()
        return logits if logit_bias is None else logits.add_(logit_bias)

    def get_ground_truth(
        self, device: torch.device | str, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:
        """Labels [num_logits, num_logits]: -1, but 1 on the diagonal unless ``negative_only``."""
        labels = torch.full((num_logits, num_logits), -1, device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"
