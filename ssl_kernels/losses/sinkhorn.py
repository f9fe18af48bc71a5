"""Sinkhorn-Knopp assignment as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group


class SinkhornKnopp(nn.Module):
    """The teacher's probabilities by Sinkhorn-Knopp, over the samples of all ``torch.distributed`` processes.

    See :func:`ssl_kernels.functional.sinkhorn_center`. A loss of this library needs :meth:`center` only, and then the
    probabilities are never written.

    Args:
        n_iterations: how often columns and rows are scaled.
        group: processes whose samples are assigned together, a ``ProcessGroup`` or a ``DeviceMesh``; None is all of
            them.

    >>> import torch, ssl_kernels.functional as K
    >>> from ssl_kernels import SinkhornKnopp
    >>> sinkhorn, student, teacher = SinkhornKnopp(n_iterations=3), torch.randn(4, 8, 16), torch.randn(2, 8, 16)
    >>> loss = K.dino_loss(student, teacher, teacher_temp=0.07, center=sinkhorn.center(teacher, 0.07))
    >>> written = K.dino_loss(student, sinkhorn(teacher, 0.07), teacher_probs=True)
    >>> torch.allclose(loss, written)
    True
    """

    def __init__(self, n_iterations: int = 3, group: Group = None) -> None:
        super().__init__()
        self.n_iterations = n_iterations
        self.group = group

    @torch.no_grad()
    def forward(self, teacher_output: Tensor, teacher_temp: Tensor | float) -> Tensor:
        """Probabilities of the shape of the logits [..., K], in float32."""
        return K.sinkhorn_knopp(teacher_output, teacher_temp, n_iterations=self.n_iterations, group=self.group)

    @torch.no_grad()
    def center(self, teacher_output: Tensor, teacher_temp: Tensor | float) -> Tensor:
        """The centre [K] of which those are the softmax."""
        return K.sinkhorn_center(teacher_output, teacher_temp, n_iterations=self.n_iterations, group=self.group)

    def extra_repr(self) -> str:
        return f"n_iterations={self.n_iterations}"
