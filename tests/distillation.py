"""What the tests of DINO, iBOT and Sinkhorn-Knopp share: logits, layouts, and the comparison with float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from contrastive import HALF_EPS, distance
from hypothesis import strategies as st
from torch import Tensor

import ssl_kernels
import ssl_kernels.functional as K

FUSED = ("cpu", "eager")
BACKENDS = ("reference", *FUSED)

layouts = st.sampled_from(["contiguous", "samples first", "columns", "stepped", "padded", "same rows", "same crops"])
forms = st.sampled_from(["tensor", "crops", "blocks"])


class Result(NamedTuple):
    loss: Tensor
    gradient: Tensor  # [V, B, K]
    teacher_sum: Tensor


def logits(crops: int, samples: int, width: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    return (size * torch.randn(crops, samples, width)).to(dtype)


def lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; but with "same rows" or "same crops" all are the first, stride 0."""
    if layout == "samples first":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "columns":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "stepped":
        return t.repeat_interleave(2, dim=2)[..., ::2]
    if layout == "padded":
        return F.pad(t, (0, 3), value=torch.nan)[..., :-3]
    if layout == "same rows":
        return t[:, :1].expand_as(t)
    if layout == "same crops":
        return t[:1].expand_as(t)
    return t


def in_form(t: Tensor, form: str) -> Tensor | list[Tensor]:
    """One tensor, or crops, or a crop and blocks of crops."""
    if form == "tensor":
        return t
    if form == "crops":
        return list(t)
    return [block for block in (t[0], t[1:3], t[3:]) if block.dim() == 2 or len(block)]


def evaluate(
    backend: str, student: Tensor, teacher: Tensor, weight: Tensor | None = None, form: str = "tensor", **options: Any
) -> Result:
    """K.dino_loss and its gradient; ``weight`` is the upstream gradient."""
    given = in_form(student.detach(), form)
    leaves = [block.requires_grad_() for block in ([given] if isinstance(given, Tensor) else given)]
    with ssl_kernels.use_backend(backend):
        loss, teacher_sum = K.dino_loss(
            leaves[0] if form == "tensor" else leaves, in_form(teacher, form), want_teacher_sum=True, **options
        )
        loss.backward(torch.ones_like(loss) if weight is None else weight.to(loss.dtype))
    assert all(leaf.grad is not None and leaf.grad.dtype == student.dtype for leaf in leaves)
    gradient = torch.cat([leaf.grad if leaf.dim() == 3 else leaf.grad[None] for leaf in leaves])  # type: ignore[index]
    return Result(loss.detach(), gradient, teacher_sum)


def oracle(student: Tensor, teacher: Tensor, weight: Tensor | None = None, **options: Any) -> Result:
    return evaluate("reference", student.double(), teacher.double(), weight, **options)


def plain(student: Tensor, teacher: Tensor, weight: Tensor | None = None, **options: Any) -> Result:
    """Plain PyTorch in fp32."""
    return evaluate("reference", student.float(), teacher.float(), weight, **options)


def assert_close(
    ours: Result, eager: Result, exact: Result, *, terms: float, gradient_terms: float, roundings: int = 1
) -> None:
    """err(ours) <= 2 err(plain PyTorch in fp32) + rounding.

    ``terms`` and ``gradient_terms`` are what is summed up in the loss and in the gradient before it cancels, which is
    what rounding in fp32 is relative to. In 16 bits the gradient is rounded twice if the upstream gradient is not 1.
    """
    eps = roundings * HALF_EPS.get(ours.gradient.dtype, 0)
    subnormal = roundings * 2**-25 * ours.gradient.numel() ** 0.5 if ours.gradient.dtype == torch.float16 else 0
    rounding = {
        "loss": 2e-6 * terms,
        "gradient": 1e-6 * gradient_terms + eps * exact.gradient.norm().item() + subnormal,
        "teacher_sum": 2e-6 * exact.teacher_sum.norm().item(),
    }
    for name, a, e, o in zip(Result._fields, ours, eager, exact, strict=True):
        assert a.shape == o.shape
        assert not a.requires_grad
        assert distance(a, o) <= 2 * distance(e, o) + rounding[name] + 1e-30, name


def assignment(logits: Tensor, temp: float, iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp as in SwAV's and DINOv2's papers, in float64: scale the columns, then the rows of exp(T / tau)."""
    q = torch.exp((logits.double() - logits.double().max()) / temp)
    samples, prototypes = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0) / prototypes
        q = q / q.sum(1, keepdim=True) / samples
    return q * samples
