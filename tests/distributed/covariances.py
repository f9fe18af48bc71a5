"""What each rank runs of VICReg and Barlow Twins."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from shards import Whole, shares
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import BarlowTwinsLoss, KoLeoLoss, VICRegLoss, use_backend, use_workspace
from ssl_kernels.integrations import solo

LOSSES = {"vicreg": K.vicreg_loss, "barlow_twins": K.barlow_twins_loss}
WIDTHS = (12, 150)  # by features, and by rows


def batch(counts: list[int], width: int, mean: float = 1.0) -> Whole:
    """Correlated views, of features with means and variances of their own."""
    generator = torch.Generator().manual_seed(sum(counts) + width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base, spread, mean_ = draw(sum(counts), width), draw(width).abs() + 0.5, mean * draw(width)
    views = [((base + 0.5 * draw(*base.shape)) * spread + mean_).float().double() for _ in range(2)]
    return Whole(views, counts)


def losses_are_those_of_one_process(rank: int, world: int) -> None:
    group = dist.group.WORLD
    for name, loss in LOSSES.items():
        for width in WIDTHS:
            for counts in shares(world, 2):
                whole = batch(counts, width)
                first, *others = [
                    whole.check(name, loss, rank, group=group, strategy=strategy, grad_reduce=grad_reduce)
                    for strategy, grad_reduce in (
                        ("gather", "mean"),
                        ("ring", "mean"),
                        ("gather", "sum"),
                        ("gather", "mean"),
                    )
                ]
                assert all(map(torch.equal, first, others[2])), (name, width, counts)
                whole.check(name, loss, rank, torch.float64, group=group)
            whole = batch([5] * world, width)
            whole.check(name, loss, rank, group=group, even_batches=True)
            whole.check(name, loss, rank, torch.bfloat16, group=group)


def panels_backends_and_numerics(rank: int, world: int) -> None:
    group = dist.group.WORLD
    for name, loss in LOSSES.items():
        for width in WIDTHS:
            whole = batch([7 + 4 * r for r in range(world)], width)
            exact = whole.check(name, loss, rank, group=group)
            with use_workspace(0.004):  # panels of some rows
                for ours, other in zip(whole.check(name, loss, rank, group=group), exact, strict=True):
                    torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
            for backend in ("reference", "eager"):
                with use_backend(backend):
                    whole.check(name, loss, rank, group=group)
                    whole.check(name, loss, rank, torch.float64, group=group, grad_reduce="sum")
            # A mean that is large beside the deviations, of which the ranks have different parts.
            far = batch([7 + 4 * r for r in range(world)], width, mean=3000.0)
            far.check(name, loss, rank, group=group)
        # Rows have all variance in one feature: their products would leave nothing of the others.
        whole = batch([6] * world, 150)
        whole.tensors = [(t * torch.tensor([1000.0] + [1.0] * 149)).float().double() for t in whole.tensors]
        whole.check(name, loss, rank, group=group)
        # One view is frozen: the other has its gradient, and that one none.
        za, zb = (t.float()[whole.rows_of(rank)] for t in whole.tensors)
        leaf, constant = za.clone().requires_grad_(), zb
        (gradient,) = torch.autograd.grad(loss(leaf, constant, group=group), leaf)
        both = whole.run(loss, torch.float32, whole.rows_of(rank), group=group)
        torch.testing.assert_close(gradient, both[1])
        alone = LOSSES[name](za, zb)
        assert torch.equal(loss(za, zb, group=[dist.new_group([r]) for r in range(world)][rank]), alone)


def modules_and_peers(rank: int, world: int) -> None:
    counts = [5 + 2 * r for r in range(world)]
    whole = batch(counts, 12)
    for name, ours, alone in (
        ("VICReg", VICRegLoss(gather_distributed=True), VICRegLoss()),
        ("VICReg, group", VICRegLoss(group=dist.group.WORLD, mu_param=3.0), VICRegLoss(mu_param=3.0)),
        ("Barlow Twins", BarlowTwinsLoss(gather_distributed=True), BarlowTwinsLoss()),
        ("solo's VICReg", solo.vicreg_loss_func, VICRegLoss(mu_param=50.0)),
        ("solo's Barlow Twins", lambda a, b: 40 * solo.barlow_loss_func(a, b), BarlowTwinsLoss()),
    ):
        _whole_against(name, whole, ours, alone, rank)
    places = Whole([t[:, :10].reshape(-1, 5, 2) for t in whole.tensors], counts)
    _whole_against("VICReg of places", places, VICRegLoss(gather_distributed=True), VICRegLoss(), rank)

    # SimCLR as solo-learn writes it: the positives' share of a row's sum, of all rows; two views on each rank.
    images = [list(range(10 * r, 10 * r + count)) * 2 for r, count in enumerate(counts)]
    indexes = torch.cat([torch.tensor(of_rank) for of_rank in images])
    views = _one_view([2 * count for count in counts])
    views.check(
        "solo's SimCLR",
        lambda z, own=None: _simclr(z, indexes) if own is None else solo.simclr_loss_func(z, own, 0.3),
        rank,
        own=indexes[views.rows_of(rank)],
    )

    # However the rows are spread, Barlow Twins is one loss. That of lightly is not, where the processes' rows differ.
    even = batch([6] * world, 12)
    even.tensors = [torch.cat([part + r for r, part in enumerate(t.split(6))]) for t in even.tensors]
    _whole_against("Barlow Twins, uneven", even, BarlowTwinsLoss(gather_distributed=True), BarlowTwinsLoss(), rank)
    try:
        from lightly.loss import BarlowTwinsLoss as Theirs
    except ImportError:
        return
    own = [t[even.rows_of(rank)].float() for t in even.tensors]
    all_of_them = [t.float() for t in even.tensors]
    expected, theirs = Theirs()(*all_of_them), Theirs(gather_distributed=True)(*own)
    torch.testing.assert_close(BarlowTwinsLoss(gather_distributed=True)(*own), expected)
    assert abs(theirs - expected) > 0.05 * expected


def _one_view(counts: list[int]) -> Whole:
    return Whole(batch(counts, 12).tensors[:1], counts)


def _simclr(z: Tensor, indexes: Tensor) -> Tensor:
    similarity = (F.normalize(z) @ F.normalize(z).t() / 0.3).exp() * ~torch.eye(len(z), dtype=torch.bool)
    same = indexes[:, None] == indexes
    return -((similarity * same).sum(1) / similarity.sum(1)).log().mean()


def _whole_against(name: str, whole: Whole, ours: Any, alone: Any, rank: int) -> None:
    exact = whole.run(alone, torch.float64)
    found = whole.run(ours, torch.float32, whole.rows_of(rank))
    for index, (a, b) in enumerate(zip(found, exact, strict=True)):
        expected = b.float() if index == 0 else len(whole.counts) * b[whole.rows_of(rank)].float()
        torch.testing.assert_close(a, expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def parts_of_the_world_and_errors(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    members = [2, 1]
    group = dist.new_group(members)
    if rank in members:
        for name, loss in LOSSES.items():
            for width in WIDTHS:
                batch([6, 9], width).check(name, loss, dist.get_group_rank(group, rank), group=group)
    mesh = init_device_mesh("cpu", (1, 3), mesh_dim_names=("pp", "dp"))
    z = torch.randn(4, 3)
    for name, loss in LOSSES.items():
        batch([3, 4, 5], 12).check(name, loss, rank, group=mesh["dp"])
        rows = 1 if rank == 0 else 0
        for arguments, message in (
            ((z[:rows], z[:rows]), "za: expected at least 2 rows over all ranks, which a variance needs, got 1"),
            (
                (z[:, : 2 + rank % 2],) * 2,
                f"{name}_loss: features: expected the same on all ranks, got 2 on ranks 0, 2; 3",
            ),
            (
                (z.double() if rank == 1 else z,) * 2,
                f"{name}_loss: dtype: expected the same on all ranks, got torch.float32",
            ),
            (
                (z.clone().requires_grad_(rank == 0), z),
                f"{name}_loss: gradients wanted: expected the same on all ranks",
            ),
        ):
            _raises(message, loss, *arguments, group=dist.group.WORLD)
        _raises("grad_reduce: expected one of 'mean', 'sum', got 'none'", loss, z, z, grad_reduce="none")
    _raises("vicreg_loss: eps: expected the same", K.vicreg_loss, z, z, eps=0.1 * (1 + rank), group=dist.group.WORLD)


def _raises(message: str, loss: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        loss(*arguments, **options)


def compiled(rank: int, world: int) -> None:
    """In one graph, and as without it to the last bit."""
    group = dist.group.WORLD
    for loss, whole in (
        *((loss, batch([5 + 2 * r for r in range(world)], width)) for loss in LOSSES.values() for width in WIDTHS),
        (
            K.koleo_loss,
            Whole(batch([5 + 2 * r for r in range(world)], 12).tensors[:1], [5 + 2 * r for r in range(world)]),
        ),
    ):
        torch._dynamo.reset()
        rows, graph = whole.rows_of(rank), torch.compile(loss, fullgraph=True, backend="aot_eager")
        for a, b in zip(
            whole.run(graph, torch.float32, rows, group=group),
            whole.run(loss, torch.float32, rows, group=group),
            strict=True,
        ):
            assert torch.equal(a, b)
    z = torch.randn(5, 4)
    for module, arguments in (
        (VICRegLoss(gather_distributed=True), (z, z.flip(0))),
        (BarlowTwinsLoss(group=group), (z, z.flip(0))),
        (KoLeoLoss(gather_distributed=True), (z,)),
    ):
        graph = torch.compile(module, fullgraph=True, backend="aot_eager")
        assert torch.equal(graph(*arguments), module(*arguments))
