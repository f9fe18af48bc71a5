"""The same values and gradients as the peers' own code, and none of their known faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive import features
from memory import saved_bytes
from peers import assert_same, assert_same_signature, assert_same_through_a_model, value_and_gradients
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import SigLipLoss

SCALE, BIAS = 10.0, -10.0


def inputs(batch: int = 96, width: int = 32) -> list[Tensor]:
    return [t.requires_grad_() for t in (*features(batch, batch, width), torch.tensor(SCALE), torch.tensor(BIAS))]


@pytest.mark.parametrize("output_dict", [False, True])
def test_open_clip(output_dict: bool) -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    leaves = inputs()
    peer = open_clip.loss.SigLipLoss(cache_labels=True, rank=0, world_size=1)
    ours = SigLipLoss(cache_labels=True, rank=0, world_size=1)
    a, b = (module(*leaves, output_dict=output_dict) for module in (ours, peer))
    if output_dict:
        assert a.keys() == b.keys()
        a, b = a["contrastive_loss"], b["contrastive_loss"]
    assert_same(value_and_gradients(a, leaves), value_and_gradients(b, leaves))


def test_open_clip_has_the_same_signature() -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    assert_same_signature(SigLipLoss, open_clip.loss.SigLipLoss, "get_logits", "get_ground_truth")


def test_open_clip_without_a_bias() -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    leaves = inputs()[:3]
    ours, theirs = (value_and_gradients(m()(*leaves, None), leaves) for m in (SigLipLoss, open_clip.loss.SigLipLoss))
    assert_same(ours, theirs)


def test_what_open_clip_s_subclasses_call() -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    x, y, scale, bias = inputs(batch=7)
    for call in (
        lambda loss: loss.get_logits(x, y, scale),
        lambda loss: loss.get_logits(x[:3], y, logit_scale=2.0, logit_bias=bias),
        lambda loss: loss.get_ground_truth("cpu", torch.float16, num_logits=7),
        lambda loss: loss.get_ground_truth("cpu", torch.float32, 7, negative_only=True),
    ):
        torch.testing.assert_close(call(SigLipLoss()), call(open_clip.loss.SigLipLoss()), rtol=0, atol=0)


def test_a_subclass_that_overrides_what_open_clip_calls_is_heard() -> None:
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")

    def negatives_only(base: type[Any]) -> Any:
        labels = {"get_ground_truth": lambda self, *arguments, **_: base.get_ground_truth(self, *arguments, True)}
        return type("NegativesOnly", (base,), labels)()

    def theirs(*leaves: Tensor) -> Tensor:
        peer = open_clip.loss.SigLipLoss()
        loss: Tensor = peer._loss(*leaves, negative_only=True)
        return loss

    leaves = inputs()
    assert_same(
        value_and_gradients(negatives_only(SigLipLoss)(*leaves), leaves), value_and_gradients(theirs(*leaves), leaves)
    )


def test_transformers() -> None:
    """SiglipModel's own loss, through the whole model."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from ssl_kernels.integrations.transformers import contrastive_loss

    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipConfig(
        text_config=text | {"vocab_size": 32, "max_position_embeddings": 8},
        vision_config=text | {"image_size": 8, "patch_size": 4},
    )
    model = transformers.SiglipModel(config)
    inputs = {"input_ids": torch.randint(32, (6, 8)), "pixel_values": torch.randn(6, 3, 8, 8)}
    theirs = model(**inputs, return_loss=True).loss
    assert_same_through_a_model(contrastive_loss(model, **inputs), theirs, model)
    inputs = {name: value[:1].expand(600, *value.shape[1:]) for name, value in inputs.items()}
    with saved_bytes() as theirs_saved:
        model(**inputs, return_loss=True)
    with saved_bytes() as ours_saved:
        contrastive_loss(model, **inputs)
    assert sum(theirs_saved) - sum(ours_saved) > 2 * 600 * 600 * 4


def test_fp16_negatives_do_not_vanish_at_a_large_batch() -> None:
    """A peer divides by the batch before it stores the gradient tile in 16 bits: 1/65,536 of a small sigmoid is 0.

    Here the tile is fp32; the 16-bit tile of the GPU has its own test in triton_kernels/test_panels_interpreter.py.
    """
    rows = 65_536
    x = torch.zeros(rows, 4, dtype=torch.float16)
    x[:, 0] = 1
    y = torch.zeros(16, 4, dtype=torch.float16, requires_grad=True)
    loss = K.sigmoid_contrastive_loss(x, y, 10.0, -8.0, offset=rows)  # negatives alone
    (gradient,) = torch.autograd.grad(loss, y)
    expected = 10.0 * torch.sigmoid(torch.tensor(-8.0))
    torch.testing.assert_close(gradient[:, 0].float(), expected.expand(16), rtol=2**-10, atol=0)


def test_the_loss_keeps_fp32_for_half_features() -> None:
    """A peer returns it in the input's dtype, 10.0625 for 10.0916."""
    x, y, *_ = inputs()
    loss = K.sigmoid_contrastive_loss(x.bfloat16(), y.bfloat16(), SCALE, BIAS)
    assert loss.dtype == torch.float32
    assert loss != loss.bfloat16().float()


def test_text_gradients_do_not_accumulate_in_bf16() -> None:
    """Over many row panels of bf16 features the error stays that of one final rounding."""
    x = F.normalize(torch.rand(4096, 16) + 1, dim=-1).bfloat16()
    y = F.normalize(torch.rand(32, 16) + 1, dim=-1).bfloat16().requires_grad_()
    with ssl_kernels.use_workspace(0.01):
        (ours,) = torch.autograd.grad(K.sigmoid_contrastive_loss(x, y, SCALE, BIAS), y)
    wide = y.detach().double().requires_grad_()
    with ssl_kernels.use_backend("reference"):
        (exact,) = torch.autograd.grad(K.sigmoid_contrastive_loss(x.double(), wide, SCALE, BIAS), wide)
    assert ((ours.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all()


def test_memory_of_a_peer_grows_with_the_square_of_the_batch_and_ours_does_not() -> None:
    """open_clip keeps the logits for backward."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    leaves = inputs(batch=1024)
    with saved_bytes() as theirs:
        open_clip.loss.SigLipLoss()(*leaves)
    with saved_bytes() as ours:
        SigLipLoss()(*leaves)
    assert sum(theirs) > 1024 * 1024 * 4
    assert sum(ours) < 3 * 1024 * 32 * 4
