"""DINO's projection head, which loads its authors' checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kernels.ops._checks import accumulation_dtype
from ssl_kernels.ops.unit_rows import unit_rows


class DINOHead(nn.Module):
    r"""DINO's projection head: an MLP, a normalised bottleneck, and its products with ``out_dim`` prototypes.

    .. math::

        z = \mathrm{mlp}(x) / \lVert \mathrm{mlp}(x) \rVert, \qquad
        \ell_k = g_k \, \langle z, v_k / \lVert v_k \rVert \rangle

    The weights have Meta's names (``mlp.0.weight``, ``last_layer.weight_g``, ``last_layer.weight_v``), so the head of a
    DINO or iBOT checkpoint loads as it is. The names of lightly's ``DINOProjectionHead`` and of PyTorch's
    ``parametrizations`` load too. Where lightly's linear layers have no bias, before BatchNorm, the bias is set to
    zero.

    Args:
        in_dim: width of the features.
        out_dim: number of prototypes K; 65,536 on ImageNet, and far fewer on little data.
        hidden_dim: width of the hidden layers.
        bottleneck_dim: width of the bottleneck.
        layers: the number of linear layers in the MLP, at least 1, with a GELU between two of them.
        batch_norm: put BatchNorm before each GELU, which helps convolutional and small networks.
        norm_last_layer: True fixes every g to 1, which steadies training; False learns them.
        freeze_last_layer: the number of first epochs in which :meth:`cancel_last_layer_gradients` keeps the prototypes
            as they are.

    It takes features ``[..., in_dim]``, or ``[N, in_dim]`` with BatchNorm, and returns logits ``[..., out_dim]``. A
    16-bit bottleneck is normalised in float32.

    Raises:
        ValueError: if a size is less than 1 or ``freeze_last_layer`` is negative.

    Source: Caron et al., Emerging Properties in Self-Supervised Vision Transformers, 2021, arXiv:2104.14294.

    >>> import torch
    >>> from ssl_kernels import DINOHead
    >>> head = DINOHead(8, 32, hidden_dim=16, bottleneck_dim=4)
    >>> logits = head(torch.randn(5, 8))
    >>> logits.shape, bool(logits.abs().max() <= 1.0001)
    (torch.Size([5, 32]), True)
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
        freeze_last_layer: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "out_dim": out_dim, "hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim,
                 "layers": layers}  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        if freeze_last_layer < 0:
            raise ValueError(f"freeze_last_layer: expected a number of epochs >= 0, got {freeze_last_layer}")
        self.freeze_last_layer = freeze_last_layer
        parts: list[nn.Module] = []
        width = in_dim
        for _ in range(layers - 1):
            parts.append(nn.Linear(width, hidden_dim))
            parts += [nn.BatchNorm1d(hidden_dim)] if batch_norm else []
            parts.append(nn.GELU())
            width = hidden_dim
        last = nn.Linear(width, bottleneck_dim)
        self.mlp = nn.Sequential(*parts, last) if parts else last  # a single layer has no number in Meta's names
        self.last_layer = _Prototypes(bottleneck_dim, out_dim, norm_last_layer)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.register_load_state_dict_pre_hook(_rename)

    def forward(self, x: Tensor) -> Tensor:
        """The logits [..., out_dim] of features [..., in_dim]."""
        z = self.mlp(x)
        z = unit_rows(z.to(accumulation_dtype(z.dtype)))
        logits: Tensor = self.last_layer(z)
        return logits

    def cancel_last_layer_gradients(self, epoch: int) -> None:
        """Drop the prototypes' gradients in the first epochs, counted from 0. Call it between ``backward`` and the
        optimizer step."""
        if epoch < self.freeze_last_layer:
            for parameter in self.last_layer.parameters():
                parameter.grad = None


class _Prototypes(nn.Module):
    """A linear layer without bias whose row k is g_k v_k / |v_k|, as `torch.nn.utils.weight_norm` has it.

    The normalised weight is not kept between calls, so that the layer can be copied at any time.
    """

    def __init__(self, in_dim: int, out_dim: int, fixed: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not fixed)
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.trunc_normal_(self.weight_v, std=0.02)

    def forward(self, z: Tensor) -> Tensor:
        v = self.weight_v
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True, dtype=accumulation_dtype(v.dtype))
        return F.linear(z.to(v.dtype), (v * (self.weight_g / norm)).to(v.dtype))


def _rename(head: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Other spellings of a head's weights become ours, in place."""
    spellings = {
        "layers.": "mlp.",
        "last_layer.parametrizations.weight.original0": "last_layer.weight_g",
        "last_layer.parametrizations.weight.original1": "last_layer.weight_v",
    }
    for name in [name for name in state if name.startswith(prefix)]:
        for other, ours in spellings.items():
            if name.startswith(prefix + other):
                state[prefix + ours + name.removeprefix(prefix + other)] = state.pop(name)
    if any(name.startswith(f"{prefix}mlp.") and name.endswith("running_mean") for name in state):
        for name, parameter in head.named_parameters():
            if name.startswith("mlp.") and name.endswith(".bias") and prefix + name.replace("bias", "weight") in state:
                state.setdefault(prefix + name, torch.zeros_like(parameter))
