"""The driver's products: every library and dtype, any strides."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import ssl_kernels.functional as K
from ssl_kernels.ops import matmul as module
from ssl_kernels.ops.matmul import add_matmul, matmul, onednn_is_faster

LIBRARIES = [
    False,
    pytest.param(
        True,
        marks=pytest.mark.skipif(
            not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"),
            reason="this torch has no oneDNN",
        ),
    ),
]


@pytest.fixture(params=LIBRARIES, ids=lambda onednn: "onednn" if onednn else "torch.mm")
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "onednn_is_faster", lambda: request.param)
    monkeypatch.setattr(module, "_ONEDNN_FROM", 1)


def operands(m: int, k: int, n: int, layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a, b = torch.randn(m, k, dtype=dtype), torch.randn(k, n, dtype=dtype)
    if layout == "transposed":
        return a.t().contiguous().t(), b.t().contiguous().t()
    if layout == "stepped":
        return torch.randn(2 * m, 3 * k, dtype=dtype)[::2, ::3], torch.randn(k, 2 * n, dtype=dtype)[:, ::2]
    if layout == "expanded":
        return a[:1].expand(m, k), b[:, :1].expand(k, n)
    return a, b


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "stepped", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (3, 17, 5), (130, 65, 33), (1, 300, 64), (70, 1, 9), (4, 0, 3)])
def test_products(layout: str, dtype: torch.dtype, m: int, k: int, n: int) -> None:
    a, b = operands(m, k, n, layout, dtype)
    expected = a.double() @ b.double()
    torch.testing.assert_close(matmul(a, b).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulation_into_a_strided_slice(dtype: torch.dtype) -> None:
    a, b = operands(20, 30, 7, "contiguous", dtype)
    whole = torch.full((20, 21), torch.nan)
    out = whole[:, 7:14]
    add_matmul(out, a, b, first=True)
    add_matmul(out, 2 * a, b, first=False)
    torch.testing.assert_close(out.double(), 3 * a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    assert whole[:, :7].isnan().all()
    assert whole[:, 14:].isnan().all()


@pytest.mark.usefixtures("library")
def test_the_loss_is_the_same_through_either_library() -> None:
    x, y = torch.randn(90, 12, requires_grad=True), torch.randn(70, 12, requires_grad=True)
    K.sigmoid_contrastive_loss(x, y, 0.5, -1.0).backward()
    with torch.no_grad():
        z = 0.5 * x @ y.t() - 1.0
        grad = torch.sigmoid(z) - (torch.arange(70) == torch.arange(90)[:, None]).float()
    torch.testing.assert_close(x.grad, 0.5 / 90 * grad @ y, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(y.grad, 0.5 / 90 * grad.t() @ x, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
@pytest.mark.parametrize("widens", [True, False])
def test_16_bit_panels_on_cuda_add_into_fp32(widens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that a GPU gets, whether its torch adds and widens at once or not, checked without one."""
    with FakeTensorMode():
        if widens and not module._addmm_widens.__wrapped__(torch.device("cuda"), torch.bfloat16, torch.float32):
            pytest.skip(f"torch {torch.__version__} cannot say what its addmm(out_dtype=) would return")
        monkeypatch.setattr(module, "_addmm_widens", lambda *_: widens)
        out = torch.empty(20, 21, device="cuda")[:, 7:14]
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            a = torch.empty(20, 30, dtype=dtype, device="cuda")
            b = torch.empty(30, 7, dtype=dtype, device="cuda")
            add_matmul(out, a, b, first=True)
            add_matmul(out, a, b, first=False)
        assert out.dtype == torch.float32


def test_a_torch_whose_addmm_does_not_widen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a CPU does not: it is asked once, and then the product is made in fp32 and added."""
    calls, addmm = [], torch.addmm

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append("addmm")
        return addmm(*arguments, **options)

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        calls.append("mm")
        return a.to(out_dtype) @ b.to(out_dtype)

    widens = functools.cache(module._addmm_widens.__wrapped__)  # whatever this process was told before
    monkeypatch.setattr(module, "_addmm_widens", widens)
    monkeypatch.setattr(torch, "addmm", counted)
    monkeypatch.setattr(torch, "mm", mm)
    a, b = torch.randn(20, 30).bfloat16(), torch.randn(30, 7).bfloat16()
    out = torch.full((20, 21), torch.nan)[:, 7:14]
    module._add_widened(out, a, b, True)
    module._add_widened(out, 2 * a, b, False)
    torch.testing.assert_close(out.double(), 3 * a.double() @ b.double(), rtol=1e-5, atol=1e-4)
    assert calls == ["addmm", "mm", "mm"]


def test_the_choice_is_fixed_by_the_processor() -> None:
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    for vendor, expected in (("intel", False), ("unknown", False), ("amd", has_avx512)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module._C, "cpu_vendor", lambda vendor=vendor: vendor)
            assert onednn_is_faster.__wrapped__() == (expected and torch.backends.mkldnn.is_available())
