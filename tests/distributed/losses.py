"""Run by each rank: losses and gradients of its rows, against those of one process with all rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import ClipLoss, MoCoV3Loss, NTXentLoss, SigLipLoss, use_backend, use_tile_budget, use_workspace

WIDTH = 24


@dataclass
class Case:
    """A loss of ``features`` matrices with rows on every rank, of scalars and, for ``ids`` of the matrices, of ids."""

    name: str
    call: Callable[..., Tensor]
    features: int
    scalars: tuple[float, ...]
    ids: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[int, ...] = ()  # features that need no gradient


def _sup_con(z: Tensor, temperature: Tensor, ids: Tensor, **options: Any) -> Tensor:
    return K.sup_con_loss(z, ids, temperature, **options)


def _sigmoid(x: Tensor, y: Tensor, t: Tensor, b: Tensor, *ids: Tensor, **options: Any) -> Tensor:
    return K.sigmoid_contrastive_loss(x, y, t, b, **dict(zip(("x_ids", "y_ids"), ids, strict=False)), **options)


def _clip(x: Tensor, y: Tensor, t: Tensor, *ids: Tensor, **options: Any) -> Tensor:
    return K.clip_loss(x, y, t, **dict(zip(("x_ids", "y_ids"), ids, strict=False)), **options)


def _moco_v3(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor, *, reduction: str, **how: Any) -> Tensor:
    return MoCoV3Loss(0.2, **how)(q1, q2, k1, k2)


def _rows(q: Tensor, p: Tensor, n: Tensor, b: Tensor, t: Tensor, *ids: Tensor, **options: Any) -> Tensor:
    """With two candidates to a query, a bias, ids and weights."""
    return K.row_softmax_loss(
        q, torch.cat([p, n]), t, candidate_bias=b[:, :2].t().flatten(), query_ids=ids[0],
        candidate_ids=torch.cat([ids[1], ids[1] + 3]), weights=0.5 + ids[0] % 3, **options,
    )  # fmt: skip


def _prefixes(q: Tensor, c: Tensor, guide_q: Tensor, guide_c: Tensor, t: Tensor, **options: Any) -> Tensor:
    """With a guide and targets that are not in order."""
    guide = {"guide_query": guide_q, "guide_candidates": guide_c.flip(0), "hardness": 2.0}
    target = torch.arange(len(q)).flip(0)
    return K.row_softmax_loss(
        q, c.flip(0), t, target=target, dims=(10, WIDTH), dim_weights=(0.5, 2.0), normalize=True, **guide, **options
    )


CASES = [
    Case("sigmoid", _sigmoid, 2, (10.0, -5.0)),
    Case("sigmoid, ids", _sigmoid, 2, (10.0, -5.0), 2),
    Case("sigmoid, ignored ids", _sigmoid, 2, (10.0, -5.0), 2, {"same_id": "ignore", "offset": 1}),
    Case("sigmoid, frozen x", _sigmoid, 2, (10.0, -5.0), frozen=(0,)),
    Case("sigmoid, frozen y", _sigmoid, 2, (10.0, -5.0), frozen=(1,)),
    Case("sigmoid, both frozen", _sigmoid, 2, (10.0, -5.0), frozen=(0, 1)),
    Case("clip", _clip, 2, (14.0,)),
    Case("clip, smoothed", _clip, 2, (14.0,), 0, {"label_smoothing": 0.1}),
    Case("clip, ids", _clip, 2, (14.0,), 2, {"label_smoothing": 0.1}),
    Case("clip, ignored ids", _clip, 2, (14.0,), 2, {"same_id": "ignore", "offset": -1}),
    Case("clip, frozen x", _clip, 2, (14.0,), frozen=(0,)),
    Case("clip, frozen y", _clip, 2, (14.0,), frozen=(1,)),
    Case("clip, both frozen", _clip, 2, (14.0,), frozen=(0, 1)),
    Case("nt_xent", K.nt_xent_loss, 2, (0.2,)),
    Case("sup_con", _sup_con, 1, (0.2,), 1),
    Case("moco v3", _moco_v3, 4, (), frozen=(2, 3)),
    Case("rows", _rows, 4, (14.0,), 2, {"label_smoothing": 0.1}),
    Case("rows, prefixes and a guide", _prefixes, 4, (14.0,), frozen=(2, 3)),
    Case("rows, frozen queries", lambda q, c, t, **o: K.row_softmax_loss(q, c, t, **o), 2, (14.0,), frozen=(0,)),
    Case("rows, frozen candidates", lambda q, c, t, **o: K.row_softmax_loss(q, c, t, **o), 2, (14.0,), frozen=(1,)),
]


class Whole:
    """A batch of all ranks, of which each has so many rows, and its loss."""

    def __init__(self, case: Case, counts: list[int], reduction: str = "mean") -> None:
        self.case, self.counts, self.reduction = case, counts, reduction
        self._alone: dict[torch.dtype, list[Tensor]] = {}
        generator = torch.Generator().manual_seed(sum(map(ord, case.name)))
        draw = (torch.randn(sum(counts), WIDTH, generator=generator, dtype=torch.float64) for _ in range(case.features))
        self.features = [F.normalize(t, dim=-1) for t in draw]
        self.ids = [
            torch.randint(0, 1 + sum(counts) // 3, (sum(counts),), generator=generator) for _ in range(case.ids)
        ]

    def rows_of(self, rank: int) -> slice:
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def alone(self, dtype: torch.dtype) -> list[Tensor]:
        """What one process finds, which is computed once: settings had better not change meanwhile."""
        if dtype not in self._alone:
            self._alone[dtype] = self.run(dtype)
        return self._alone[dtype]

    def run(self, dtype: torch.dtype, rows: slice = slice(None), **how: Any) -> list[Tensor]:
        """The loss, and the gradients of those features and scalars that need one."""
        features = [t[rows].to(dtype).requires_grad_(i not in self.case.frozen) for i, t in enumerate(self.features)]
        scalars = [
            torch.tensor(t, dtype=torch.float64 if dtype == torch.float64 else torch.float32) for t in self.case.scalars
        ]
        leaves = [t for t in (*features, *(t.requires_grad_() for t in scalars)) if t.requires_grad]
        ids = [i[rows] for i in self.ids]
        loss = self.case.call(*features, *scalars, *ids, reduction=self.reduction, **self.case.options, **how)
        return [loss.detach(), *torch.autograd.grad(-3 * loss, leaves)]


def rows_of_ranks(world: int) -> Iterator[list[int]]:
    """Even, uneven, and with a rank that has nothing."""
    yield [16] * world
    yield [7 + 5 * rank for rank in range(world)]
    yield [0 if rank == 1 else 9 for rank in range(world)]


def relative(found: Tensor, expected: Tensor, size: Tensor) -> float:
    difference = (found.double() - expected.double()).abs()
    return (difference.max() / size.double().abs().max()).item() if found.numel() else 0.0


def check(whole: Whole, dtype: torch.dtype, rank: int, group: Any, **how: Any) -> list[Tensor]:
    """The error is at most twice that of one process in fp32; or some rounding steps, where it happens to have none."""
    world, exact = len(whole.counts), whole.alone(torch.float64)
    alone = whole.alone(torch.float32 if dtype == torch.float64 else dtype)
    found = whole.run(dtype, whole.rows_of(rank), group=group, **how)
    factor = world if how.get("grad_reduce", "mean") == "mean" else 1
    for index, (ours, theirs, truth) in enumerate(zip(found, alone, exact, strict=True)):
        is_scalar = truth.dim() == 0
        expected = truth if is_scalar else truth[whole.rows_of(rank)] * factor
        if is_scalar and index > 0 and how.get("grad_reduce") == "sum":
            expected = truth / world
        size = truth if is_scalar else truth * factor
        error, of_one = relative(ours, expected, size), relative(theirs, truth, truth)
        bound = 1e-12 if dtype == torch.float64 else max(2 * of_one, 8 * torch.finfo(torch.float32).eps)
        assert error <= bound, (whole.case.name, whole.counts, dtype, how, index, error, bound)
    return found


def every_loss_is_that_of_one_process(rank: int, world: int, shards: int = 3) -> None:
    group = dist.group.WORLD
    for case in CASES:
        for counts in itertools.islice(rows_of_ranks(world), shards):
            if sum(counts) == 0:
                continue
            whole = Whole(case, counts)
            for strategy in ("gather", "ring"):
                first = check(whole, torch.float32, rank, group, strategy=strategy)
                if len(set(counts)) == world:  # uneven
                    again = whole.run(torch.float32, whole.rows_of(rank), group=group, strategy=strategy)
                    assert all(map(torch.equal, first, again)), (case.name, counts)
            check(whole, torch.float32, rank, group, strategy="ring", grad_reduce="sum")
            check(whole, torch.float64, rank, group, strategy="ring")
        check(Whole(case, [8] * world), torch.float32, rank, group, even_batches=True)
        if "reduction" not in case.options and case.name != "moco v3":
            check(Whole(case, [5 + rank for rank in range(world)], "sum"), torch.float32, rank, group)


def the_reference_and_other_kernels_agree(rank: int, world: int) -> None:
    for case in CASES:
        counts = [7 + 5 * rank for rank in range(world)]
        for backend in ("reference", "eager"):
            with use_backend(backend):
                whole = Whole(case, counts)
                for grad_reduce in ("mean", "sum"):
                    check(whole, torch.float32, rank, dist.group.WORLD, grad_reduce=grad_reduce)
        check(Whole(case, counts), torch.bfloat16, rank, dist.group.WORLD, strategy="ring")
    with use_backend("reference"):
        x = torch.randn(4, 3, requires_grad=True)
        loss = K.clip_loss(x, x, 1.0, group=dist.group.WORLD)
        with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
            torch.autograd.grad(loss, x, create_graph=True)


def log_sum_exps_meet_the_candidates_of_all(rank: int, world: int) -> None:
    """What differs from rank to rank is the loss: the mean of its gradients is that of the mean of the losses."""
    generator = torch.Generator().manual_seed(0)
    rows, cols = [5 + 3 * r for r in range(world)], [9 - 4 * r for r in range(world)]
    q, c, b = (torch.randn(sum(n), *w, generator=generator) for n, w in ((rows, (8,)), (cols, (8,)), (cols, ())))
    ids, others = torch.randint(0, 6, (sum(rows),), generator=generator), torch.arange(sum(cols)) % 6
    leaves = [t.double().requires_grad_() for t in (q, c, b, torch.tensor(3.0))]
    lse = K.row_lse(*leaves[:2], leaves[3], candidate_bias=leaves[2], query_ids=ids, candidate_ids=others)
    losses = [(1 + r) * part.square().sum() for r, part in enumerate(lse.split(rows))]
    expected = torch.autograd.grad(torch.stack(losses).sum(), leaves)
    own = slice(sum(rows[:rank]), sum(rows[: rank + 1])), slice(sum(cols[:rank]), sum(cols[: rank + 1]))
    for backend, strategy in itertools.product(("cpu", "eager", "reference"), ("gather", "ring")):
        mine = [t.detach().float().requires_grad_() for t in (q[own[0]], c[own[1]], b[own[1]], torch.tensor(3.0))]
        with use_backend(backend):
            found = K.row_lse(
                *mine[:2], mine[3], candidate_bias=mine[2], query_ids=ids[own[0]], candidate_ids=others[own[1]],
                group=dist.group.WORLD, strategy=strategy,
            )  # fmt: skip
        torch.testing.assert_close(found.double(), lse[own[0]], rtol=1e-5, atol=1e-5)
        gradients = torch.autograd.grad((1 + rank) * found.square().sum(), mine)
        dist.all_reduce(gradients[-1])
        parts = expected[0][own[0]], expected[1][own[1]], expected[2][own[1]], expected[3]
        for ours, exact in zip(gradients, parts, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4 * exact.abs().max())
    with pytest.raises(
        ValueError, match=r"row_lse: same_id: expected the same on all ranks, got ignore on rank 0; neg"
    ):
        K.row_lse(q, c, 1.0, same_id="negative" if rank else "ignore", group=dist.group.WORLD)


def large_batches_take_many_tiles(rank: int, world: int) -> None:
    """Panels, tiles that are kept and tiles that are not, and a seam."""
    for case in CASES:
        if case.frozen and "moco" not in case.name:
            continue
        for workspace, budget in ((0.03, 0), (0.03, 0.1), (64, 64)):
            with use_workspace(workspace), use_tile_budget(budget):
                whole = Whole(case, [150 + 40 * rank for rank in range(world)])
                check(whole, torch.float32, rank, dist.group.WORLD, strategy="ring")


def groups_may_be_parts(rank: int, world: int) -> None:
    """A group whose ranks are others than in the whole, and one dimension of a mesh."""
    from torch.distributed.device_mesh import init_device_mesh

    assert world == 3
    members = [2, 1]
    group = dist.new_group(members, use_local_synchronization=False)
    if rank in members:
        own = dist.get_group_rank(group, rank)
        for case in CASES:
            check(Whole(case, [6, 11]), torch.float32, own, group, strategy="ring")
    else:
        with pytest.raises(ValueError, match="group: expected a group that this process is in, got one of other"):
            K.clip_loss(torch.eye(3), torch.eye(3), 1.0, group=group)
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("pp", "dp"))
    check(Whole(CASES[0], [3, 4, 5]), torch.float32, rank, mesh["dp"])
    for wrong, error, message in (
        (mesh, ValueError, "group: expected a mesh of one dimension"),
        ("dp", TypeError, "group: expected a ProcessGroup"),
    ):
        with pytest.raises(error, match=message):
            K.clip_loss(torch.eye(3), torch.eye(3), 1.0, group=wrong)
    alone = [dist.new_group([member]) for member in range(world)][rank]
    one = K.clip_loss(torch.eye(3), torch.eye(3), 1.0, group=alone)
    assert torch.equal(one, K.clip_loss(torch.eye(3), torch.eye(3), 1.0))


def modules_take_world_size(rank: int, world: int) -> None:
    whole = Whole(CASES[6], [5 + 2 * rank for rank in range(world)])
    x, y = (t[whole.rows_of(rank)] for t in whole.features)
    scale, bias = torch.tensor(14.0), torch.tensor(-3.0)
    told = {"rank": rank, "world_size": world}
    clip, siglip = K.clip_loss(*whole.features, scale), K.sigmoid_contrastive_loss(*whole.features, scale, bias)
    for flags in ({}, {"gather_with_grad": True}, {"cache_labels": True}):
        torch.testing.assert_close(ClipLoss(**told, **flags)(x, y, scale), clip)
    gradients = []
    for local_loss in (False, True):
        leaf = x.float().requires_grad_()
        gradients += torch.autograd.grad(ClipLoss(local_loss=local_loss, **told)(leaf, y.float(), scale), leaf)
    assert torch.equal(*gradients)
    share = ClipLoss(local_loss=True, **told)(x, y, scale)
    with use_backend("reference"), pytest.raises(NotImplementedError, match="own_share: the reference gives the loss"):
        ClipLoss(local_loss=True, **told)(x, y, scale)
    shares = [torch.zeros_like(share) for _ in range(world)]
    dist.all_gather(shares, share)
    assert len({s.item() for s in shares}) == world
    torch.testing.assert_close(torch.stack(shares).mean(), clip)
    for dist_impl in (None, "bidir", "shift", "reduce", "gather"):
        loss = SigLipLoss(**told, dist_impl=dist_impl)
        torch.testing.assert_close(loss(x, y, scale, bias), siglip)
        assert loss.strategy == {"bidir": "ring", "shift": "ring", "gather": "gather"}.get(dist_impl, "auto")
    bank = NTXentLoss(0.3, memory_bank_size=(sum(whole.counts), WIDTH), group=dist.group.WORLD)
    bank(x.float().requires_grad_(), y.float())
    torch.testing.assert_close(bank.memory_bank.keys, whole.features[1].float())
    views = NTXentLoss(0.3, gather_distributed=True)(x, y)
    torch.testing.assert_close(views, NTXentLoss(0.3)(*whole.features))
    for wrong, message in (
        (
            {"rank": rank + 1, "world_size": world},
            f"ClipLoss: rank: expected {rank}, as of this process, got {rank + 1}",
        ),
        ({"rank": rank, "world_size": world + 1}, f"ClipLoss: world_size: expected {world}, as of this process"),
    ):
        with pytest.raises(ValueError, match=message):
            ClipLoss(**wrong)(x, y, scale)


def compiled(rank: int, world: int) -> None:
    """In one graph, and as the uncompiled loss to the last bit."""
    group = dist.group.WORLD
    told = {"rank": rank, "world_size": world}
    for case in (CASES[0], CASES[6], CASES[13], CASES[14]):
        whole = Whole(case, [6, 9])
        eager = whole.run(torch.float32, whole.rows_of(rank), group=group)
        inner = case.call
        whole.case = Case(
            case.name, torch.compile(inner, fullgraph=True, backend="aot_eager"), case.features, case.scalars, case.ids
        )
        found = whole.run(torch.float32, whole.rows_of(rank), group=group)
        assert all(map(torch.equal, eager, found)), case.name
    x, y = torch.randn(2, 5, 3)
    for loss, scalars in ((ClipLoss(**told), (2.0,)), (SigLipLoss(**told), (2.0, -1.0))):
        graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert torch.equal(graph(x, y, *scalars), loss(x, y, *scalars))
    for loss in (NTXentLoss(gather_distributed=True), NTXentLoss(group=group)):
        graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
        assert torch.equal(graph(x, y), loss(x, y))


def what_is_sharded(rank: int, world: int) -> None:
    """Towers under FSDP2, whose scale has one element; and features that are sharded themselves."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.image, self.text = torch.nn.Linear(6, 8), torch.nn.Linear(6, 8)
            self.scale = torch.nn.Parameter(torch.tensor([2.0]))
            self.loss = ClipLoss(rank=rank, world_size=world)

        def forward(self, images: Tensor, texts: Tensor) -> Tensor:
            loss: Tensor = self.loss(self.image(images), self.text(texts), self.scale.exp())
            return loss

    mesh = init_device_mesh("cpu", (world,))
    images, texts = torch.randn(2, 4 * world, 6, generator=torch.Generator().manual_seed(1))
    rows = slice(4 * rank, 4 * rank + 4)
    whole, sharded = Model(), Model()
    whole.loss = ClipLoss()
    fully_shard(sharded, mesh=mesh)
    expected, found = whole(images, texts), sharded(images[rows], texts[rows])
    expected.backward()
    found.backward()
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    x = DTensor.from_local(torch.randn(4, 8), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"x: expected this process's rows, as x.to_local\(\) and group= give them"):
        K.clip_loss(x, x, 1.0)


def autocast_travels_in_16_bits(rank: int, world: int) -> None:
    from resources import bytes_sent

    x, y = torch.randn(2, 32, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), bytes_sent() as sent:
        loss = K.sigmoid_contrastive_loss(x, y, 10.0, -10.0, group=dist.group.WORLD, strategy="ring")
    assert loss.dtype == torch.float32
    assert sum(sent) < (world - 1) * (2 * 32 * 64 * 2 + 1400)
    assert torch.autograd.grad(loss, x)[0].dtype == torch.float32
