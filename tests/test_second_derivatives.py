"""Derivatives of gradients: every fused loss has the right ones or refuses, however they are asked for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import functional

import ssl_kernels as S
import ssl_kernels.functional as K

IDS = torch.tensor([0, 1, 0])
REDUCTIONS = ("mean", "sum", "none")

Loss = Callable[..., Tensor]
# Name -> the loss of its differentiable inputs (a matrix [3, 2] or a positive number each), and these inputs.
LOSSES: dict[str, tuple[Loss, str]] = {
    **{
        f"{name} {reduction}": (lambda *args, f=loss, r=reduction: f(*args, reduction=r), inputs)
        for (name, (loss, inputs)), reduction in itertools.product(
            {
                "sigmoid": (K.sigmoid_contrastive_loss, "x y t b"),
                "clip": (K.clip_loss, "x y t"),
                "rows": (K.row_softmax_loss, "x y t"),
                "rows with a bias": (
                    lambda x, y, t, b, reduction: K.row_softmax_loss(
                        x, y, t, candidate_bias=b * torch.arange(3.0), reduction=reduction
                    ),
                    "x y t b",
                ),
                "nt_xent": (K.nt_xent_loss, "x y t"),
                "sup_con": (lambda z, t, reduction: K.sup_con_loss(z, IDS, t, reduction=reduction), "x t"),
                "info_nce": (lambda q, p, t, reduction: K.info_nce_loss(q, p, KEYS, t, reduction=reduction), "x y t"),
                "albef": (
                    lambda x, y, t, reduction: K.albef_contrastive_loss(
                        x, y, KEYS, KEYS, KEYS, KEYS, t, reduction=reduction
                    ),
                    "x y t",
                ),
                "koleo": (K.koleo_loss, "x"),
            }.items(),
            REDUCTIONS,
        )
    },
    "row_lse": (lambda x, y, t: K.row_lse(x, y, t), "x y t"),
    "key_softmax": (lambda q, t: K.key_softmax(q, torch.eye(3, 2), t)[0], "x t"),
    "dino mean": (lambda s: K.dino_loss(s[None], torch.eye(3, 2).flip(0)[None], pairs="all"), "x"),
    "dino none": (lambda s: K.dino_loss(s[None], torch.eye(3, 2)[None], pairs="all", reduction="none"), "x"),
    "ibot": (lambda s: K.ibot_patch_loss(s, torch.eye(3, 2), torch.tensor([1.0, 2.0, 0.5])), "x"),
    "vicreg": (K.vicreg_loss, "x y"),
    "barlow_twins": (K.barlow_twins_loss, "x y"),
    "SigLipLoss": (lambda x, y, t, b: S.SigLipLoss()(x, y, t, b), "x y t b"),
    "ClipLoss": (lambda x, y, t: S.ClipLoss()(x, y, t), "x y t"),
    "NTXentLoss": (lambda x, y: S.NTXentLoss(0.5)(x, y), "x y"),
    "SupConLoss": (lambda z: S.SupConLoss(0.5)(z, IDS), "x"),
    "VICRegLoss": (lambda x, y: S.VICRegLoss()(x, y), "x y"),
    "BarlowTwinsLoss": (lambda x, y: S.BarlowTwinsLoss()(x, y), "x y"),
}
KEYS = torch.tensor([[0.6, 0.8], [0.8, -0.6], [-1.0, 0.0]])


def gradient_of(loss: Loss, leaves: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    return torch.cat([g.flatten() for g in gradients])


def by_backward(loss: Loss, *leaves: Tensor) -> Any:
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    gradient_of(loss, leaves).square().sum().backward()
    return [leaf.grad for leaf in leaves]


def by_grad(loss: Loss, *leaves: Tensor) -> Any:
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    return torch.autograd.grad(gradient_of(loss, leaves).square().sum(), leaves)


def by_batched_grad(loss: Loss, *leaves: Tensor) -> Any:
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    gradient = gradient_of(loss, leaves)
    return torch.autograd.grad(gradient, leaves, torch.eye(len(gradient)), is_grads_batched=True, allow_unused=True)


WAYS: dict[str, Callable[..., Any]] = {
    "backward": by_backward,
    "grad": by_grad,
    "batched grad": by_batched_grad,
    "hvp": lambda loss, *leaves: functional.hvp(loss, leaves, leaves)[1],
    "hessian": lambda loss, *leaves: functional.hessian(loss, leaves, vectorize=True),
    "jacobian": lambda loss, *leaves: functional.jacobian(lambda *leaves: gradient_of(loss, leaves), leaves),
}


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for part in result if part is not None for t in flat(part)]


def answer(ask: Callable[[], Any]) -> list[Tensor] | None:
    """What is answered; None for the error that is meant."""
    try:
        return flat(ask())
    except RuntimeError as error:
        if "the gradient of a fused loss cannot be differentiated again" in str(error):
            return None
        raise


@pytest.mark.parametrize("name", LOSSES)
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    loss, inputs = LOSSES[name]
    generator = torch.Generator().manual_seed(3)
    values = [
        torch.rand(3, 2, generator=generator) if kind in "xy" else torch.tensor(0.7 if kind == "t" else -0.3)
        for kind in inputs.split()
    ]
    for chosen in itertools.product((False, True), repeat=len(values)):
        free = [value for value, wanted in zip(values, chosen, strict=True) if wanted]

        def plain(*leaves: Tensor, chosen: Sequence[bool] = chosen) -> Tensor:
            """Every input that wants a gradient gets it through something that is not linear."""
            given = iter(leaves)
            mixed = [next(given).exp() if wanted else value for value, wanted in zip(values, chosen, strict=True)]
            return loss(*mixed).sum()

        def squared(*leaves: Tensor, plain: Loss = plain) -> Tensor:
            """Here the upstream gradient depends on the inputs, too."""
            return plain(*leaves).square()

        ways = [(way, plain, ask) for way, ask in WAYS.items()] + [("grad of squared", squared, by_grad)]
        for way, scalar, ask in ways if free else ():
            ours = answer(functools.partial(ask, scalar, *free))
            if ours is None:
                continue
            with S.use_backend("reference"):
                expected = flat(ask(scalar, *free))
            assert len(ours) == len(expected), (chosen, way)
            for a, b in zip(ours, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=f"{chosen} {way}")
