"""What the tests beside the peers' own code share."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def value_and_gradients(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


def assert_same_through_a_model(ours: Tensor, theirs: Tensor, model: torch.nn.Module) -> None:
    """Values, and gradients by all parameters that take part."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(theirs, leaves, retain_graph=True, allow_unused=True)
    gradients = torch.autograd.grad(ours, leaves, allow_unused=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert sum(g is not None for g in gradients) == sum(g is not None for g in expected) > 10
    for a, b in zip(gradients, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-4, atol=1e-5)


def assert_same_signature(ours: type[Any], theirs: type[Any], *methods: str) -> None:
    """Of a module. Ours may take more: newer versions of a peer have arguments that older ones lack."""
    for name in ("__init__", "forward", *methods):
        mine, wanted = (
            [(p.name, p.default) for p in inspect.signature(getattr(module, name)).parameters.values()]
            for module in (ours, theirs)
        )
        assert mine[: len(wanted)] == wanted
