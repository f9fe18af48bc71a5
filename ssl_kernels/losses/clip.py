"""CLIP loss module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group
from ssl_kernels.losses.in_group import LossInGroup, overridden


class ClipLoss(LossInGroup):
    r"""Symmetric softmax contrastive loss; replaces ``open_clip.loss.ClipLoss`` argument for argument.

    :math:`L = \frac{1}{2B} \sum_i (\log \sum_j e^{z_{ij}} + \log \sum_j e^{z_{ji}} - 2 z_{ii})`,
    :math:`z_{ij} = t\, x_i \cdot y_j`. See :func:`ssl_kernels.functional.clip_loss`, and for the trainers
    of open_clip :func:`ssl_kernels.integrations.open_clip.replaced_losses`.

    :meth:`get_logits` and :meth:`get_ground_truth` exist for subclasses that call or override them, as with open_clip's
    class. They make B x B matrices, and the loss itself does not call them, unless a subclass overrides one: the loss
    is then computed from what they return.

    Args:
        local_loss: return this process's share of the loss, whose mean over the processes is the loss.
        gather_with_grad: accepted because open_clip has it; gradients are those of the whole batch in any case.
        cache_labels: accepted because open_clip has it; there are no labels to cache.
        rank, world_size: this process's rank and the number of processes, as ``torch.distributed`` numbers them.
        use_horovod: must be False if there are several processes.
        group, strategy, grad_reduce, even_batches: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group, these are all processes if ``world_size`` is above 1,
            otherwise this one alone.

    Source: Radford et al. 2021, arXiv:2103.00020.

    >>> import torch
    >>> from ssl_kernels import ClipLoss
    >>> features = torch.eye(4)
    >>> round(ClipLoss()(features, features, logit_scale=torch.tensor(2.0)).item(), 4)
    0.3408
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        even_batches: bool = False,
    ) -> None:
        super().__init__(group, strategy, grad_reduce, even_batches, rank=rank, world_size=world_size)
        if use_horovod and not self.is_alone():
            raise NotImplementedError("use_horovod: expected False, for features travel by torch.distributed, got True")
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of normalised features [B, D]. ``logit_scale`` is the scale, not its logarithm.

        A ``logit_bias`` has no effect, and its gradient is zero, because adding one number to all logits does not
        change a softmax. With ``output_dict`` the result is ``{"contrastive_loss": loss}``.
        """
        if image_features.shape[:1] != text_features.shape[:1]:
            raise ValueError(
                f"text_features: expected {image_features.shape[0]} rows as image_features has, "
                f"got {text_features.shape[0]}"
            )
        if overridden(self, ClipLoss):
            logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
            labels = self.get_ground_truth(image_features.device, len(image_features))
            loss = torch.stack([F.cross_entropy(direction, labels) for direction in logits]).mean()
            return {"contrastive_loss": loss} if output_dict else loss
        loss = K.clip_loss(
            image_features, text_features, logit_scale, own_share=self.local_loss and not self.is_alone(), **self.how()
        )
        if isinstance(logit_bias, Tensor):
            loss = loss + 0 * logit_bias.sum().to(loss)  # in the graph, for trainers that want every parameter used
        return {"contrastive_loss": loss} if output_dict else loss

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits t x y + b of all pairs, as matrices [images, texts] and [texts, images]."""
        per_image = logit_scale * image_features @ text_features.t()
        per_text = logit_scale * text_features @ image_features.t()
        if logit_bias is not None:
            per_image.add_(logit_bias)
            per_text.add_(logit_bias)
        return per_image, per_text

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """For each row the column of its positive: 0, 1, 2 and so on."""
        return torch.arange(num_logits, device=device)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"
