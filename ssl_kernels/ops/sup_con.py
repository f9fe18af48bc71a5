"""Supervised contrastive loss (SupCon): checks, reference, and the call of the engine."""

from __future__ import annotations

from typing import Literal, overload

from torch import Tensor

from ssl_kernels.distributed import Group, across
from ssl_kernels.ops import _checks
from ssl_kernels.ops.contrastive import NO_DIAGONAL, Pairs
from ssl_kernels.ops.softmax import KERNELS, dense_losses, reduce_losses, softmax_contrastive
from ssl_kernels.ops.strips import gathered
from ssl_kernels.settings import choose_backend


@overload
def sup_con_loss(
    z: Tensor,
    ids: Tensor,
    temperature: Tensor | float,
    *,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    even_batches: bool = False,
    own_share: bool = False,
    return_unpaired: Literal[False] = False,
) -> Tensor: ...
@overload
def sup_con_loss(
    z: Tensor,
    ids: Tensor,
    temperature: Tensor | float,
    *,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    even_batches: bool = False,
    own_share: bool = False,
    return_unpaired: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def sup_con_loss(
    z: Tensor,
    ids: Tensor,
    temperature: Tensor | float,
    *,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    even_batches: bool = False,
    own_share: bool = False,
    return_unpaired: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Supervised contrastive loss: rows that share an id attract each other. Its memory is linear in the batch.

    .. math:: L_i = \log \sum_{k \ne i} \exp(z_i \cdot z_k / \tau)
                    - \frac{1}{|P_i|} \sum_{p \in P_i} z_i \cdot z_p / \tau

    where P are the other rows with the id of row i; this is the paper's L_out. Rows without a positive contribute
    nothing, and the mean is over the others.

    Args:
        z: [N, D] features in float32, bfloat16, float16 or float64 and with any strides. Normalise them first; this
            function does not.
        ids: int64 [N], the label of each row.
        temperature: tau > 0. A float, or a floating-point tensor of one element, which gets a gradient.
        reduction: "mean", "sum", or "none", [N].
        group, strategy, grad_reduce, even_batches, own_share: for a batch that several processes hold together; see
            :mod:`ssl_kernels.distributed`. Without a group the loss is over the rows of this process alone.
        return_unpaired: also return how many rows have no positive, as a tensor; reading it waits for the device.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features); 0 without any positive pair. With
        ``return_unpaired``, the loss and the count.

    Raises:
        TypeError, ValueError: if an argument does not fit; the message names it, what it got and what it expects.
        RuntimeError: if the gradient is differentiated again, which only the reference backend supports.

    Source: Khosla et al., Supervised Contrastive Learning, 2020, arXiv:2004.11362, equation 2.

    >>> import torch, ssl_kernels.functional as K
    >>> z = torch.nn.functional.normalize(torch.arange(8.0).reshape(4, 2), dim=-1).requires_grad_()
    >>> loss, unpaired = K.sup_con_loss(z, torch.tensor([0, 1, 0, 2]), 0.5, return_unpaired=True)
    >>> loss.backward()
    >>> round(loss.item(), 4), unpaired.item(), tuple(z.grad.shape)
    (1.264, 2, (4, 2))
    """
    (z,) = _checks.autocast_features(z)
    _checks.check_features(z=z)
    _checks.check_row_ids("ids", ids, z)
    _checks.check_choice("reduction", reduction, ("mean", "sum", "none"))
    scale = _checks.as_inverse_temperature("temperature", temperature, z)
    over = across(group, strategy, grad_reduce, even_batches, own_share, reduction)
    pairs = Pairs(ids, ids, False, NO_DIAGONAL, excluded=0)
    backend = choose_backend(z.device, z.dtype, KERNELS)
    if backend == "reference":
        (z,), (scale,), pairs = gathered(over, (z,), (scale,), pairs, what="sup_con_loss", reduction=reduction)
        loss, unpaired = reference(z, pairs, scale, reduction)
    else:
        loss, unpaired = softmax_contrastive(
            z, None, scale, pairs, reduction=reduction, backend=backend, over=over, what="sup_con_loss"
        )
    return (loss, unpaired) if return_unpaired else loss


def reference(z: Tensor, pairs: Pairs, scale: Tensor, reduction: str) -> tuple[Tensor, Tensor]:
    """The definition: dense, differentiable any number of times, in fp32 or float64."""
    dtype = _checks.accumulation_dtype(z.dtype)
    with _checks.without_autocast(z):
        logits = scale * (z.to(dtype) @ z.to(dtype).t())
        losses, paired = dense_losses(logits, *pairs.masks(logits.shape, z.device))
        return reduce_losses(losses, paired, reduction), (~paired).sum()
