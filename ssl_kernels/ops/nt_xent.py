"""Normalised temperature-scaled cross-entropy (SimCLR's NT-Xent): checks, reference, and the call of the engine."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_kernels.distributed import Group, across
from ssl_kernels.ops import _checks
from ssl_kernels.ops.contrastive import Pairs
from ssl_kernels.ops.softmax import KERNELS, dense_losses, reduce_losses, softmax_contrastive
from ssl_kernels.ops.strips import gathered
from ssl_kernels.ops.unit_rows import fused_unit_rows
from ssl_kernels.settings import choose_backend


def nt_xent_loss(
    z0: Tensor,
    z1: Tensor,
    temperature: Tensor | float,
    *,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    even_batches: bool = False,
    own_share: bool = False,
) -> Tensor:
    r"""NT-Xent loss of SimCLR over two views of a batch, with exact gradients, in memory that is linear in the batch.

    .. math:: L_i = \log \sum_{k \ne i} \exp(z_i \cdot z_k / \tau) - z_i \cdot z_{p(i)} / \tau

    for the 2 N rows of z = [z0; z1], which are normalised here, where p(i) is the other view of i. Similarities are
    symmetric, and each is computed once.

    Args:
        z0: [N, D] features of one view, in float32, bfloat16, float16 or float64 and with any strides.
        z1: [N, D] features of the other view, of the same dtype and device as ``z0``.
        temperature: tau > 0. A float, or a floating-point tensor of one element, which gets a gradient.
        reduction: "mean" or "sum" over all rows, or "none", [2 N].
        group, strategy, grad_reduce, even_batches, own_share: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group the loss is over the rows of this process alone.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features); 0 for no rows.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    Source: Chen et al., A Simple Framework for Contrastive Learning of Visual Representations, 2020, arXiv:2002.05709.

    >>> import torch, ssl_kernels.functional as K
    >>> z0 = torch.arange(8.0).reshape(4, 2).requires_grad_()
    >>> loss = K.nt_xent_loss(z0, z0.detach().flip(1), 0.5)
    >>> loss.backward()
    >>> round(loss.item(), 4), tuple(z0.grad.shape)
    (2.2006, (4, 2))
    """
    z0, z1 = _checks.autocast_widest(z0, z1)  # and not narrower, before they are normalised
    _checks.check_features(z0=z0, z1=z1)
    if z0.shape != z1.shape:
        raise ValueError(f"z1: expected {z0.shape[0]} rows as z0 has, got {z1.shape[0]}")
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    scale = _checks.as_inverse_temperature("temperature", temperature, z0)
    over = across(group, strategy, grad_reduce, even_batches, own_share, reduction)
    (z,) = _checks.autocast_features(fused_unit_rows(z0, z1))
    backend = choose_backend(z.device, z.dtype, KERNELS)
    rows = z0.shape[0]
    pairs = Pairs(None, None, False, positive=rows, excluded=0)
    if backend == "reference":
        views, (scale,), _ = gathered(over, (z[:rows], z[rows:]), (scale,), what="nt_xent_loss", reduction=reduction)
        return reference(torch.cat(views), scale, reduction)
    return softmax_contrastive(
        z, None, scale, pairs, seam=rows, reduction=reduction, backend=backend, over=over, what="nt_xent_loss"
    )[0]


def reference(z: Tensor, scale: Tensor, reduction: str) -> Tensor:
    """The definition for normalised rows z = [z0; z1]: dense, differentiable any number of times."""
    dtype = _checks.accumulation_dtype(z.dtype)
    with _checks.without_autocast(z):
        logits = scale * (z.to(dtype) @ z.to(dtype).t())
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = itself.roll(len(z) // 2, 0)
        return reduce_losses(*dense_losses(logits, positive, itself), reduction)
