"""Losses of retrieval and of recommenders, against the formulas that they replace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive import unit_rows
from memory import linux_only, peak_mb, saved_bytes
from peers import assert_same, value_and_gradients
from torch import Tensor

from ssl_kernels.integrations.retrieval import (
    DistributedContrastiveLoss,
    EmbedderLoss,
    SimpleContrastiveLoss,
    TwoTowerLoss,
)


def leaves(*rows: int, width: int = 8) -> list[Tensor]:
    return [unit_rows(n, width).requires_grad_() for n in rows]


def interleaved(q: Tensor, p: Tensor) -> Tensor:
    """Tevatron's and FlagEmbedding's."""
    scores = q @ p.t()
    return F.cross_entropy(scores, torch.arange(len(q)) * (len(p) // len(q)))


@pytest.mark.parametrize("count", [1, 4])
def test_tevatron(count: int) -> None:
    q, p = leaves(12, 12 * count)
    for loss in (SimpleContrastiveLoss(), DistributedContrastiveLoss(), DistributedContrastiveLoss(scale_loss=False)):
        assert_same(value_and_gradients(loss(9 * q, p), [q, p]), value_and_gradients(interleaved(9 * q, p), [q, p]))
    target = torch.randperm(12 * count)[:12]
    for reduction in ("mean", "sum", "none"):
        ours = SimpleContrastiveLoss()(q, p, target, reduction)
        theirs = F.cross_entropy(q @ p.t(), target, reduction=reduction)
        assert ours.shape == theirs.shape
        assert_same(value_and_gradients(ours.sum(), [q, p]), value_and_gradients(theirs.sum(), [q, p]))


def distilled(q: Tensor, p: Tensor, teacher: Tensor, kind: str, temperature: float, in_batch: bool) -> Tensor:
    """As FlagEmbedding's modules have it, with a matrix and with -inf for passages that a query has found."""
    rows, count = teacher.shape
    scores = q @ p.t() / temperature
    first = torch.arange(rows) * count
    own = torch.stack([scores[torch.arange(rows), first + i] for i in range(count)], 1)
    if kind == "kl_div":
        loss = F.cross_entropy(scores, first) if in_batch else F.cross_entropy(own, torch.zeros_like(first))
        return loss - (own.log_softmax(1) * teacher).sum(1).mean()
    loss = torch.zeros(())
    for i in range(count):
        loss = loss + (F.cross_entropy(scores, first + i, reduction="none") * teacher[:, i]).mean()
        scores = scores.scatter(1, (first + i)[:, None], -torch.inf)
    return loss


@pytest.mark.parametrize("count", [1, 3])
def test_flag_embedding(count: int) -> None:
    q, p = leaves(10, 10 * count)
    loss = EmbedderLoss(0.1)
    assert_same(value_and_gradients(loss(q, p), [q, p]), value_and_gradients(interleaved(q / 0.1, p), [q, p]))
    own = torch.einsum("qd,qcd->qc", q, p.view(10, count, -1)) / 0.1
    expected = F.cross_entropy(own, torch.zeros(10, dtype=torch.int64))
    alone = EmbedderLoss(0.1, in_batch_negatives=False)
    assert_same(value_and_gradients(alone(q, p), [q, p]), value_and_gradients(expected, [q, p]))
    teacher = torch.randn(10, count).softmax(1)
    for kind, in_batch in (("kl_div", True), ("kl_div", False), ("m3_kd_loss", True)):
        loss = EmbedderLoss(0.1, kd_loss_type=kind, in_batch_negatives=in_batch)
        expected = distilled(q, p, teacher, kind, 0.1, in_batch)
        assert_same(value_and_gradients(loss(q, p, teacher), [q, p]), value_and_gradients(expected, [q, p]))


def two_towers(users: Tensor, items: Tensor, ids: Tensor | None, log_q: Tensor | None, temperature: Any) -> Tensor:
    """With all items of the batch first, then sampled ones."""
    logits = F.normalize(users, dim=1) @ F.normalize(items, dim=1).t() / temperature
    if log_q is not None:
        logits = logits - log_q
    own = torch.eye(*logits.shape, dtype=torch.bool)
    if ids is not None:
        logits = logits.masked_fill((ids[: len(users), None] == ids) & ~own, -torch.inf)
    return F.cross_entropy(logits, torch.arange(len(users)), reduction="none")


def test_two_towers() -> None:
    users, items, negatives = ((3 * t).detach().requires_grad_() for t in leaves(14, 14, 9))
    ids, more_ids = torch.randint(6, (14,)), torch.randint(6, (9,))
    log_q, more_log_q = torch.randn(14), torch.randn(9)
    t = torch.tensor(0.2, requires_grad=True)
    loss = TwoTowerLoss(t)
    both, every_id, every_q = torch.cat([items, negatives]), torch.cat([ids, more_ids]), torch.cat([log_q, more_log_q])
    given = [users, items, t]
    for ours, theirs in (
        (loss(users, items), two_towers(users, items, None, None, t)),
        (loss(users, items, ids), two_towers(users, items, ids, None, t)),
        (loss(users, items, log_q=log_q), two_towers(users, items, None, log_q, t)),
        (loss(users, items, ids, log_q=log_q), two_towers(users, items, ids, log_q, t)),
    ):
        assert_same(value_and_gradients(ours, given), value_and_gradients(theirs.mean(), given))
    given.append(negatives)
    weights = torch.rand(14)
    sampled = {"negatives": negatives, "negative_ids": more_ids, "negative_log_q": more_log_q, "weights": weights}
    ours, theirs = loss(users, items, ids, log_q=log_q, **sampled), two_towers(users, both, every_id, every_q, t)
    assert_same(value_and_gradients(ours, given), value_and_gradients((weights * theirs).mean(), given))
    ours, theirs = loss(users, items, negatives=negatives), two_towers(users, both, None, None, t).mean()
    assert_same(value_and_gradients(ours, given), value_and_gradients(theirs, given))
    plain = TwoTowerLoss(0.5, normalize=False)(users, items)
    assert_same([plain], [F.cross_entropy(users @ items.t() / 0.5, torch.arange(14))])


def test_the_whole_catalogue() -> None:
    users, catalogue = leaves(14, 30)
    target, weights = torch.randint(30, (14,)), torch.rand(14)
    given = [users, catalogue]
    for weight in (None, weights):
        logits = F.normalize(users, dim=1) @ F.normalize(catalogue, dim=1).t() / 0.05
        ours = TwoTowerLoss().over_catalogue(users, catalogue, target, weights=weight)
        theirs = (F.cross_entropy(logits, target, reduction="none") * (1 if weight is None else weight)).mean()
        assert_same(value_and_gradients(ours, given), value_and_gradients(theirs, given))


def test_the_correction_estimates_the_loss_over_the_catalogue() -> None:
    """Of a user and many items that are drawn with probabilities Q. Without the correction it is another loss."""
    user, catalogue = leaves(1, 6)
    popularity = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.05, 0.05])
    target, drawn = torch.tensor([2]), torch.multinomial(popularity, 40_000, replacement=True)
    loss = TwoTowerLoss(0.5)
    exact = loss.over_catalogue(user, catalogue, target)
    given = {"negatives": catalogue[drawn], "negative_ids": drawn, "log_q": torch.zeros(1)}
    sizes = {True: (40_000 * popularity).log()[drawn], False: torch.full((40_000,), 40_000 / 6).log()}
    found = {key: loss(user, catalogue[target], target, negative_log_q=log_q, **given) for key, log_q in sizes.items()}
    torch.testing.assert_close(found[True], exact, rtol=0.01, atol=0)
    assert abs(found[False] - exact) > 0.1


def test_errors() -> None:
    q, p = leaves(4, 10)
    for loss in (SimpleContrastiveLoss(), DistributedContrastiveLoss()):
        with pytest.raises(ValueError, match=r"y: expected as many rows for each of the 4 of x, got 10 rows"):
            loss(q, p)
    with pytest.raises(ValueError, match=r"p_reps: expected as many rows for each of the 4 of q_reps, got 10 rows"):
        EmbedderLoss()(q, p)
    with pytest.raises(ValueError, match=r"teacher_targets: expected shape \(4, 2\), got \(4, 3\)"):
        EmbedderLoss()(q, p[:8], torch.ones(4, 3))
    with pytest.raises(ValueError, match=r"kd_loss_type: expected one of 'kl_div', 'm3_kd_loss', got 'kl'"):
        EmbedderLoss(kd_loss_type="kl")
    with pytest.raises(
        ValueError, match=r"in_batch_negatives: expected True with kd_loss_type='m3_kd_loss', got False"
    ):
        EmbedderLoss(kd_loss_type="m3_kd_loss", in_batch_negatives=False)
    loss = TwoTowerLoss()
    with pytest.raises(ValueError, match=r"items: expected 4 rows as users has, got 10"):
        loss(q, p)
    ids = torch.arange(4)
    for given, message in (
        ({"negatives": p}, "negative_ids: expected a tensor, got None"),
        ({"negative_ids": ids}, "negative_ids: expected None without negatives, or without the same of items, got a"),
        ({"log_q": torch.zeros(4), "negatives": p, "negative_ids": ids}, "negative_log_q: expected a tensor, got None"),
        ({"negatives": p, "negative_ids": ids, "negative_log_q": torch.zeros(10)}, "negative_log_q: expected None wi"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(q, q, ids, **given)
    with pytest.raises(ValueError, match=r"temperature: expected a positive number"):
        TwoTowerLoss(0.0)(q, q)


@linux_only
def test_memory_is_linear() -> None:
    q, p = leaves(1024, 4096, width=16)
    teacher = torch.rand(1024, 4).softmax(1)
    for loss in (EmbedderLoss(0.05), EmbedderLoss(0.05, kd_loss_type="m3_kd_loss")):
        with saved_bytes() as kept:
            loss(q, p, teacher)
        assert sum(kept) < 3 * 2**20  # a matrix has 16 MB
        assert peak_mb(lambda loss=loss: loss(q, p, teacher).backward(), calls=2) < 14
