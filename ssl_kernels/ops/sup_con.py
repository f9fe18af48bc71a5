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
    r"""Supervised contrastive loss: rows that share an id attract each other; in memory linear in the batch.

    .. math:: L_i = \log \sum_{k \ne i} \exp(z_i \cdot z_k / \tau)
                    - \frac{1}{|P_i|} \sum_{p \in P_i} z_i \cdot z_p / \tau

    where P are the other rows with the id of row i: the paper's L_out. Rows without any contribute nothing, and the
    mean is over the others.

    Args:
        z: [N, D] features, float32, bfloat16, float16 or float64, any strides. Normalise them first; the function
            does not.
        ids: int64 [N].
        temperature: tau > 0, a float or a floating tensor of one element; gradients flow to tensors.
        reduction: "mean", "sum", or "none", [N].
        group, strategy, grad_reduce, even_batches, own_share: of several processes that hold the batch together, as in
            :mod:`ssl_kernels.distributed`; without a group the loss is of this process alone.
        return_unpaired: return also how many rows have no positive, a tensor that is not read here.

    Returns:
        The loss, accumulated and returned in float32 (float64 for float64 features); 0 without any positive pair. With
        ``return_unpaired``, the loss and the count.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is expected.
        RuntimeError: on double backward, which only the reference backend supports.

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
