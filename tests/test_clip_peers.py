"""The CLIP loss beside the peers' own code: the same values and gradients, and none of their known faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive import features
from memory import saved_bytes
from peers import assert_same, assert_same_signature, assert_same_through_a_model, value_and_gradients
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import ClipLoss


def inputs(batch: int = 96, width: int = 32, scale: float = 14.3) -> list[Tensor]:
    return [t.requires_grad_() for t in (*features(batch, batch, width), torch.tensor(scale))]


@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("output_dict", [False, True])
def test_open_clip(output_dict: bool, scale: float) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    leaves = inputs(scale=scale)
    arguments: dict[str, Any] = {"local_loss": False, "cache_labels": True, "rank": 0, "world_size": 1}
    a, b = (module(**arguments)(*leaves, output_dict=output_dict) for module in (ClipLoss, open_clip.loss.ClipLoss))
    if output_dict:
        assert a.keys() == b.keys()
        a, b = a["contrastive_loss"], b["contrastive_loss"]
    assert_same(value_and_gradients(a, leaves), value_and_gradients(b, leaves))


def test_open_clip_with_a_logit_bias() -> None:
    """It has no effect, and its gradient is 0 but for rounding."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    leaves = [*inputs(), torch.tensor(-10.0, requires_grad=True)]
    ours, theirs = (value_and_gradients(m()(*leaves), leaves) for m in (ClipLoss, open_clip.loss.ClipLoss))
    assert_same(ours[:-1], theirs[:-1])
    assert ours[-1] == 0
    assert theirs[-1].abs() < 1e-6


def test_open_clip_has_the_same_signature() -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    assert_same_signature(ClipLoss, open_clip.loss.ClipLoss)


def test_transformers() -> None:
    """CLIPModel's own loss, through the whole model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 32, "max_position_embeddings": 8},
        vision_config=tower | {"image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    tokens, pixels = torch.randint(32, (6, 8)), torch.randn(6, 3, 8, 8)
    output = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
    ours = K.clip_loss(output.text_embeds, output.image_embeds, model.logit_scale.exp())
    assert_same_through_a_model(ours, output.loss, model)


def test_several_captions_to_an_image() -> None:
    """5 captions each: a caption's only positive is its image, and an image's target is spread over its captions."""
    x, y = features(12, 60, 16)
    image_of = torch.arange(60) // 5
    leaves = [x.requires_grad_(), y.requires_grad_()]
    ours = K.clip_loss(*leaves, 14.3, x_ids=torch.arange(12), y_ids=image_of, offset=60)
    z = 14.3 * x @ y.t()
    spread = (image_of == torch.arange(12)[:, None]) / 5
    plain = (F.cross_entropy(z, spread) + F.cross_entropy(z.t(), image_of)) / 2
    assert_same(value_and_gradients(ours, leaves), value_and_gradients(plain, leaves))


def test_memory_of_a_peer_grows_with_the_square_of_the_batch_and_ours_does_not() -> None:
    """open_clip keeps the logits of both directions for backward."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    leaves = inputs(batch=1024)
    with saved_bytes() as theirs:
        open_clip.loss.ClipLoss()(*leaves)
    with saved_bytes() as ours:
        ClipLoss()(*leaves)
    assert sum(theirs) > 2 * 1024 * 1024 * 4
    assert sum(ours) < 3 * 1024 * 32 * 4
