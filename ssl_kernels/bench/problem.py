"""What every benchmark is made of: an op's shapes and providers, and at one shape the inputs, the formula, the floor.

Each <op>.py of this package declares one or more ops. ``suite.py`` lists them; the harness measures them on a CPU.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels import use_tile_budget

Loss = Callable[..., Any]
MODES = ("forward", "forward+backward")


class NotComparableError(Exception):
    """A provider cannot do this shape, for a reason that is its own."""


@dataclass(frozen=True)
class Floor:
    """What nobody can do without, in 10^9: FLOP of products ``width`` deep, bytes read or written, exponentials."""

    gflop: float = 0.0
    width: int = 0
    gbytes: float = 0.0
    gexp: float = 0.0


@dataclass(frozen=True)
class Problem:
    """One shape of one op. The formula is the provider "eager"; "compile" is what torch.compile makes of it.

    The other providers are made by a call each, and get the leaves. An update of a state returns that state; its
    formula, the state after two updates.
    """

    leaves: list[Tensor]
    formula: Loss
    providers: Mapping[str, Callable[[], Loss]]
    floor: Callable[[str, bool], Floor]  # of a provider, without or with gradients
    compared: Mapping[str, Callable[[Any], Tensor]] = field(default_factory=dict)  # what is made of other results first
    not_by: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # leaves that a provider gives no gradient

    def loss(self, provider: str, backend: str = "inductor") -> Loss:
        if provider == "compile":
            return compiled(self.formula, backend)
        return self.formula if provider == "eager" else self.providers[provider]()

    def error(self, provider: str, loss: Loss, mode: str) -> float:
        """The largest relative error of the value and of the gradients, against the formula in at least float32."""
        compared = self.compared.get(provider, lambda value: value)
        without = self.not_by.get(provider, ())
        return error(lambda *leaves: compared(loss(*leaves)), self.formula, self.leaves, mode, without)


@dataclass(frozen=True)
class Op:
    """What is measured of one op: who at which shapes, in which modes, and how near the formula.

    The first shape is measured in all modes, the others in the last one. A quick run takes the first shape alone, or
    those that ``quick`` names. Along the sweep a batch grows, and only ours, the first peer and the formula are run.
    """

    name: str
    title: str  # for readers
    problem: Callable[..., Problem] = field(repr=False)  # of a shape, a dtype and a device
    providers: tuple[str, ...]  # ours, peers with the most used first, "eager", "compile"
    shapes: Sequence[tuple[Any, ...]]
    tiny: Sequence[tuple[Any, ...]]  # says that it runs, not how fast
    quick: Sequence[tuple[Any, ...]] = ()
    sweep: Sequence[tuple[Any, ...]] = ()
    gpu_shapes: Sequence[tuple[Any, ...]] = ()
    describe: Callable[..., str] = "B={} D={}".format  # of a shape
    suffix: str = ""  # of a description, where another op has the same name and shapes
    label: str = ""  # what tells it from the other ops of its file
    modes: tuple[str, ...] = MODES
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4
    tolerances: Mapping[str, float] = field(default_factory=dict)  # of providers that need another
    quadratic: bool = False  # its formula keeps several B x B matrices
    rows: Callable[..., int] = lambda *shape: shape[0]  # of that matrix, at a shape
    threads: int | None = None  # where they are not those of the run

    @property
    def peer(self) -> str:
        """The provider that ours is measured against first: a package's, or else the formula."""
        return next(name for name in self.providers if not is_ours(name) and name != "compile")

    def comparable(self, shape: tuple[Any, ...], most: int) -> tuple[Any, ...]:
        """What cannot be compared whole is compared in the small."""
        return tuple(min(n, most) for n in shape) if self.quadratic else shape


class Case(NamedTuple):
    op: Op
    shape: tuple[Any, ...]
    provider: str
    mode: str

    @property
    def name(self) -> str:
        """As -k finds it."""
        op = self.op
        mode = self.mode if len(op.modes) > 1 else ""
        return "-".join(filter(None, [op.name, *map(str, self.shape), op.label, self.provider, mode]))


def is_ours(provider: str) -> bool:
    """Whether it is ours, in one of its settings."""
    return provider.startswith("ours")


def is_peer(provider: str) -> bool:
    """Whether it is neither ours nor plain PyTorch."""
    return not is_ours(provider) and provider not in ("eager", "compile")


# ---- providers


def peer(name: str, *arguments: Any) -> Callable[[], Loss]:
    """The module "package.module:Class" of a package that may not be installed."""
    return lambda: pkgutil.resolve_name(name)(*arguments)


@functools.cache  # one per formula and process
def compiled(formula: Loss, backend: str) -> Loss:
    return torch.compile(formula, backend=backend, dynamic=False)  # a code to each shape, which is the fastest


def recomputing(loss: Loss) -> Loss:
    """No tile is kept from the forward pass."""

    def call(*leaves: Tensor) -> Tensor:
        with use_tile_budget(0):
            return loss(*leaves)

    return call


# ---- inputs and floors


def normal(*shape: int, dtype: torch.dtype, device: torch.device, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)


def unit_rows(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = normal(rows, width, dtype=torch.float32, device=device, seed=rows + width)
    return F.normalize(x, dim=-1).to(dtype)


def pairs(batch: int, width: int, dtype: torch.dtype, device: torch.device, *scalars: float) -> list[Tensor]:
    """Unit rows, others near them, and scalars; all of them leaves."""
    x, noise = unit_rows(2 * batch, width, dtype, device).chunk(2)
    y = F.normalize(x.float() + noise.float(), dim=-1).to(dtype)
    return [t.clone().requires_grad_() for t in (x, y, *(torch.tensor(s, device=device) for s in scalars))]


def gflop(rows: int, columns: int, width: int) -> float:
    return 2 * rows * columns * width / 1e9


# ---- one step, and what is compared of it


def step(loss: Loss, leaves: Sequence[Tensor], mode: str) -> Any:
    if mode == "update":
        return loss(*leaves)
    if mode == "forward":
        with torch.no_grad():
            return loss(*leaves)
    for leaf in leaves:
        leaf.grad = None
    value = loss(*leaves)
    value.backward()
    return value.detach()


def error(loss: Loss, formula: Loss, leaves: Sequence[Tensor], mode: str, without: Sequence[int] = ()) -> float:
    """The largest relative error of the value, and of all gradients but those by the leaves ``without``."""
    exact_leaves = [leaf.detach().float().requires_grad_(leaf.requires_grad) for leaf in leaves]
    values, gradients = _results(loss, leaves, mode, without)
    exact_values, exact_gradients = _results(formula, exact_leaves, mode, without)
    # A gradient by a scalar is a sum that cancels: what it is held against is what it is made of.
    spread = max((g.norm().item() * len(g) ** 0.5 for g in exact_gradients if g.dim()), default=0.0)
    errors = [_distance(a, e) for a, e in zip(values, exact_values, strict=True)]
    for a, e in zip(gradients, exact_gradients, strict=True):
        errors.append(_distance(a, e, 0.0 if e.dim() else spread))
    return torch.stack(errors).max().item()  # NaN where one is


def _results(
    loss: Loss, leaves: Sequence[Tensor], mode: str, without: Sequence[int]
) -> tuple[Sequence[Tensor], list[Tensor]]:
    value = step(loss, leaves, mode)
    if mode == "update":
        value = step(loss, leaves, mode)
    gradients = []
    if mode == "forward+backward":
        for k, leaf in enumerate(leaves):
            if leaf.requires_grad and k not in without:
                if leaf.grad is None:
                    raise NotComparableError(f"gives no gradient to argument {k}")
                gradients.append(leaf.grad)
    return [value] if isinstance(value, Tensor) else value, gradients


def _distance(a: Tensor, exact: Tensor, least: float = 0.0) -> Tensor:
    return (a.to(exact.dtype) - exact).norm().float() / exact.norm().float().clamp(min=max(least, 1e-30))
