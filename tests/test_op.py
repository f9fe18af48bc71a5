"""The two ways to an op: what traces, transforms or watches a call meets the op itself, and gets the right numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import ssl_kernels as S
import ssl_kernels.functional as K

SCALE, BIAS, KEYS = torch.tensor(3.0), torch.tensor(-1.0), torch.eye(3)
LOSSES: dict[str, Callable[..., Tensor]] = {
    "clip": lambda x, y, **options: K.clip_loss(x, y, SCALE, **options),
    "rows": lambda x, y, **options: K.row_softmax_loss(x, y, SCALE, candidate_bias=x.detach()[:, 0], **options),
    "sigmoid": lambda x, y, **options: K.sigmoid_contrastive_loss(x, y, SCALE, BIAS, **options),
    "nt_xent": lambda x, y, **options: K.nt_xent_loss(x, y, 0.5, **options),
    "info_nce": lambda x, y, **options: K.info_nce_loss(x, y, KEYS, SCALE, **options),
    "koleo": lambda x, y, **options: K.koleo_loss(x, **options),
}
both = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
TRACED = ("info_nce", "koleo")  # arguments without a list


def views() -> tuple[Tensor, Tensor]:
    return F.normalize(torch.randn(5, 3), dim=1).requires_grad_(), F.normalize(torch.randn(5, 3), dim=1)


@pytest.mark.parametrize("name", LOSSES)
def test_tracing_keeps_the_op_or_is_refused_instead_of_baking_numbers_in(name: str) -> None:
    loss, (x, y) = LOSSES[name], views()
    refusal = pytest.raises(RuntimeError, match="Tracing a list of")
    with torch.no_grad(), contextlib.nullcontext() if name in TRACED else refusal:
        traced = torch.jit.trace(lambda x, y: loss(x, y), (x, y), check_trace=False)
        torch.testing.assert_close(traced(2 * x, y), loss(2 * x, y))


@both
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_gradients_are_those_one_by_one(loss: Callable[..., Tensor], reduction: str) -> None:
    x, y = views()
    value = loss(x, y, reduction=reduction).reshape(-1)
    upstream = torch.randn(4, len(value))
    (batched,) = torch.autograd.grad(value, x, upstream, is_grads_batched=True, retain_graph=True)
    for found, weights in zip(batched, upstream, strict=True):
        (single,) = torch.autograd.grad(value, x, weights, retain_graph=True)
        torch.testing.assert_close(found, single)


def test_batched_gradients_of_dino() -> None:
    student, teacher = torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 6)
    rows = K.dino_loss(student, teacher, reduction="none")
    (total,) = torch.autograd.grad(rows.sum(), student, retain_graph=True)
    for retain_graph in (True, False):
        (batched,) = torch.autograd.grad(rows, student, torch.eye(4), retain_graph, is_grads_batched=True)
        torch.testing.assert_close(batched.sum(0), total)


@pytest.mark.parametrize("name", ["clip", "sigmoid"])
def test_transforms_of_something_else(name: str) -> None:
    loss, (x, y) = LOSSES[name], views()
    t = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(torch.func.grad(lambda t: (t * t).sum() + loss(x, y))(t), 2 * t)
    torch.testing.assert_close(torch.vmap(lambda t: t + loss(x.detach(), y))(t), t + loss(x, y).detach())


@both
def test_modes_see_the_op_and_not_what_it_is_made_of(loss: Callable[..., Tensor]) -> None:
    class Functions(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **kwargs or {})

    class Dispatches(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(function))
            return function(*args, **kwargs or {})

    x, y = views()
    expected = loss(x, y)
    for mode in (Functions, Dispatches):
        seen: list[str] = []
        with mode():
            torch.testing.assert_close(loss(x, y).detach(), expected.detach())
        assert any("ssl_kernels." in name for name in seen)
        assert not any("_panel_" in name or "softmax_stats_" in name or "one_tile" in name for name in seen)
    graph = make_fx(lambda x, y: loss(x, y), pre_dispatch=True)(x, y)
    assert any("ssl_kernels." in str(node.target) for node in graph.graph.nodes)


@both
def test_a_view_without_gradient_may_come_from_inference(loss: Callable[..., Tensor]) -> None:
    x, y = views()
    with torch.inference_mode():
        other = y.clone()
    value = loss(x, other)
    value.backward()
    expected = x.detach().clone().requires_grad_()
    loss(expected, y).backward()
    torch.testing.assert_close(x.grad, expected.grad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda z: S.MoCoLoss()(z, torch.ones(2, 3), S.KeyQueue(4, 3)), "query: expected "),
        (lambda z: S.NTXentLoss(0.5, (4, 3))(torch.ones(2, 3), z), "out1: expected "),
    ],
)
@pytest.mark.parametrize("bad", [torch.ones(3), torch.ones(2, 2, 3), torch.ones(2, 3, dtype=torch.int64), None])
def test_modules_name_the_rows_that_are_wrong(call: Callable[..., Any], message: str, bad: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call(bad)


def test_the_kernels_take_no_sizes_on_trust() -> None:
    ops = torch.ops.ssl_kernels
    ops.centered_softmax_(torch.empty(3, 0), None, 1.0, torch.empty(3, 0), 0, 3)
    stats, sides = [torch.zeros(n, 4).double() for n in (1, 9)], [torch.zeros(4, n) for n in (1, 9)]
    outputs = torch.zeros(()), torch.zeros((), dtype=torch.int64), torch.zeros(3)
    with pytest.raises(RuntimeError, match="row_weight: expected size 9 in dimension 0, got 1"):
        ops.softmax_summary_(stats, 1.0, 0.0, False, torch.ones(1), *outputs, sides)
