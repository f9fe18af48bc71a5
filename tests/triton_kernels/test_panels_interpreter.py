"""The whole op on the Triton backend, several panels and all, in the strict interpreter."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from covering import covering
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K

pytestmark = pytest.mark.usefixtures("strict")
UNIT = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}


def run(backend: str, x: Tensor, y: Tensor, bias: float, weight: Tensor, **options: object) -> list[Tensor]:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = [t.detach().requires_grad_() for t in (x, y, torch.tensor(10.0, dtype=kind), torch.tensor(bias).to(kind))]
    with ssl_kernels.use_backend(backend):
        loss = K.sigmoid_contrastive_loss(*leaves, **options)  # type: ignore[arg-type]
    return [loss.detach(), *torch.autograd.grad(loss, leaves, weight.to(kind).expand(loss.shape))]


@covering(2, dtype=UNIT, reduction=["mean", "none"], same_id=[None, "positive", "ignore"])
def test_values_and_gradients(dtype: torch.dtype, reduction: str, same_id: str | None) -> None:
    x, y = F.normalize(torch.randn(70, 24), dim=1).to(dtype), F.normalize(torch.randn(45, 24), dim=1).to(dtype)
    options: dict[str, object] = {"reduction": reduction, "offset": 3}
    if same_id:
        options |= {"same_id": same_id, "x_ids": torch.randint(9, (70,)), "y_ids": torch.randint(9, (45,))}
    weight = torch.rand(70) if reduction == "none" else torch.tensor(64.0)
    exact = run("reference", x.double(), y.double(), -5.0, weight, **options)
    with ssl_kernels.use_workspace(0.005):  # tiles of about 50 x 50
        ours = run("triton", x, y, -5.0, weight, **options)
    for a, o, unit in zip(ours, exact, (2e-6, UNIT[dtype], UNIT[dtype], 1e-5, 1e-5), strict=True):
        spread = max(o.norm().item(), 1.0 if o.dim() == 0 else 0.0)
        assert (a.double() - o).norm() <= 2 * unit * spread


def test_fp16_keeps_the_gradient_of_confident_negatives() -> None:
    """Sigmoids of 1e-7 are nothing in fp16; here they are all there is."""
    x, y = (F.normalize(torch.rand(40, 16) + 0.1, dim=1).half() for _ in range(2))
    weight = torch.tensor(2.0**20)
    exact = run("reference", x.double(), y.double(), -25.0, weight, offset=1000, reduction="sum")
    ours = run("triton", x, y, -25.0, weight, offset=1000, reduction="sum")
    for a, o in zip(ours[1:3], exact[1:3], strict=True):
        assert (a.double() - o).norm() <= 2**-9 * o.norm()


def test_a_large_row_weight_costs_the_others_no_precision() -> None:
    """The row with the large weight is zero, as a padded one is."""
    x, y = (F.normalize(torch.randn(64, 32), dim=1).half() for _ in range(2))
    x[0] = 0
    weight = torch.ones(64)
    weight[0] = 1e5
    exact = run("reference", x.double(), y.double(), -5.0, weight, reduction="none")
    ours = run("triton", x, y, -5.0, weight, reduction="none")
    assert (ours[2].double() - exact[2]).norm() <= 2**-10 * exact[2].norm()


def test_no_grad_writes_no_tile() -> None:
    x = torch.eye(20, requires_grad=True)
    with torch.no_grad(), ssl_kernels.use_backend("triton"):
        loss = K.sigmoid_contrastive_loss(x, x, 10.0, -5.0)
    with ssl_kernels.use_backend("reference"):
        torch.testing.assert_close(loss, K.sigmoid_contrastive_loss(x.detach(), x.detach(), 10.0, -5.0))


def softmax_losses(dtype: torch.dtype) -> Iterator[tuple[str, Callable[..., Tensor], list[Tensor]]]:
    """Every loss of the family over leaves that get gradients, the scale or temperature last."""
    x, y = (F.normalize(torch.randn(rows, 24), dim=1).to(dtype) for rows in (70, 45))
    queue = F.normalize(torch.randn(90, 24), dim=1).to(dtype)
    x_ids, y_ids = torch.randint(9, (70,)), torch.randint(9, (45,))
    for same_id, smoothing in (("positive", 0.1), ("ignore", 0.0)):
        masks: dict[str, Any] = {"x_ids": x_ids, "y_ids": y_ids, "same_id": same_id, "offset": 3}
        clip = functools.partial(K.clip_loss, **masks, label_smoothing=smoothing)
        yield f"clip {same_id}", clip, [x, y, torch.tensor(10.0)]
    yield "clip rows", functools.partial(K.clip_loss, reduction="none"), [x[:45], y, torch.tensor(10.0)]
    yield "nt_xent", K.nt_xent_loss, [x[:45], y, torch.tensor(0.2)]
    yield "sup_con", lambda z, tau: cast(Tensor, K.sup_con_loss(z, x_ids, tau)), [x, torch.tensor(0.2)]

    def info_nce(query: Tensor, positive: Tensor, scale: Tensor) -> Tensor:
        return K.info_nce_loss(query, positive, queue.to(query.dtype), scale)

    def albef(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        keys = queue.to(image.dtype)
        return K.albef_contrastive_loss(
            image, text, text.detach().flip(1), image.detach().flip(1), keys, keys.flip(0), scale
        )

    yield "info_nce", info_nce, [x[:45], y, torch.tensor(10.0)]
    yield "albef", albef, [x[:45], y, torch.tensor(10.0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_softmax_losses(dtype: torch.dtype) -> None:
    for name, loss, arguments in softmax_losses(dtype):
        results = []
        for backend, kind in (("reference", torch.float64), ("triton", None)):
            leaves = [t.detach().to(kind or t.dtype).requires_grad_() for t in arguments]
            with ssl_kernels.use_backend(backend), ssl_kernels.use_workspace(0.005):  # tiles of about 50 x 50
                value = loss(*leaves)
            weight = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).reshape(value.shape)
            results.append([value.detach(), *torch.autograd.grad(value, leaves, weight)])
        exact, ours = results
        units = [UNIT[dtype]] * len(ours)
        if name.startswith(("clip", "sup_con")):
            units[0] = units[-1] = 1e-5  # in fp32 throughout; the others round normalised rows, or weights of keys
        for a, o, unit in zip(ours, exact, units, strict=True):
            spread = max(o.norm().item(), 1.0 if o.dim() == 0 else 0.0)
            assert (a.double() - o).norm() <= 2 * unit * spread, name


def test_the_queue() -> None:
    queues = [torch.zeros(50, 24) for _ in range(2)]
    pointers = [torch.tensor([40]) for _ in range(2)]
    keys = torch.randn(30, 24)
    for backend, queue, pointer in zip(("reference", "triton"), queues, pointers, strict=True):
        with ssl_kernels.use_backend(backend):
            K.enqueue_(queue, pointer, keys, normalize=True)
    torch.testing.assert_close(queues[1], queues[0])
    assert pointers[0].item() == pointers[1].item() == 20
