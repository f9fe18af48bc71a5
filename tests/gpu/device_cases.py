"""What the tests on a device share: every op as a case, and the comparison with its definition in float64.

They run on the device that SSL_KERNELS_TEST_DEVICE names, by default a GPU where there is one and else the CPU, where
the same code runs at small sizes and what only a GPU has is skipped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from contrastive import HALF_EPS, distance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import ssl_kernels
import ssl_kernels.functional as K

DEVICE = torch.device(os.environ.get("SSL_KERNELS_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu"))
ON_GPU = DEVICE.type == "cuda"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
gpu_only = pytest.mark.skipif(not ON_GPU, reason=f"needs a GPU, and the tests run on {DEVICE}")

Inputs = dict[str, Tensor]


class Sizes(NamedTuple):
    rows: int  # of a batch
    width: int  # features
    many: int  # keys or prototypes


SMALL = Sizes(37, 19, 67)
WIDE = ("scale", "bias", "temperature", "center", "weights", "temp", "momentum")  # in float32 whatever is tested
LARGE = Sizes(1031, 513, 8209) if ON_GPU else Sizes(70, 33, 130)


@dataclass(frozen=True)
class Case:
    """One way to call an op. Floating inputs are cast to the dtype under test, but for those that stay wide."""

    op: str  # its name in ssl_kernels.functional
    variant: str
    make: Callable[[Sizes], Inputs]  # in float32, on the CPU
    call: Callable[[Inputs], Tensor | Sequence[Tensor]]
    leaves: tuple[str, ...] = ()  # those that receive gradients
    wide: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()  # laid out as they are
    rounded: tuple[int | str, ...] = ()  # outputs, and scalars' gradients, of sums that a GPU makes of 16-bit weights
    searches: bool = False  # for the best of products: which one that is depends on their rounding

    def __str__(self) -> str:
        return f"{self.op}-{self.variant}"

    def inputs(
        self, sizes: Sizes, dtype: torch.dtype = torch.float32, device: torch.device = DEVICE, seed: int = 0
    ) -> Inputs:
        """The same ones on every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.make(sizes)
        return {
            name: t.to(device, dtype if t.is_floating_point() and name not in (*WIDE, *self.wide) else t.dtype)
            for name, t in made.items()
        }


class Result(NamedTuple):
    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.outputs, *self.gradients.values())


def unit(*shape: int) -> Tensor:
    return F.normalize(torch.randn(*shape), dim=-1)


def _pair(s: Sizes) -> Inputs:
    """Pairs that are closer than others, as in training."""
    x = unit(s.rows, s.width)
    return {
        "x": x,
        "y": F.normalize(x + unit(s.rows, s.width), dim=-1),
        "scale": torch.tensor(10.0),
        "bias": torch.tensor(-5.0),
        "temperature": torch.tensor(0.1),
        "ids": torch.arange(s.rows) // 2 * 2**33,
    }


def _keys(s: Sizes) -> Inputs:
    pair = _pair(s)
    momentum = {f"{name}_momentum": F.normalize(pair[name] + 0.1 * unit(s.rows, s.width), dim=-1) for name in "xy"}
    return {**pair, **momentum, "keys": unit(s.many, s.width), "other_keys": unit(s.many, s.width)}


def _rows(s: Sizes) -> Inputs:
    """Keys of which the first are close to the rows, and what else a softmax over rows takes."""
    many = max(s.many, s.rows)  # each row has one of its own
    x, keys = unit(s.rows, s.width), unit(many, s.width)
    keys[: s.rows] = F.normalize(x + keys[: s.rows], dim=-1)
    return {
        "x": x,
        "keys": keys,
        "scale": torch.tensor(10.0),
        "bias": torch.randn(many),
        "target": torch.randint(-1, many, (s.rows,)),
        "ids": torch.arange(s.rows) % 7 * 2**33,
        "key_ids": torch.arange(many) % 7 * 2**33,
        "guide": unit(s.rows, 16),
        "key_guide": unit(many, 16),
    }


def _crops(s: Sizes) -> Inputs:
    samples = max(1, s.rows // 4)
    student, teacher = 0.3 * torch.randn(4, samples, s.many), 0.3 * torch.randn(2, samples, s.many)
    return {
        "student": student,
        "teacher": teacher,
        "patches": student[0].clone(),
        "teacher_patches": teacher[1].clone(),
        "center": 0.1 * torch.randn(s.many),
        "weights": torch.rand(samples) / samples,
        "temp": torch.tensor(0.07),
    }


def _models(s: Sizes) -> Inputs:
    return {
        "target": torch.randn(s.rows, s.width), "source": torch.randn(s.rows, s.width),
        "target_1": torch.randn(s.many), "source_1": torch.randn(s.many), "momentum": torch.tensor(0.9),
    }  # fmt: skip


def _ring(s: Sizes) -> Inputs:
    return {"queue": unit(s.many, s.width), "pointer": torch.tensor(s.many - 3), "new": torch.randn(s.rows, s.width)}


def _ema(i: Inputs, momentum: Tensor | float) -> tuple[Tensor, ...]:
    targets = [i["target"].clone(), i["target_1"].clone()]
    copy = torch.empty_like(targets[0], dtype=torch.float32)
    K.ema_update_(targets, [i["source"], i["source_1"]], momentum, [copy, None])
    return *targets, copy


def _enqueue(i: Inputs, normalize: bool) -> tuple[Tensor, ...]:
    queue, pointer = i["queue"].clone(), i["pointer"].clone()
    K.enqueue_(queue, pointer, i["new"], normalize=normalize)
    return queue, pointer


class At(str):
    """The name of an input, where an option is one."""

    __slots__ = ()


def _case(
    op: str, variant: str, make: Callable[[Sizes], Inputs], arguments: Sequence[Any], *, leaves: str = "",
    wide: tuple[str, ...] = (), rounded: tuple[int | str, ...] = (), searches: bool = False, **options: Any,
) -> Case:  # fmt: skip
    """Strings among the arguments are names of inputs."""

    def call(i: Inputs) -> Any:
        given = {name: i[value] if isinstance(value, At) else value for name, value in options.items()}
        return getattr(K, op)(*(i[a] if isinstance(a, str) else a for a in arguments), **given)

    return Case(op, variant, make, call, tuple(leaves.split()), wide, rounded=rounded, searches=searches)


def _cases() -> Iterator[Case]:
    ids: dict[str, Any] = {"x_ids": At("ids"), "y_ids": At("ids")}
    for op, arguments in (("sigmoid_contrastive_loss", "x y scale bias"), ("clip_loss", "x y scale")):
        leaves = arguments
        yield _case(op, "mean", _pair, arguments.split(), leaves=leaves)
        yield _case(op, "ids", _pair, arguments.split(), leaves=leaves, **ids)
        yield _case(op, "ignored", _pair, arguments.split(), leaves=leaves, **ids, same_id="ignore", offset=3)
        yield _case(op, "rows", _pair, arguments.split(), leaves=leaves, reduction="none")
        floats = [10.0, -5.0][: len(arguments.split()) - 2]
        yield _case(op, "floats", _pair, ["x", "y", *floats], leaves="x y", reduction="sum")
    yield _case("clip_loss", "smoothed", _pair, ["x", "y", "scale"], leaves="x y scale", label_smoothing=0.1)
    rows: dict[str, Any] = {"make": _rows, "arguments": ["x", "keys", "scale"]}
    masked: dict[str, Any] = {"query_ids": At("ids"), "candidate_ids": At("key_ids"), "label_smoothing": 0.1}
    yield _case("row_softmax_loss", "mean", **rows, leaves="x keys scale")
    yield _case(
        "row_softmax_loss", "bias", **rows, leaves="x keys scale bias", candidate_bias=At("bias"), target=At("target"),
        **masked,
    )  # fmt: skip
    yield _case("row_softmax_loss", "hard", **rows, leaves="x keys scale", hardness=3.0, **masked, same_id="negative")
    guide: dict[str, Any] = {"guide_query": At("guide"), "guide_candidates": At("key_guide")}
    yield _case("row_softmax_loss", "guide", **rows, leaves="x keys", wide=("guide", "key_guide"), **guide)
    yield Case(
        "row_softmax_loss", "prefixes", _rows, lambda i: K.row_softmax_loss(
            i["x"], i["keys"], i["scale"], dims=sorted({(i["x"].shape[1] + 1) // 2, i["x"].shape[1]}), normalize=True
        ), ("x", "keys", "scale"), rounded=(0, "scale"),  # prefixes of norm 1 in 16 bits
    )  # fmt: skip
    yield _case("row_softmax_loss", "rows", **rows, leaves="x keys", reduction="none")
    yield _case("row_lse", "bias", **rows, leaves="x keys scale bias", candidate_bias=At("bias"))
    yield _case("nt_xent_loss", "mean", _pair, ["x", "y", "temperature"], leaves="x y temperature")
    yield _case("nt_xent_loss", "rows", _pair, ["x", "y", 0.1], leaves="x y", reduction="none")
    yield _case("sup_con_loss", "mean", _pair, ["x", "ids", "temperature"], leaves="x temperature")

    yield _case("key_softmax", "both", _keys, ["x", "keys", "scale"], leaves="x scale", rounded=(1, "scale"))
    yield Case(
        "key_softmax", "no mean", _keys, lambda i: K.key_softmax(i["x"], i["keys"], i["scale"], want_mean=False)[0]
    )
    frozen: dict[str, Any] = {"make": _keys, "arguments": ["x", "y", "keys", "scale"]}
    yield _case("info_nce_loss", "mean", **frozen, leaves="x y scale", rounded=("scale",))
    yield _case("info_nce_loss", "rows", **frozen, leaves="x", reduction="none")
    momenta = ["x", "y", "x_momentum", "y_momentum", "keys", "other_keys", "scale"]
    yield _case("albef_contrastive_loss", "mean", _keys, momenta, leaves="x y scale", rounded=(0, "scale"))

    crops = ["student", "teacher"]
    centred: dict[str, Any] = {"center": At("center"), "want_teacher_sum": True}
    yield _case("dino_loss", "centred", _crops, crops, leaves="student", **centred)
    yield _case("dino_loss", "rows", _crops, crops, leaves="student", reduction="none", teacher_temp=At("temp"))
    yield Case(
        "dino_loss", "lists", _crops, lambda i: K.dino_loss(list(i["student"]), list(i["teacher"]), pairs="all"),
        ("student",),
    )  # fmt: skip
    yield Case(
        "dino_loss", "probabilities", _crops,
        lambda i: K.dino_loss(i["student"], i["teacher"].softmax(-1), teacher_probs=True), ("student",),
    )  # fmt: skip
    patches = ["patches", "teacher_patches"]
    yield _case("ibot_patch_loss", "weighted", _crops, [*patches, "weights"], leaves="patches", **centred)
    yield _case("ibot_patch_loss", "rows", _crops, patches, leaves="patches", reduction="none")
    yield _case("sinkhorn_center", "three", _crops, ["teacher", "temp"])
    yield _case("sinkhorn_knopp", "one", _crops, ["teacher", 0.1], n_iterations=1)
    yield _case("centered_softmax", "centred", _crops, ["teacher", "temp", "center"])

    yield _case("koleo_loss", "mean", _pair, ["x"], leaves="x", searches=True)
    yield _case("koleo_loss", "rows", _pair, ["x"], leaves="x", searches=True, reduction="none")
    yield _case("vicreg_loss", "mean", _pair, ["x", "y"], leaves="x y")
    yield _case("barlow_twins_loss", "mean", _pair, ["x", "y"], leaves="x y")

    yield Case("ema_update_", "number", _models, lambda i: _ema(i, 0.9))
    yield Case("ema_update_", "tensor", _models, lambda i: _ema(i, i["momentum"]))
    yield Case("ema_update_", "into fp32", _models, lambda i: _ema(i, 0.9), wide=("target", "target_1"))
    yield Case("enqueue_", "normalised", _ring, lambda i: _enqueue(i, True), in_place=("queue",))
    yield Case("enqueue_", "into fp32", _ring, lambda i: _enqueue(i, False), wide=("queue",), in_place=("queue",))


CASES = list(_cases())
_first = {case.op: case for case in reversed(CASES)}.values()
first_of_each = pytest.mark.parametrize("case", [case for case in CASES if case in _first], ids=str)
every = pytest.mark.parametrize("case", CASES, ids=str)


def evaluate(case: Case, inputs: Inputs, call: Callable[[Inputs], Any] | None = None) -> Result:
    """What the op returns, and the gradients of the leaves for an upstream gradient that differs from row to row."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in case.leaves}
    found = (call or case.call)({**inputs, **leaves})
    outputs = (found,) if isinstance(found, Tensor) else tuple(found)
    if not leaves:
        return Result(outputs, {})
    differentiable = [t for t in outputs if t.requires_grad]
    gradients = torch.autograd.grad(differentiable, list(leaves.values()), [upstream(t) for t in differentiable])
    return Result(tuple(t.detach() for t in outputs), dict(zip(leaves, gradients, strict=True)))


def upstream(output: Tensor) -> Tensor:
    return torch.linspace(0.5, 2.0, output.numel(), device=output.device, dtype=output.dtype).view_as(output)


def reference(case: Case, inputs: Inputs, dtype: torch.dtype | None = None) -> Result:
    """The op's definition, on the same device; with ``dtype``, of these inputs cast to it."""
    if dtype is not None:
        inputs = {name: t.to(dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    with ssl_kernels.use_backend("reference"):
        return evaluate(case, inputs)


def lay_out(case: Case, inputs: Inputs, layout: str) -> Inputs:
    """The same values in another memory layout."""

    def moved(t: Tensor) -> Tensor:
        if layout == "transposed":
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "stepped":
            return t.repeat_interleave(2, dim=-1)[..., ::2]
        if layout == "far":  # from the first row to the last more elements than 32 bits count
            step = 2**31 // max(1, len(t) - 1) + t[0].numel()
            flat = torch.empty(len(t) * step, dtype=t.dtype, device=t.device)
            return flat.view(len(t), step)[:, : t[0].numel()].view(t.shape).copy_(t)
        if layout == "shifted":  # rows that start anywhere but on 16 bytes
            return F.pad(t, (1, 2), value=torch.nan)[..., 1:-2]
        return t

    return {name: moved(t) if t.dim() > 1 and name not in case.in_place else t for name, t in inputs.items()}


def assert_close(
    case: Case, ours: Result, plain: Result, exact: Result, dtype: torch.dtype, *, tf32: bool = False
) -> None:
    """err(ours) <= 2 err(the definition in the same dtype) + rounding, for every output and every gradient."""
    cut = 2**-8  # tensor cores cut both factors to 10 bits, always towards zero: nothing averages out
    product = cut if tf32 else HALF_EPS.get(dtype, 4e-6)
    averaged = product / 16 if dtype in HALF_EPS else product  # roundings of one element each, over a row or a batch
    for k, (a, e, o) in enumerate(zip(ours.outputs, plain.outputs, exact.outputs, strict=True)):
        assert a.shape == o.shape
        if not a.is_floating_point():
            assert torch.equal(a, o)
            continue
        eps = cut if tf32 else HALF_EPS.get(a.dtype, 4e-6)
        if k in case.rounded and a.dtype != dtype:
            eps = product if a.dim() > 1 else averaged
        _assert_error(f"output {k}", a, e, o, eps, max(o.norm().item(), o.numel() ** 0.5))
    spread = max([1.0, *(g.norm().item() * max(1, len(g)) ** 0.5 for g in exact.gradients.values() if g.dim())])
    for name, a in ours.gradients.items():
        o = exact.gradients[name]
        assert a.dtype == (torch.float32 if name in WIDE else dtype)
        # That of a scalar is a sum of terms that may cancel; of features, it was rounded as a tile and as a gradient.
        size, eps = o.norm().item(), 2 * product
        if o.dim() == 0:
            size, eps = spread, averaged if tf32 or name in case.rounded else 4e-6
        _assert_error(f"gradient of {name}", a, plain.gradients[name], o, eps, size)


def _assert_error(name: str, ours: Tensor, plain: Tensor, exact: Tensor, eps: float, size: float) -> None:
    subnormal = 2**-24 * exact.numel() ** 0.5 if ours.dtype == torch.float16 else 1e-30
    error, allowed = distance(ours, exact), 2 * distance(plain, exact) + eps * size + subnormal
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} of {size:.3g}"


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """As torch.set_float32_matmul_precision says inside the block."""
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


class Backends(TorchDispatchMode):
    """Records which backend each of the library's ops is told to use inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        names = [argument.name for argument in func._schema.arguments]
        if func.namespace == "ssl_kernels" and "backend" in names:
            self.seen.add(args[names.index("backend")])
        return func(*args, **(kwargs or {}))
