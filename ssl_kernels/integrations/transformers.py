"""The loss of transformers' CLIP and SigLIP models, without their logits."""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn

from ssl_kernels.losses import ClipLoss, SigLipLoss
from ssl_kernels.ops.unit_rows import unit_rows


def contrastive_loss(
    model: nn.Module,
    *,
    input_ids: Tensor,
    pixel_values: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    return_loss: bool = True,
    **options: Any,
) -> Tensor:
    """``model(..., return_loss=True).loss`` of a ``CLIPModel`` or ``SiglipModel``, in memory linear in the batch.

    ``model(...)`` computes the B x B logits even if nobody needs them. This function calls the model's
    ``get_text_features`` and ``get_image_features`` instead.

    With ``DistributedDataParallel``, wrap a module whose ``forward`` calls this function, because the wrapper must see
    the call. Each process then has the loss of its own batch, as with ``model(...)``.

    Args:
        model: a ``CLIPModel`` or a ``SiglipModel``.
        input_ids, pixel_values, attention_mask, position_ids, interpolate_pos_encoding, options: what ``model`` takes.
        return_loss: accepted and ignored.

    Raises:
        TypeError: if ``model`` is another model.
        ValueError: if there are not as many texts as images.

    >>> import torch, transformers
    >>> from ssl_kernels.integrations.transformers import contrastive_loss
    >>> tower = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    >>> text, vision = tower | {"vocab_size": 9}, tower | {"image_size": 4, "patch_size": 2}
    >>> model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
    >>> inputs = {"input_ids": torch.randint(9, (5, 3)), "pixel_values": torch.randn(5, 3, 4, 4)}
    >>> torch.allclose(contrastive_loss(model, **inputs), model(**inputs, return_loss=True).loss)
    True
    """
    if not isinstance(model, transformers.CLIPModel | transformers.SiglipModel):
        raise TypeError(f"model: expected a CLIPModel or SiglipModel of transformers, got {type(model).__name__}")
    images = model.get_image_features(
        pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **options
    )
    texts = model.get_text_features(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options
    )
    text = unit_rows(_pooled(texts))
    image = unit_rows(_pooled(images)).to(text.device)
    scale = model.logit_scale.exp()
    if isinstance(model, transformers.CLIPModel):
        return ClipLoss()(image, text, scale)
    return SigLipLoss()(image, text, scale, model.logit_bias)


def _pooled(features: Any) -> Tensor:
    """Before version 5 of transformers the features are a tensor."""
    pooled: Tensor = features if isinstance(features, Tensor) else features[1]
    return pooled
