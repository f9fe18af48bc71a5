"""Every module that normalises: rows of zeros and rows of any length in float16, against the module in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_kernels import DINOHead, KeyQueue, KoLeoLoss, MoCoLoss, MoCoV3Loss, NTXentLoss
from ssl_kernels.integrations.solo import mocov3_loss_func, simclr_loss_func
from ssl_kernels.ops.unit_rows import fused_unit_rows


def bank(dtype: torch.dtype) -> NTXentLoss:
    loss = NTXentLoss(0.5, (64, 32))
    assert loss.memory_bank is not None
    loss.memory_bank.keys.copy_(torch.linspace(-1, 1, 64 * 32).view(64, 32).sin())
    return loss.to(dtype)


def queue(dtype: torch.dtype) -> KeyQueue:
    return KeyQueue(64, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def metric_learning(name: str) -> nn.Module:
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from ssl_kernels.integrations import pytorch_metric_learning

    module: nn.Module = getattr(pytorch_metric_learning, name)(0.5)
    return module


MODULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "NTXentLoss": lambda a, b: NTXentLoss(0.5)(a, b),
    "NTXentLoss with a bank": lambda a, b: bank(a.dtype)(a, b),
    "MoCoLoss": lambda a, b: MoCoLoss(0.5)(a, b, queue(a.dtype)),
    "MoCoV3Loss": lambda a, b: MoCoV3Loss(0.5)(a, a, b, b),
    "solo-learn's MoCo v3": lambda a, b: mocov3_loss_func(a, b, 0.5),
    "solo-learn's SimCLR": lambda a, b: simclr_loss_func(torch.cat([a, b]), torch.arange(len(a)).repeat(2), 0.5),
    "SupConLoss": lambda a, b: metric_learning("SupConLoss")(torch.cat([a, b]), torch.arange(len(a)).repeat(2)),
    "NTXentLoss of metric learning": lambda a, b: metric_learning("NTXentLoss")(
        torch.cat([a, b]), torch.arange(len(a)).repeat(2)
    ),
    "KoLeoLoss": lambda a, b: KoLeoLoss()(torch.cat([a, b])),
}


@pytest.mark.parametrize("module", MODULES)
def test_float16_rows_of_any_length(module: str) -> None:
    """The row of zeros is left out of the gradients: its own is divided by 1e-12, which float16 does not hold."""
    a, b = torch.randn(2, 5, 32)
    a[1] = 0
    a[2:4] *= torch.tensor([[2e4], [1e-4]])
    b[3:] *= torch.tensor([[2e4], [1e-4]])
    halves, doubles = [], []
    for dtype, results in ((torch.float16, halves), (torch.float64, doubles)):
        query = a.half().to(dtype).requires_grad_()
        loss = MODULES[module](query, b.half().to(dtype))
        results += [loss.detach().double(), torch.autograd.grad(loss, query)[0].double()]
    torch.testing.assert_close(halves[0], doubles[0], rtol=2e-3, atol=0)
    assert not halves[1].isnan().any()
    for ours, exact in zip(halves[1][[0, 2, 3, 4]], doubles[1][[0, 2, 3, 4]], strict=True):
        assert (ours - exact).norm() <= 0.02 * exact.norm() + 2e-7  # the latter is the rounding of 32 numbers


def test_float32_rows_whose_squares_float32_does_not_hold() -> None:
    z = torch.randn(4, 32) * torch.tensor([[1e-11], [1.0], [1e25], [1e37]])
    torch.testing.assert_close(fused_unit_rows(z), F.normalize(z.double()).float())


def test_a_row_of_zeros_does_not_spoil_the_memory_bank() -> None:
    """Under autocast the rows are float16 though the model is float32."""
    loss, encoder, x = bank(torch.float32), nn.Linear(8, 32, bias=False), torch.randn(4, 8)
    x[1] = 0
    with torch.autocast("cpu", torch.float16):
        z = encoder(x)
        assert z.dtype == torch.float16
        first, second = loss(z, z.detach()), loss(z, z.detach())
    assert loss.memory_bank is not None
    torch.testing.assert_close(loss.memory_bank.keys[:4], F.normalize(z.float(), dim=1), rtol=2e-3, atol=1e-4)
    assert torch.stack([first, second]).isfinite().all()


@pytest.mark.parametrize("length", [5e4, 1e-5])
def test_prototypes_of_any_length_in_float16(length: float) -> None:
    head = DINOHead(8, 6, hidden_dim=8, bottleneck_dim=16)
    head.last_layer.weight_v.data.uniform_(-length, length)
    head.half()
    z = torch.randn(4, 16)
    v = head.last_layer.weight_v.double()
    expected = F.normalize(z.double()) @ F.normalize(v).t()
    torch.testing.assert_close(head.last_layer(F.normalize(z)).double(), expected, rtol=0, atol=4e-3)
