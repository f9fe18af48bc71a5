"""Random calls of each op: a call is known by its op, its seed and its number, and can be drawn again by them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SIZES = (0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 64, 65)
CALM_SIZES = (3, 5, 8, 17)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Call:
    op: str
    seed: int
    number: int
    calm: bool
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]  # all arguments that a gradient can flow to
    wanted: tuple[str, ...]  # those of them whose gradient is asked for
    rows: dict[str, int]  # the dimension of each argument along which the samples lie, if their order does not matter
    upstream: str
    features: torch.dtype
    dtype: torch.dtype  # of the arithmetic
    backend: str
    workspace_mb: float
    budget_mb: float
    autocast: bool
    threads: int

    def __str__(self) -> str:
        parts = [f"{name}={_describe(value)}" for name, value in self.arguments.items()]
        parts += [f"{name}={getattr(self, name)}" for name in list(Call.__annotations__)[-9:]]
        return f"{self.op}, seed {self.seed}, call {self.number}: {', '.join(parts)}, wanted={self.wanted}"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        known = f"={value.item()}" if value.numel() == 1 else ""
        return f"{value.dtype}{list(value.shape)}/{value.stride()}{known}".removeprefix("torch.")
    if isinstance(value, list):
        return f"[{', '.join(map(_describe, value))}]"
    return repr(value)


def draw(op: str, seed: int, number: int, *, calm: bool = False) -> Call:
    """``calm`` calls are of a few rows in float32, well conditioned, and want every gradient."""
    d = Draw(f"{op} {seed} {number}", calm)
    arguments, differentiable, rows = DRAWS[op](d)
    possible = tuple(name for name in tensors_of(arguments) if name.partition("[")[0] in differentiable)
    wanted = possible if calm else tuple(name for name in possible if d.chance(0.7))
    return Call(
        op, seed, number, calm, arguments, possible, wanted, rows,
        upstream="normal" if calm else d.pick("one", "normal", "normal", "stepped", "expanded", "some zero"),
        features=d.dtype,
        dtype=torch.float64 if d.arithmetic == torch.float64 else torch.float32,
        # In float32 the reference rounds more than it has to; the others are better where that matters.
        backend=d.pick("auto", "eager", "reference") if calm else d.pick("auto", "auto", "eager"),
        workspace_mb=d.pick(64, 0.1, 0.03) if d.large else d.pick(64, 0.02, 0.006, 0.002),  # panels of a few rows
        budget_mb=d.pick(0, 64, 0.001),
        autocast=not calm and d.chance(0.1),
        threads=2 if not calm and d.chance(0.05) else 1,
    )  # fmt: skip


def tensors_of(arguments: dict[str, Any]) -> dict[str, Tensor]:
    found = {}
    for name, value in arguments.items():
        for i, t in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(t, Tensor):
                found[f"{name}[{i}]" if isinstance(value, list) else name] = t
    return found


class Draw:
    def __init__(self, seed: str, calm: bool) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(48))
        self.calm, self.large = calm, False
        self.dtype = self.arithmetic = torch.float32 if calm else self.pick(*DTYPES)

    def pick(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def power(self, low: float, high: float) -> float:
        """Of ten, its exponent uniform."""
        return 10 ** self.random.uniform(low, high)

    def size(self, least: int = 0, large: Sequence[int] = (257, 300)) -> int:
        if not self.large and not self.calm and self.chance(0.02):
            self.large = True  # once is enough
            return self.pick(*large)
        return max(least, self.pick(*(CALM_SIZES if self.calm else SIZES)))

    def width(self, least: int = 0) -> int:
        """Of features, or a number of keys: one side of the similarities at most."""
        return self.size(least, large=(1025, 2050))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def lay_out(self, t: Tensor, *, writable: bool = False) -> Tensor:
        """In any layout, among memory of NaN; "expanded" alone changes values, to those of the first row."""
        kind = self.pick("dense", "dense", "transposed", "stepped", "padded", "shifted", "expanded")
        if t.dim() == 0 or (t.numel() == 0) or (kind == "expanded" and (writable or self.calm)):
            return t
        if kind == "transposed":
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "expanded":
            return t[:1].expand_as(t)
        if kind in ("stepped", "padded"):
            room = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), torch.nan).to(t.dtype)
            view = room[..., ::2] if kind == "stepped" else room
        else:
            room = torch.full((t.numel() + 3,), torch.nan).to(t.dtype)
            view = room[1 : 1 + t.numel()].view(t.shape) if kind == "shifted" else room[: t.numel()].view(t.shape)
        view = view[..., : t.shape[-1]]
        return view.copy_(t)

    def matrix(self, *shape: int, size: float = 1.0, near: Tensor | None = None, dtype: Any = None) -> Tensor:
        """Rows of a norm of about ``size``; sometimes close to those of ``near``, zero or equal."""
        t = self.normal(*shape) / max(1, shape[-1]) ** 0.5
        if near is not None and near.shape == t.shape and self.chance(0.5):
            near = near.double()
            t = near / near.norm(dim=-1, keepdim=True).clamp(min=1e-3) + self.power(-2, 0) * t
        if not self.calm and shape[0] > 2 and self.chance(0.1):
            t[self.pick(0, -1)] = self.pick(0, 1) * t[1]
        return self.lay_out((size * t).to(dtype or self.dtype))

    def scalar(self, value: float) -> Tensor | float:
        kind = "tensor" if self.calm else self.pick("float", "tensor", "tensor", "vector")
        if kind == "float":
            return value
        dtypes = DTYPES if 1e-3 < abs(value) < 6e4 else (torch.float32, torch.float64)
        dtype = torch.float32 if self.calm else self.pick(*dtypes)
        return torch.full((1,) if kind == "vector" else (), value, dtype=dtype)

    def logit(self) -> float:
        """The size of the logits."""
        if self.calm:
            return self.power(0, 1)
        return self.power(2, 5) if self.chance(0.1) else self.power(-2, 2)

    def magnitude(self, most: float = 2) -> float:
        return 1.0 if self.calm or self.chance(0.5) else self.power(-most, most)

    def contrast(self) -> tuple[float, float, float]:
        """Norms of x and y, and the scale of their products."""
        x, y = self.magnitude(), self.magnitude()
        return x, y, self.logit() / (x * y)

    def ids(self, *sizes: int) -> list[Tensor | None]:
        kind = self.pick("none", "few", "high bits", *(() if self.calm else ("none", "distinct", "same")))
        if kind == "none":
            return [None] * len(sizes)
        found = []
        for size in sizes:
            most = {"same": 1, "distinct": 10**9}.get(kind, 3)
            ids = torch.randint(0, most, (size,), generator=self.generator)
            ids = ids * 2**40 - 7 if kind == "high bits" else ids
            found.append(ids.repeat_interleave(2)[::2] if self.chance(0.3) else ids)
        return found

    def other_dtype(self) -> torch.dtype:
        return self.dtype if self.calm or self.chance(0.5) else self.pick(*DTYPES)

    def narrow(self) -> None:
        """The arithmetic is not in float64 alone."""
        self.arithmetic = torch.float32


Drawn = tuple[dict[str, Any], Sequence[str], dict[str, int]]


def pairs_of_features(d: Draw) -> tuple[dict[str, Any], dict[str, int]]:
    rows, width = d.size(), d.width()
    cols = rows if d.calm or d.chance(0.5) else d.width()
    x_size, y_size = (d.magnitude(2 if d.dtype == torch.float16 else 8) for _ in range(2))
    x = d.matrix(rows, width, size=x_size)
    offset = 0 if d.chance(0.6) else d.pick(1, -1) if d.calm else d.pick(1, -1, rows, -cols, rows // 2, 2**40, -(2**62))
    x_ids, y_ids = d.ids(rows, cols)
    arguments = {
        "x": x,
        "y": d.matrix(cols, width, size=y_size, near=x),
        "scale": d.scalar(d.logit() / (x_size * y_size)),
        "x_ids": x_ids,
        "y_ids": y_ids,
        "same_id": d.pick("positive", "ignore"),
        "offset": offset,
    }
    together = rows == cols and offset == 0
    return arguments, dict.fromkeys(("x", "y", "x_ids", "y_ids") if together else (), 0)


def sigmoid_contrastive_loss(d: Draw) -> Drawn:
    arguments, rows = pairs_of_features(d)
    bias = d.scalar(d.pick(-10.0, 0.0, d.random.gauss(0, 3)))
    return {**arguments, "bias": bias, "reduction": d.pick(*REDUCTIONS)}, ("x", "y", "scale", "bias"), rows


def clip_loss(d: Draw) -> Drawn:
    arguments, rows = pairs_of_features(d)
    arguments["label_smoothing"] = d.pick(0.0, 0.0, 0.1, 1.0, d.random.random())
    arguments["reduction"] = d.pick(*REDUCTIONS if rows else REDUCTIONS[:2])
    return arguments, ("x", "y", "scale"), rows


def nt_xent_loss(d: Draw) -> Drawn:
    rows, width = d.size(), d.width(1)
    z0 = d.matrix(rows, width, size=d.magnitude())
    arguments = {"z0": z0, "z1": d.matrix(rows, width, near=z0), "temperature": d.scalar(1 / d.logit())}
    return {**arguments, "reduction": d.pick(*REDUCTIONS)}, ("z0", "z1", "temperature"), {"z0": 0, "z1": 0}


def sup_con_loss(d: Draw) -> Drawn:
    size = d.magnitude(2 if d.dtype == torch.float16 else 8)
    z = d.matrix(d.size(), d.width(), size=size)
    ids = d.ids(len(z))[0]
    ids = torch.arange(len(z)) // 2 if ids is None else ids
    temperature = d.scalar(size**2 / d.logit())
    arguments = {"z": z, "ids": ids, "temperature": temperature, "reduction": d.pick(*REDUCTIONS)}
    return {**arguments, "return_unpaired": d.chance(0.5)}, ("z", "temperature"), {"z": 0, "ids": 0}


def key_softmax(d: Draw) -> Drawn:
    width, (query_size, key_size, scale) = d.width(), d.contrast()
    query = d.matrix(d.size(), width, size=query_size)
    keys = d.matrix(d.width(), width, size=key_size, dtype=d.other_dtype())
    arguments = {"query": query, "keys": keys, "scale": d.scalar(scale), "want_mean": d.calm or d.chance(0.7)}
    return arguments, ("query", "scale"), {"query": 0}


def info_nce_loss(d: Draw) -> Drawn:
    rows, width, (query_size, key_size, scale) = d.size(), d.width(), d.contrast()
    query = d.matrix(rows, width, size=query_size)
    arguments = {
        "query": query,
        "positive": d.matrix(rows, width, size=key_size, near=query),
        "negatives": d.matrix(d.width(), width, size=key_size, dtype=d.other_dtype()),
        "scale": d.scalar(scale),
        "reduction": d.pick(*REDUCTIONS),
    }
    return arguments, ("query", "positive", "scale"), {"query": 0, "positive": 0}


def rows_of_candidates(d: Draw, positive: bool) -> tuple[dict[str, Any], dict[str, int]]:
    """What the loss and the log-sum-exp have in common."""
    rows, width = d.size(), d.width(1)
    sizes = [d.magnitude(2 if d.dtype == torch.float16 else 6) for _ in range(2)]
    scale = d.logit() / (sizes[0] * sizes[1])
    query = d.matrix(rows, width, size=sizes[0])
    has_target = d.chance(0.5)
    cols = max(d.width(), 1 if has_target else rows)
    target = torch.randint(-2, cols, (rows,), generator=d.generator) if has_target else None
    ids = d.ids(rows, cols)
    arguments: dict[str, Any] = {
        "query": query,
        "candidates": d.matrix(cols, width, size=sizes[1], near=query),
        "scale": d.scalar(scale),
        "target": target,
        "candidate_bias": None,
        "query_ids": ids[0],
        "candidate_ids": ids[1],
        "same_id": d.pick("ignore", "negative", *(["positive"] if positive else [])),
        "hardness": d.pick(0.0, 0.0, scale * d.random.random()),
        "hardened": "all" if ids[0] is None else d.pick("all", "same_id", "other_ids"),
        "guide_query": None,
        "guide_candidates": None,
        "guide_threshold": None,
    }
    if d.calm or d.chance(0.5):
        bias = 3 * d.normal(cols)
        if not d.calm and d.chance(0.2):
            bias[d.pick(0, -1)] = -torch.inf
        arguments["candidate_bias"] = d.lay_out(bias.to(d.pick(torch.float32, d.arithmetic, d.dtype)))
    if d.chance(0.3):
        dtype = d.other_dtype()
        arguments["guide_query"], arguments["guide_candidates"] = (d.matrix(n, 5, dtype=dtype) for n in (rows, cols))
        if d.chance(0.5) or (not positive and target is None):
            arguments["guide_threshold"] = d.normal(rows).to(d.arithmetic)
    together = ("query", "target", "query_ids", "guide_query", "guide_threshold")
    return arguments, dict.fromkeys(together if has_target or not positive else (), 0)


def row_softmax_loss(d: Draw) -> Drawn:
    arguments, rows = rows_of_candidates(d, positive=True)
    count, width = arguments["query"].shape
    arguments["weights"] = d.lay_out(d.normal(count).to(d.pick(torch.float32, d.dtype))) if d.chance(0.3) else None
    arguments["label_smoothing"] = d.pick(0.0, 0.0, 0.1, 1.0, d.random.random())
    dims = [int(n) + 1 for n in torch.randperm(width, generator=d.generator)[: d.pick(1, 2, 3)]]
    arguments["dims"] = dims if d.chance(0.3) else None
    arguments["dim_weights"] = [d.random.gauss(0, 1) for _ in dims] if arguments["dims"] and d.chance(0.5) else None
    arguments["normalize"] = min(arguments["dims"] or [width]) > 1 and d.chance(0.3)  # of one, nothing is left
    arguments["reduction"] = d.pick(*REDUCTIONS)
    return arguments, ("query", "candidates", "scale", "candidate_bias"), rows | ({"weights": 0} if rows else {})


def row_lse(d: Draw) -> Drawn:
    arguments, rows = rows_of_candidates(d, positive=False)
    return arguments, ("query", "candidates", "scale", "candidate_bias"), rows


def albef_contrastive_loss(d: Draw) -> Drawn:
    rows, width, (size, key_size, scale) = d.size(), d.width(), d.contrast()
    batch = {name: d.matrix(rows, width, size=size) for name in ("image", "text")}
    batch |= {f"{name}_momentum": d.matrix(rows, width, size=key_size, near=batch[name]) for name in ("image", "text")}
    queue = d.width()
    queues = {f"{n}_queue": d.matrix(queue, width, size=key_size, dtype=d.other_dtype()) for n in ("image", "text")}
    arguments = {
        **batch,
        **queues,
        "scale": d.scalar(scale if size == 1 else d.logit() / max(size, key_size) ** 2),
        "alpha": d.pick(0.4, 0.0, 1.0, d.random.random()),
        "reduction": d.pick(*REDUCTIONS),
    }
    return arguments, ("image", "text", "scale"), dict.fromkeys(batch, 0)


def logits(d: Draw, *shape: int, dtype: Any = None) -> Tensor:
    t = d.normal(*shape) * (1 if d.calm else d.power(-1, 1)) + (0 if d.calm or d.chance(0.7) else d.power(0, 3))
    if not d.calm and d.chance(0.1):
        t[..., -1] += 10 * t.abs().amax(-1) if t.numel() else 0  # a confident prototype
    return d.lay_out(t.to(dtype or d.dtype))


def distillation(d: Draw, teacher_shape: Sequence[int]) -> dict[str, Any]:
    width, dtype = teacher_shape[-1], d.other_dtype()
    if dtype != torch.float64:
        d.narrow()
    teacher_probs = d.chance(0.2)
    teacher = logits(d, *teacher_shape, dtype=dtype)
    if teacher_probs:
        teacher = d.lay_out(teacher.double().softmax(-1).to(dtype))
    center = None
    if not teacher_probs and d.chance(0.6):
        shape = d.pick((width,), (1, width), (1, 1, width))
        center = d.normal(*shape).to(d.pick(torch.float32, torch.float32, torch.bfloat16, torch.float64))
    return {
        "teacher": teacher,
        "student_temp": d.scalar(d.pick(0.1, 1.0, d.power(-0.5 if d.calm else -3, 0.5))),
        "teacher_temp": d.scalar(d.pick(0.04, 1.0, d.power(-0.5 if d.calm else -3, 0.5))),
        "center": center,
        "teacher_probs": teacher_probs,
        "want_teacher_sum": d.chance(0.5),
    }


def dino_loss(d: Draw) -> Drawn:
    samples, width = d.size(), d.width(1)
    crops, teachers = d.pick(1, 2, 3, 4, 6), d.pick(1, 2, 2, 3)
    student = logits(d, crops, samples, width)
    arguments = distillation(d, (teachers, samples, width))
    arguments["pairs"] = d.pick("distinct", "all") if crops * teachers > 1 else "all"
    arguments["reduction"] = d.pick(*REDUCTIONS)
    form = "tensor" if d.calm else d.pick("tensor", "crops", "blocks")
    if form == "tensor":
        return {"student": student, **arguments}, ("student",), {"student": 1, "teacher": 1}
    arguments["teacher"] = list(arguments["teacher"])
    return {"student": list(student) if form == "crops" else [student[0], student[1:]], **arguments}, ("student",), {}


def ibot_patch_loss(d: Draw) -> Drawn:
    shape = d.size(), d.width(1)
    arguments = {"student": logits(d, *shape), **distillation(d, shape)}
    arguments["weights"] = None if d.chance(0.4) else d.lay_out(d.normal(shape[0]).abs().to(d.other_dtype()))
    arguments["reduction"] = d.pick("sum", "none")
    return arguments, ("student",), {"student": 0, "teacher": 0, "weights": 0}


def sinkhorn_center(d: Draw) -> Drawn:
    shape = [d.size() for _ in range(d.pick(1, 1, 2))] if not d.calm else [d.size()]
    teacher = logits(d, *(min(n, 65) for n in shape), d.width(1))
    temp = d.scalar(d.pick(0.04, 1.0, d.power(-0.5 if d.calm else -3, 1)))
    rows = {"teacher": 0} if len(shape) == 1 else {}
    return {"teacher": teacher, "teacher_temp": temp, "n_iterations": d.pick(1, 2, 3, 3, 6)}, (), rows


def centered_softmax(d: Draw) -> Drawn:
    arguments, _, rows = sinkhorn_center(d)
    del arguments["n_iterations"]
    width = arguments["teacher"].shape[-1]
    center = None if d.chance(0.4) else d.normal(*d.pick((width,), (1, width))).to(d.other_dtype())
    return {**arguments, "center": center}, (), rows


def koleo_loss(d: Draw) -> Drawn:
    for attempt in range(30):
        x = d.matrix(d.size(2) if attempt < 29 else 2, d.width(1), size=d.magnitude())
        if not d.calm and d.chance(0.2):
            x = torch.cat([x[:1], x])  # as near as can be
        u = torch.nn.functional.normalize(x.double())
        nearest = (u @ u.t()).fill_diagonal_(-torch.inf).sort(1, descending=True).values
        # Which of two neighbours as near as each other is found is a matter of rounding.
        if len(x) == 2 or (nearest[:, 0] - nearest[:, 1]).min() > 1e-4:
            break
    arguments = {"x": x, "eps": d.pick(1e-8, 1e-8, 1e-3), "reduction": d.pick(*REDUCTIONS)}
    return arguments, ("x",), {"x": 0} if len(x) > 2 else {}


def two_views(d: Draw) -> dict[str, Any]:
    rows, width = d.size(2), d.size(1)
    spread = 1.0 if d.calm else 10 ** (2 * torch.rand(width, generator=d.generator) - 1)
    mean = 0 if d.calm or d.chance(0.7) else 100 * d.normal(width)
    za, zb = d.normal(rows, width), d.normal(rows, width)
    zb = zb if d.chance(0.5) else za + 0.1 * zb
    if not d.calm and d.chance(0.1):
        za[:, 0] = 0
    return {name: d.lay_out((z * spread + mean).to(d.dtype)) for name, z in (("za", za), ("zb", zb))}


def vicreg_loss(d: Draw) -> Drawn:
    views = two_views(d)
    for name in ("invariance_weight", "variance_weight", "covariance_weight"):
        views[name] = d.pick(25.0, 1.0, 0.0 if not d.calm else 2.0)
    return {**views, "eps": d.pick(1e-4, 1e-2)}, ("za", "zb"), {"za": 0, "zb": 0}


def barlow_twins_loss(d: Draw) -> Drawn:
    arguments = {**two_views(d), "lambda_param": d.pick(5e-3, 1.0, 0.0 if not d.calm else 2.0)}
    return arguments, ("za", "zb"), {"za": 0, "zb": 0}


def ema_update_(d: Draw) -> Drawn:
    targets, sources, copies = [], [], []
    for _ in range(d.pick(1, 2, 3) if d.calm else d.pick(0, 1, 1, 2, 5)):
        shape = [d.size() for _ in range(d.pick(1, 1, 2))] + [d.pick(1, 3)] * d.chance(0.2)
        target, source, copy = (d.normal(*shape).to(d.other_dtype()) for _ in range(3))
        target = d.lay_out(target, writable=True)
        source = target if not d.calm and d.chance(0.05) else d.lay_out(source)
        targets.append(target)
        sources.append(source)
        copies.append(None if d.chance(0.4) else d.lay_out(copy, writable=True))
    m = d.pick(0.996, 0.5, d.random.random(), *(() if d.calm else (0.0, 1.0)))
    if any(t.dtype != torch.float64 for t in (*targets, *sources)):
        d.narrow()
    arguments = {"targets": targets, "sources": sources, "momentum": d.scalar(m)}
    return {**arguments, "copies": None if d.chance(0.3) else copies}, (), {}


def enqueue_(d: Draw) -> Drawn:
    size, width = d.width(1), d.width(1)
    wide = d.matrix(size, width + d.pick(0, 0, 3)).contiguous()
    queue = wide[:, :width]
    keys = d.matrix(d.size(), width, size=d.power(-3, 3), dtype=d.other_dtype())
    if not d.calm and d.chance(0.1):
        keys = queue[: d.size()]  # the queue's own
    if keys.dtype != torch.float64:
        d.narrow()
    pointer = torch.tensor([d.pick(0, size - 1, d.random.randrange(3 * size), -d.random.randrange(3 * size))])
    return {"queue": queue, "pointer": d.pick(pointer, pointer[0]), "keys": keys, "normalize": d.chance(0.5)}, (), {}


DRAWS: dict[str, Callable[[Draw], Drawn]] = {
    f.__name__: f
    for f in (
        albef_contrastive_loss, barlow_twins_loss, centered_softmax, clip_loss, dino_loss, ema_update_, enqueue_,
        ibot_patch_loss, info_nce_loss, key_softmax, koleo_loss, nt_xent_loss, row_lse, row_softmax_loss,
        sigmoid_contrastive_loss, sinkhorn_center, sup_con_loss, vicreg_loss,
    )
}  # fmt: skip
DRAWS["sinkhorn_knopp"] = sinkhorn_center
