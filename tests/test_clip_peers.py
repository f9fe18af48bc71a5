"""The CLIP loss beside the peers' own code: the same values and gradients, and none of their known faults."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive import features
from memory import saved_bytes
from peers import assert_same, assert_same_signature, assert_same_through_a_model, value_and_gradients
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import ClipLoss, SigLipLoss
from ssl_kernels.integrations.open_clip import replaced_losses


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
    assert_same_signature(ClipLoss, open_clip.loss.ClipLoss, "get_logits", "get_ground_truth")


def test_what_open_clip_s_subclasses_call() -> None:
    """Its own loss of distillation, on top of ours; then logits and labels with every argument."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    peer = open_clip.loss.DistillClipLoss
    ours = type("Distillation", (ClipLoss,), {"forward": peer.forward, "dist_loss": peer.dist_loss})()
    leaves = [*inputs(), *inputs(scale=20.0)]
    for a, b in zip(ours(*leaves), peer()(*leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    x, y, scale = inputs(batch=7)
    for call in (
        lambda loss: loss.get_logits(x, y, scale),
        lambda loss: loss.get_logits(x, y, logit_scale=2.0, logit_bias=torch.tensor(-10.0)),
        lambda loss: loss.get_ground_truth("cpu", num_logits=7),
    ):
        torch.testing.assert_close(call(ClipLoss()), call(open_clip.loss.ClipLoss()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["get_logits", "get_ground_truth"])
def test_a_subclass_that_overrides_what_open_clip_calls_is_heard(name: str) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")

    def changed(base: type[Any]) -> Any:
        def method(self: Any, *arguments: Any, **named: Any) -> Any:
            result = getattr(base, name)(self, *arguments, **named)
            return result.flip(0) if isinstance(result, Tensor) else tuple(2 * logits for logits in result)

        return type("Changed", (base,), {name: method})()

    leaves = [*inputs(), torch.tensor(-10.0, requires_grad=True)]
    ours, theirs = (changed(base)(*leaves, output_dict=True) for base in (ClipLoss, open_clip.loss.ClipLoss))
    results = (value_and_gradients(loss["contrastive_loss"], leaves[:3]) for loss in (ours, theirs))
    assert_same(*results)


OPTIONS = {"distill": False, "horovod": False, "local_loss": False, "gather_with_grad": False, "rank": 0}


@pytest.mark.parametrize(("siglip", "expected"), [(False, ClipLoss), (True, SigLipLoss)])
def test_open_clip_builds_our_losses(siglip: bool, expected: type[Any]) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    args = Namespace(model="ViT-B-16", siglip=siglip, world_size=1, loss_dist_impl=None, **OPTIONS)
    with replaced_losses():
        assert type(open_clip.create_loss(args)) is expected
        assert getattr(open_clip.loss, expected.__name__) is expected  # its tasks import it when they are made
    assert type(open_clip.create_loss(args)) is getattr(open_clip.loss, expected.__name__) is not expected


def test_open_clip_s_losses_that_are_not_replaced_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    args = Namespace(model="ViT-B-16", siglip=False, world_size=1, **OPTIONS)
    for change, message in (
        ({"distill": True}, "DistillClipLoss: not in ssl_kernels; build"),
        ({"model": "coca_ViT-B-32", "coca_caption_loss_weight": 2, "coca_contrastive_loss_weight": 1}, "CoCaLoss: not"),
    ):
        with replaced_losses(), pytest.raises(NotImplementedError, match=message):
            open_clip.create_loss(Namespace(**vars(args) | change))
    before = open_clip.factory.ClipLoss
    monkeypatch.delattr(open_clip.factory, "SigLipLoss")
    with pytest.raises(ImportError, match=r"open_clip.factory has no SigLipLoss: this version"), replaced_losses():
        pass
    assert open_clip.factory.ClipLoss is before


def test_transformers() -> None:
    """CLIPModel's own loss, through the whole model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    from ssl_kernels.integrations.transformers import contrastive_loss

    config = transformers.CLIPConfig(
        text_config=tower | {"vocab_size": 32, "max_position_embeddings": 8},
        vision_config=tower | {"image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    model = transformers.CLIPModel(config)
    inputs = {"input_ids": torch.randint(32, (6, 8)), "pixel_values": torch.randn(6, 3, 8, 8), "return_loss": True}
    inputs["attention_mask"] = torch.ones(6, 8, dtype=torch.int64).tril(2)
    assert_same_through_a_model(contrastive_loss(model, **inputs), model(**inputs).loss, model)
    with pytest.raises(TypeError, match="model: expected a CLIPModel or SiglipModel of transformers, got Linear"):
        contrastive_loss(torch.nn.Linear(1, 1), **inputs)


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
