"""What each rank of a group runs: its shard's losses and gradients, against one process with the whole batch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import ssl_kernels.functional as K

WIDTH = 24


@dataclass(frozen=True)
class Case:
    """A loss of shards ``features`` [each of the same rows], scalars and ids; ``call`` takes them in this order."""

    name: str
    call: Callable[..., Tensor]
    features: int
    scalars: tuple[float, ...]
    ids: str = ""  # of what is given ids: "", "one" or "both"


def _sup_con(z: Tensor, temperature: Tensor, ids: Tensor, **how: object) -> Tensor:
    return K.sup_con_loss(z, ids, temperature, **how)


def _with_ids(loss: Callable[..., Tensor], **fixed: object) -> Callable[..., Tensor]:
    def call(*arguments: Tensor, **how: object) -> Tensor:
        *rest, x_ids, y_ids = arguments
        return loss(*rest, x_ids=x_ids, y_ids=y_ids, **fixed, **how)

    return call


def _smoothed(*arguments: Tensor, **how: object) -> Tensor:
    return K.clip_loss(*arguments, label_smoothing=0.1, **how)


CASES = [
    Case("sigmoid", K.sigmoid_contrastive_loss, 2, (10.0, -5.0)),
    Case("sigmoid, ids", _with_ids(K.sigmoid_contrastive_loss), 2, (10.0, -5.0), "both"),
    Case("sigmoid, ignored ids", _with_ids(K.sigmoid_contrastive_loss, same_id="ignore"), 2, (10.0, -5.0), "both"),
    Case("clip", K.clip_loss, 2, (14.0,)),
    Case("clip, smoothed", _smoothed, 2, (14.0,)),
    Case("clip, ids", _with_ids(K.clip_loss), 2, (14.0,), "both"),
    Case("clip, ignored ids", _with_ids(K.clip_loss, same_id="ignore", offset=1), 2, (14.0,), "both"),
    Case("nt_xent", K.nt_xent_loss, 2, (0.2,)),
    Case("sup_con", _sup_con, 1, (0.2,), "one"),
]


@dataclass
class Whole:
    """A batch, what belongs to which rank, and the loss with its gradients in float64 and in fp32."""

    case: Case
    counts: list[int]
    reduction: str

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(len(self.case.name) + sum(self.counts))
        rows = sum(self.counts)
        draw = (torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64) for _ in range(self.case.features))
        self.features = [F.normalize(t, dim=-1) for t in draw]
        sides = {"": 0, "one": 1, "both": 2}[self.case.ids]
        ids = [torch.randint(0, 1 + rows // 3, (rows,), generator=generator) for _ in range(sides)]
        self.ids = ids

    def leaves(self, dtype: torch.dtype, rows: slice) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        features = [t[rows].to(dtype).requires_grad_() for t in self.features]
        scalars = [torch.tensor(t, dtype=dtype, requires_grad=True) for t in self.case.scalars]
        return features, scalars, [ids[rows] for ids in self.ids]

    def run(self, dtype: torch.dtype, rows: slice, **how: object) -> list[Tensor]:
        """The loss, the gradients of features and of scalars."""
        features, scalars, ids = self.leaves(dtype, rows)
        loss = self.case.call(*features, *scalars, *ids, reduction=self.reduction, **how)
        loss.backward()
        return [loss.detach(), *(t.grad for t in (*features, *scalars))]

    def rows_of(self, rank: int) -> slice:
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])


def _shards(world: int) -> list[list[int]]:
    """Even, uneven, and with a rank that has nothing."""
    return [[16] * world, [7 + 5 * rank for rank in range(world)], [0 if rank == world - 1 else 9 for rank in range(world)]]


def error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)).item() if found.numel() else 0.0


def plans(world: int) -> Iterator[tuple[Case, list[int], str]]:
    for case, counts in itertools.product(CASES, _shards(world)):
        yield case, counts, "mean"
    yield CASES[0], _shards(world)[1], "sum"
    yield CASES[3], _shards(world)[1], "sum"


def losses_are_those_of_one_process(rank: int, world: int) -> None:
    group = dist.group.WORLD
    for case, counts, reduction in plans(world):
        whole = Whole(case, counts, reduction)
        if sum(counts) == 0:
            continue
        exact, alone = whole.run(torch.float64, slice(None)), whole.run(torch.float32, slice(None))
        bits: list[list[Tensor]] = []
        for strategy, grad_reduce in (("gather", "mean"), ("ring", "mean"), ("ring", "sum"), ("gather", "mean")):
            how = {"group": group, "strategy": strategy, "grad_reduce": grad_reduce}
            for dtype in (torch.float32, torch.float64):
                loss, *gradients = whole.run(dtype, whole.rows_of(rank), **how)
                factor = world if grad_reduce == "mean" else 1
                for index, gradient in enumerate(gradients):
                    is_scalar = index >= case.features
                    expected = exact[1 + index] * (factor / world) if is_scalar else exact[1 + index][whole.rows_of(rank)] * factor
                    reference = error(alone[1 + index], exact[1 + index])
                    scale = (exact[1 + index].abs().max() * (factor / world if is_scalar else factor)).item()
                    found = ((gradient.double() - expected).abs().max() / scale).item() if gradient.numel() else 0.0
                    bound = max(2 * reference, 4e-7) if dtype == torch.float32 else 1e-13
                    assert found <= bound, (case.name, counts, strategy, grad_reduce, index, found, bound, gradient, expected)
                found, bound = error(loss, exact[0]), max(2 * error(alone[0], exact[0]), 2e-7)
                assert found <= (bound if dtype == torch.float32 else 1e-13), (case.name, counts, strategy, found, bound)
                if dtype == torch.float32 and grad_reduce == "mean":
                    bits.append([loss, *gradients])
        for other in bits[1:]:
            assert all(torch.equal(a, b) for a, b in zip(bits[0], other, strict=True)), (case.name, counts)
