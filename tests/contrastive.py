"""What the tests of the contrastive losses share: inputs, losses by name, and the comparison with float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K

Loss = Callable[..., Tensor]

FUSED = ("cpu", "eager")
BACKENDS = ("reference", *FUSED)
LOSSES = ("clip", "nt_xent", "sup_con")
HALF_EPS = {torch.bfloat16: 2**-8, torch.float16: 2**-10}

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
layouts = st.sampled_from(["contiguous", "transposed", "stepped", "expanded"])
workspaces_mb = st.sampled_from([64, 0.02, 0.0005])


class Result(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, ...]  # by the features, and last by the scale or the temperature


def unit_rows(rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return F.normalize(torch.randn(rows, width), dim=-1).to(dtype)


def features(rows: int, cols: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return unit_rows(rows, width, dtype), unit_rows(cols, width, dtype)


def case(name: str, rows: int, width: int = 8, **options: Any) -> tuple[Loss, list[Tensor]]:
    """A loss and its arguments, the scale or temperature last. In "sup_con" two rows share an id."""
    x, y = features(rows, rows, width)
    if name == "clip":
        return functools.partial(K.clip_loss, **options), [x, y, torch.tensor(10.0)]
    if name == "nt_xent":
        return functools.partial(K.nt_xent_loss, **options), [x, y, torch.tensor(0.1)]
    ids = torch.arange(rows) // 2
    return lambda z, temperature: K.sup_con_loss(z, ids, temperature, **options), [x, torch.tensor(0.1)]


def evaluate(backend: str, loss: Loss, arguments: list[Tensor], weight: Tensor | None = None) -> Result:
    """The loss and its gradients; ``weight`` is the upstream gradient."""
    leaves = [t.detach().requires_grad_() for t in arguments]
    with ssl_kernels.use_backend(backend):
        value = loss(*leaves)
        value.backward(torch.ones_like(value) if weight is None else weight.to(value.dtype))
    gradients = [leaf.grad for leaf in leaves]
    assert all(g is not None for g in gradients)
    return Result(value.detach(), tuple(gradients))  # type: ignore[arg-type]


def oracle(loss: Loss, arguments: list[Tensor], weight: Tensor | None = None) -> Result:
    return evaluate("reference", loss, [t.double() for t in arguments], weight)


def plain(loss: Loss, arguments: list[Tensor], weight: Tensor | None = None) -> Result:
    """Plain PyTorch in fp32."""
    return evaluate("reference", loss, [t.float() for t in arguments], weight)


def distance(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).norm().item()


def assert_close(
    ours: Result,
    eager: Result,
    exact: Result,
    dtype: torch.dtype = torch.float32,
    *,
    terms: float = 1.0,
    temperature: float | None = None,
) -> None:
    """err(ours) <= 2 err(plain PyTorch in fp32) + rounding, for the loss and every gradient. ``terms`` is the norm of
    what a probability of 1 adds to a gradient by features: of a confident pair nothing is left but its rounding."""
    *by_features, _ = exact.gradients
    # The gradient of the scale is a sum of many terms that may cancel; rounding is relative to the terms.
    spread = max(1.0, *(g.norm().item() * max(1, len(g)) ** 0.5 for g in by_features))
    if temperature is not None:
        spread = max(spread, terms * temperature) * max(1, temperature**-2)  # by way of the scale, 1 / temperature
    names = ["loss", *(f"gradient {k}" for k in range(len(by_features))), "gradient of the scale"]
    for name, a, e, o in zip(names, *((r.loss, *r.gradients) for r in (ours, eager, exact)), strict=True):
        assert a.shape == o.shape
        wide = name in ("loss", names[-1])
        size = max(o.norm().item(), spread if name == names[-1] else o.numel() ** 0.5 if wide else 0)
        eps = 2e-6 if wide else HALF_EPS.get(dtype, 2e-6)
        cancelled = 1e-6 * terms if not wide else 0
        subnormal = 2**-25 * a.numel() ** 0.5 if a.dtype == torch.float16 else 1e-30
        assert distance(a, o) <= 2 * distance(e, o) + eps * size + cancelled + subnormal, name


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout (but for "expanded": every row the same, stride 0)."""
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "stepped":
        return t.repeat_interleave(2, dim=1)[:, ::2]
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t


def losses_of_a_run(
    backend: str, criterion: Callable[..., Tensor], model: torch.nn.Module, steps: int = 30
) -> list[float]:
    """The loss of each step of training ``model`` on random pairs; the criterion gets what the model gives."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(24, 12, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        image = torch.randn(64, 24, generator=generator)
        with ssl_kernels.use_backend(backend):
            loss = criterion(*model(image, image @ truth))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Towers(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Sequential(torch.nn.Linear(24, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
        self.text = torch.nn.Sequential(torch.nn.Linear(12, 32), torch.nn.GELU(), torch.nn.Linear(32, 16))
        self.log_scale = torch.nn.Parameter(torch.tensor(1 / 0.07).log())

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, ...]:
        x, y = F.normalize(self.image(image), dim=-1), F.normalize(self.text(text), dim=-1)
        return x, y, self.log_scale
