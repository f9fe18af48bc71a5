"""ALBEF's image-text contrastive loss against its definition in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from contrastive import BACKENDS, FUSED, HALF_EPS, distance, dtypes, lay_out, layouts, unit_rows, workspaces_mb
from hypothesis import given
from hypothesis import strategies as st
from memory import linux_only, peak_mb, saved_bytes
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import ALBEFContrastiveLoss


class Result(NamedTuple):
    loss: Tensor
    dimage: Tensor
    dtext: Tensor
    dscale: Tensor


class Features(NamedTuple):
    image: Tensor
    text: Tensor
    image_momentum: Tensor
    text_momentum: Tensor
    image_queue: Tensor
    text_queue: Tensor


def features(
    rows: int, queued: int, width: int, dtype: torch.dtype = torch.float32, queue_dtype: torch.dtype | None = None
) -> Features:
    """Momentum features lie beside the student's, as in training."""
    image, text = unit_rows(rows, width), unit_rows(rows, width)
    momentum = [F.normalize(t + 0.3 * torch.randn_like(t), dim=-1) for t in (image, text)]
    queues = [unit_rows(queued, width, queue_dtype or dtype) for _ in range(2)]
    return Features(*(t.to(dtype) for t in (image, text, *momentum)), *queues)


def run(backend: str, inputs: Features, scale: float, alpha: float, weight: Tensor, **options: Any) -> Result:
    kind = torch.float64 if inputs.image.dtype == torch.float64 else torch.float32
    leaves = [inputs.image.detach(), inputs.text.detach(), torch.tensor(scale, dtype=kind)]
    image, text, t = (leaf.requires_grad_() for leaf in leaves)
    with ssl_kernels.use_backend(backend):
        loss = K.albef_contrastive_loss(image, text, *inputs[2:], t, alpha, **options)
        loss.backward(weight.to(loss.dtype))
    assert all(leaf.grad is not None for leaf in leaves)
    return Result(loss.detach(), *(leaf.grad for leaf in leaves))  # type: ignore[misc]


def oracle(inputs: Features, *arguments: Any, **options: Any) -> Result:
    return run("reference", Features(*(t.double() for t in inputs)), *arguments, **options)


ONE = torch.ones(())


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.usefixtures("poisoned_memory")
@given(
    rows=st.integers(1, 30),
    queued=st.integers(0, 60),
    width=st.integers(1, 40),
    dtype=dtypes,
    queue_dtype=dtypes,
    layout=layouts,
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    scale=st.sampled_from([0.0, 0.3, 14.3, 100.0]),
    workspace_mb=workspaces_mb,
    seed=st.integers(0, 2**16),
)
def test_matches_the_float64_reference(
    backend: str, rows: int, queued: int, width: int, dtype: torch.dtype, queue_dtype: torch.dtype, layout: str,
    alpha: float, reduction: str, scale: float, workspace_mb: float, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    inputs = Features(*(lay_out(t, layout) for t in features(rows, queued, width, dtype, queue_dtype)))
    weight = torch.randn(rows) if reduction == "none" else torch.tensor(-1.7)
    with ssl_kernels.use_workspace(workspace_mb):
        ours = run(backend, inputs, scale, alpha, weight, reduction=reduction)
    exact = oracle(inputs, scale, alpha, weight, reduction=reduction)
    eager = run("reference", Features(*(t.float() for t in inputs)), scale, alpha, weight, reduction=reduction)
    assert ours.loss.dtype == torch.float32
    assert ours.dimage.dtype == ours.dtext.dtype == dtype
    # The loss is a difference of logits, the gradients of unit vectors that may be alike.
    upstream = weight.norm().item() * (1 / rows**0.5 if reduction == "mean" else rows**0.5 if reduction == "sum" else 1)
    logit = 3e-7 * (1 + scale) * upstream
    terms = {"loss": logit * rows**0.5, "dimage": logit * scale, "dtext": logit * scale, "dscale": logit}
    for name in Result._fields:
        a, e, o = (getattr(r, name) for r in (ours, eager, exact))
        assert a.shape == o.shape
        eps = HALF_EPS.get(dtype, 1e-6) if name in ("dimage", "dtext") else 1e-6
        subnormal = 2**-25 * a.numel() ** 0.5 if a.dtype == torch.float16 else 1e-30
        assert distance(a, o) <= 2 * distance(e, o) + eps * o.norm().item() + terms[name] + subnormal, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_equation_of_the_paper(backend: str, alpha: float) -> None:
    """H(y, p) of equation 6 with pseudo-targets, both directions, with queues stored as [features, keys]."""
    inputs = features(8, 40, 16)
    image_queue, text_queue = (queue.t().contiguous() for queue in inputs[4:])
    temperature = torch.tensor(0.07, requires_grad=True)
    image, text = (t.clone().requires_grad_() for t in inputs[:2])
    total = torch.zeros(())
    for query, query_m, keys_m, queue in (
        (image, inputs.image_momentum, inputs.text_momentum, text_queue),
        (text, inputs.text_momentum, inputs.image_momentum, image_queue),
    ):
        keys = torch.cat([keys_m.t(), queue], 1)
        p = (query @ keys / temperature).softmax(1)
        q = (query_m @ keys / temperature.detach()).softmax(1)
        y = torch.cat([torch.eye(8), torch.zeros(8, 40)], 1)
        total = total - ((alpha * q + (1 - alpha) * y) * p.log()).sum(1).mean() / 2
    leaves = (image, text, temperature)
    expected = torch.autograd.grad(total, leaves)
    with ssl_kernels.use_backend(backend):
        loss = ALBEFContrastiveLoss(alpha)(
            image, text, inputs.image_momentum, inputs.text_momentum, image_queue.t(), text_queue.t(), 1 / temperature
        )
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_gradcheck(backend: str) -> None:
    inputs = Features(*(t.double() for t in features(4, 6, 3)))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.0005):
        assert torch.autograd.gradcheck(lambda x, y: K.albef_contrastive_loss(x, y, *inputs[2:], 3.0), leaves)
        # The targets follow the scale too, without gradient: it is exact where there are none to follow.
        assert torch.autograd.gradcheck(lambda t: K.albef_contrastive_loss(*inputs, t, alpha=0.0), (scale,))


def test_the_targets_pass_no_gradient_to_the_scale() -> None:
    """With student and momentum features equal, soft targets are the prediction itself: its entropy has a slope, but
    the cross-entropy against constant targets is at its minimum."""
    image, text, *_, image_queue, text_queue = features(6, 20, 8)
    scale = torch.tensor(5.0, requires_grad=True)
    inputs = (image, text, image, text, image_queue, text_queue)
    (slope,) = torch.autograd.grad(K.albef_contrastive_loss(*inputs, scale, alpha=1.0), scale)
    assert slope.abs() < 1e-6


@pytest.mark.parametrize("backend", FUSED)
def test_swapping_images_and_texts_swaps_their_gradients(backend: str) -> None:
    inputs = features(9, 30, 8)
    swapped = Features(*(inputs[i] for i in (1, 0, 3, 2, 5, 4)))
    a, b = run(backend, inputs, 14.0, 0.4, ONE), run(backend, swapped, 14.0, 0.4, ONE)
    for x, y in zip(a, (b.loss, b.dtext, b.dimage, b.dscale), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", FUSED)
def test_queued_keys_count_as_keys_of_the_batch_would(backend: str) -> None:
    """Without soft targets, a queue that holds the rest of a batch completes its sums."""
    whole, empty = features(12, 0, 8), torch.empty(0, 8)
    expected = run(backend, whole, 14.0, 0.0, torch.ones(12), reduction="none")
    part = Features(*(t[:5] for t in whole[:4]), whole.image_momentum[5:], whole.text_momentum[5:])
    assert whole.image_queue.shape == empty.shape
    ours = run(backend, part, 14.0, 0.0, torch.ones(5), reduction="none")
    torch.testing.assert_close(ours.loss, expected.loss[:5], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.dimage, expected.dimage[:5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "queued"), [(0, 0), (0, 5), (1, 0)])
def test_empty_and_tiny_inputs(backend: str, rows: int, queued: int) -> None:
    inputs = features(rows, queued, 4)
    result = run(backend, inputs, 2.0, 0.4, ONE, reduction="sum")
    assert all(t.isfinite().all() for t in result)
    mean = run(backend, inputs, 2.0, 0.4, ONE)
    assert mean.loss.isnan() if rows == 0 else mean.loss.abs() < 1e-6  # a single key has all the probability


def test_autocast() -> None:
    inputs = features(9, 30, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = K.albef_contrastive_loss(*inputs, 14.0)
    rounded = Features(*(t.bfloat16() for t in inputs[:4]), *inputs[4:])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), oracle(rounded, 14.0, 0.4, ONE).loss, rtol=1e-6, atol=1e-6)


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    inputs = features(9, 30, 8)

    def gradients(function: Any) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (*inputs[:2], torch.tensor(14.0))]
        value = function(*leaves[:2], *inputs[2:], leaves[2])
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    compiled = torch.compile(K.albef_contrastive_loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(K.albef_contrastive_loss), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@linux_only
def test_memory_knows_nothing_of_the_queue() -> None:
    """ALBEF keeps the logits and the targets of both directions, 64 MB each here, and four copies of the queue."""
    inputs = features(128, 2**17, 64)
    leaves = [t.requires_grad_() for t in inputs[:2]]
    K.albef_contrastive_loss(*leaves, *inputs[2:4], inputs[4][:64], inputs[5][:64], 10.0).backward()

    def step() -> None:
        with saved_bytes() as sizes:
            loss = K.albef_contrastive_loss(*leaves, *inputs[2:], 10.0)
        assert sum(sizes) <= 10 * 128 * 64 * 4
        loss.backward()

    assert peak_mb(step, calls=3) < 20


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_is_a_fraction(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha: expected a number in \\[0, 1\\], got {alpha}"):
        K.albef_contrastive_loss(*features(3, 4, 2), 10.0, alpha)


def test_the_module_takes_an_alpha_for_one_call() -> None:
    inputs = features(5, 9, 4)
    assert torch.equal(
        ALBEFContrastiveLoss(0.4)(*inputs, 10.0, alpha=0.1), K.albef_contrastive_loss(*inputs, 10.0, 0.1)
    )
    assert torch.equal(ALBEFContrastiveLoss()(*inputs, 10.0), K.albef_contrastive_loss(*inputs, 10.0, 0.4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"text": torch.ones(2, 4)}, ValueError, "text: expected 3 rows, one to a query, got 2"),
        ({"text_momentum": torch.ones(3, 4).half()}, TypeError, "text_momentum: expected the dtype of image"),
        ({"image_momentum": torch.ones(3, 4, requires_grad=True)}, ValueError, r"image_momentum: .* detach\(\)"),
        ({"text_queue": torch.ones(4, 7)}, ValueError, "text_queue: expected 4 features as the query has, got 7"),
        ({"image_queue": torch.ones(7, 4, requires_grad=True)}, ValueError, r"image_queue: .* detach\(\)"),
        ({"alpha": "half"}, TypeError, "alpha: expected a float, got str"),
        ({"reduction": "avg"}, ValueError, "reduction: expected one of 'mean', 'sum', 'none', got 'avg'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = features(3, 7, 4)._asdict() | {"scale": 10.0}
    with pytest.raises(error, match=message):
        K.albef_contrastive_loss(**(arguments | change))
