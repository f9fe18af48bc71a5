"""Sinkhorn-Knopp assignment as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group


class SinkhornKnopp(nn.Module):
    """A teacher's probabilities by Sinkhorn-Knopp, balanced over the samples of all ``torch.distributed`` processes.

    See :func:`ssl_kernels.functional.sinkhorn_center`. The losses of this library need only :meth:`center`; the
    probabilities are then never stored.

    Args:
        n_iterations: how often prototypes and samples are balanced in turn.
        group: the processes whose samples are balanced together, a ``ProcessGroup`` or a ``DeviceMesh``; None means
            all.

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
        """The probabilities, in the shape of the logits [..., K] and in float32."""
        return K.sinkhorn_knopp(teacher_output, teacher_temp, n_iterations=self.n_iterations, group=self.group)

    @torch.no_grad()
    def center(self, teacher_output: Tensor, teacher_temp: Tensor | float) -> Tensor:
        """The centre c [K] for which softmax((T - c) / tau) are these probabilities."""
        return K.sinkhorn_center(teacher_output, teacher_temp, n_iterations=self.n_iterations, group=self.group)

    def extra_repr(self) -> str:
        return f"n_iterations={self.n_iterations}"
