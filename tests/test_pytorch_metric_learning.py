"""NT-Xent, SupCon and the memory of batches beside pytorch-metric-learning's own: the same values and gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory import linux_only, peak_mb
from peers import assert_same_signature
from torch import Tensor

from ssl_kernels import use_workspace
from ssl_kernels.ops import pair_tiles
from ssl_kernels.ops.pair_tiles import ListedPairs, SameLabels

theirs = pytest.importorskip("pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed")

from pytorch_metric_learning import distances, miners, reducers, regularizers  # noqa: E402

from ssl_kernels.integrations import pytorch_metric_learning as ours  # noqa: E402

LOSSES = ("NTXentLoss", "SupConLoss")
TINY_MB = 0.02  # tiles of some rows


def assert_same(make: Callable[[Any], Tensor], leaves: list[Tensor], rtol: float = 2e-5) -> None:
    """Of a function of the module that has the classes."""
    values = [make(module) for module in (ours, theirs)]
    assert values[0].dtype == values[1].dtype
    torch.testing.assert_close(*values, rtol=rtol, atol=1e-6)
    for a, b in zip(*(torch.autograd.grad(value, leaves) for value in values), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=10 * rtol, atol=rtol * b.abs().max().item())


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embeddings and references with labels, some of which nothing else has."""
    z, labels = torch.randn(26, 8, dtype=dtype, requires_grad=True), torch.randint(7, (26,))
    ref, ref_labels = torch.randn(37, 8, dtype=dtype, requires_grad=True), torch.randint(9, (37,))
    labels[:3] = torch.tensor([100, -5, 101])
    return z, labels, ref, ref_labels


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("temperature", [None, 0.5, 0.03])
def test_labels(name: str, temperature: float | None) -> None:
    options = {} if temperature is None else {"temperature": temperature}
    z, labels, ref, ref_labels = draw()
    assert_same(lambda m: getattr(m, name)(**options)(z, labels), [z])
    assert_same(lambda m: getattr(m, name)(**options)(z, labels, ref_emb=ref, ref_labels=ref_labels), [z, ref])
    others = z.detach().roll(1, 0).requires_grad_()
    assert_same(lambda m: getattr(m, name)(**options)(z, labels, ref_emb=others, ref_labels=labels), [z, others])
    halves = labels / 2
    assert_same(lambda m: getattr(m, name)(**options)(z, halves, ref_emb=ref, ref_labels=ref_labels / 2), [z, ref])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "miner",
    [miners.TripletMarginMiner(0.3), miners.MultiSimilarityMiner(0.1), miners.PairMarginMiner(0.5, 1.4)],
    ids=lambda miner: type(miner).__name__,
)
def test_miners(name: str, miner: Any) -> None:
    z, labels, ref, ref_labels = draw()
    mined, between = miner(z.detach(), labels), miner(z.detach(), labels, ref.detach(), ref_labels)
    assert all(len(t) > 10 for t in (*mined, *between))
    for workspace_mb in (64, TINY_MB):
        with use_workspace(workspace_mb):
            assert_same(lambda m: getattr(m, name)(0.3)(z, labels, mined), [z])
            assert_same(lambda m: getattr(m, name)(0.3)(z, indices_tuple=mined), [z])
            assert_same(lambda m: getattr(m, name)(0.3)(z, labels, between, ref, ref_labels), [z, ref])


@pytest.mark.parametrize("name", LOSSES)
def test_dtypes_and_a_learned_temperature(name: str) -> None:
    z, labels, ref, ref_labels = draw(torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rtol = 1e-10
    assert_same(lambda m: getattr(m, name)(t)(z, labels), [z, t], rtol)
    assert_same(lambda m: getattr(m, name)(t)(z, labels, ref_emb=ref, ref_labels=ref_labels), [z, ref, t], rtol)
    mined = miners.PairMarginMiner(0.5, 1.4)(z, labels)
    assert all(len(t) > 10 for t in mined)
    assert_same(lambda m: getattr(m, name)(t)(z, labels, mined), [z, t], rtol)
    half = z.detach().bfloat16().requires_grad_()
    loss = getattr(ours, name)()(half, labels)
    torch.testing.assert_close(loss, getattr(ours, name)()(half.float(), labels).bfloat16())
    assert torch.autograd.grad(loss, half)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_to_compare(name: str) -> None:
    """No positive pair, no negative one, or one of each, which pytorch-metric-learning takes for nothing, too."""
    z = torch.randn(3, 4, requires_grad=True)
    same, different, one = torch.zeros(3, dtype=torch.int64), torch.arange(3), torch.tensor([0])
    ref = {"ref_emb": z[:2], "ref_labels": torch.tensor([0, 1])}
    pair = torch.tensor([0]), torch.tensor([1]), torch.tensor([0]), torch.tensor([2])
    for call in (
        lambda loss: loss(z, same),
        lambda loss: loss(z, different),
        lambda loss: loss(z[:1], one),
        lambda loss: loss(z[:1], one, **ref),
        lambda loss: loss(z, same, pair),
        lambda loss: loss(z, same, (pair[0], pair[1], pair[0][:0], pair[0][:0])),
    ):
        values = [call(getattr(module, name)()) for module in (ours, theirs)]
        assert values[0] == values[1] == 0
        assert torch.equal(torch.autograd.grad(values[0], z)[0], torch.zeros(3, 4))


def test_rows_without_negatives_and_repeated_pairs() -> None:
    z = torch.randn(5, 4, requires_grad=True)
    a1, p, a2, n = (torch.tensor(t) for t in ([0, 0, 1, 4, 4], [1, 2, 0, 3, 3], [0, 0, 0, 2, 1], [3, 3, 4, 0, 3]))
    for name in LOSSES:
        assert_same(lambda m, name=name: getattr(m, name)()(z, indices_tuple=(a1, p, a2, n)), [z])


def test_rows_whose_loss_rounds_to_nothing_do_not_count() -> None:
    """The first two are equal, and 0.38 from the next two, at a temperature of which exp(-20) is left."""
    z = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.38, 0.925], [0.38, -0.925]], requires_grad=True)
    labels, others = torch.tensor([0, 0, 1, 1]), z.detach().clone()
    loss = ours.SupConLoss(0.03, reducer=reducers.DoNothingReducer())(z, labels)["loss"]["losses"]
    assert (loss == 0).tolist() == [True, True, False, False]
    assert_same(lambda m: m.SupConLoss(0.03)(z, labels), [z])
    assert_same(lambda m: m.SupConLoss(0.03)(z, labels, ref_emb=others, ref_labels=labels), [z])


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("memory_size", [40, 16])
def test_cross_batch_memory(name: str, memory_size: int) -> None:
    """Over the end of the memory and over again, with all kinds of calls."""
    pair = [module.CrossBatchMemory(getattr(module, name)(0.2), 8, memory_size) for module in (ours, theirs)]
    for step in range(7):
        batch = 16 if step != 4 else 1
        z, labels = torch.randn(batch, 8, requires_grad=True), torch.randint(5, (batch,))
        given = {}
        if step == 2:
            given["enqueue_mask"] = torch.arange(batch) % 3 == 0
        if step == 5:
            given["indices_tuple"] = miners.PairMarginMiner(0.5, 1.4)(z, labels)
            if name == "SupConLoss":  # pairs within the batch are others in the memory, and may be negative there
                del given["indices_tuple"]
        assert_same(lambda m: pair[m is theirs](z, labels, **given), [z])  # noqa: B023
        assert torch.equal(*(memory.embedding_memory for memory in pair))
    assert pair[0].state_dict().keys() == pair[1].state_dict().keys()


def test_cross_batch_memory_with_a_miner_or_around_other_losses() -> None:
    for make in (
        lambda m: m.CrossBatchMemory(m.NTXentLoss(0.2), 8, 40, miners.MultiSimilarityMiner(0.1)),
        lambda m: m.CrossBatchMemory(m.NTXentLoss(0.2, distance=distances.LpDistance()), 8, 40),
        lambda m: m.CrossBatchMemory(theirs.ContrastiveLoss(), 8, 40),
    ):
        pair = [make(module) for module in (ours, theirs)]
        for _ in range(3):
            z, labels = torch.randn(16, 8, requires_grad=True), torch.randint(5, (16,))
            assert_same(lambda m: pair[m is theirs](z, labels), [z])  # noqa: B023


OPTIONS: list[Callable[[], dict[str, Any]]] = [
    lambda: {"distance": distances.LpDistance()},
    lambda: {"distance": distances.DotProductSimilarity(normalize_embeddings=False)},
    lambda: {"distance": distances.CosineSimilarity(power=2)},
    lambda: {"reducer": reducers.PerAnchorReducer(reducers.AvgNonZeroReducer())},
    lambda: {"reducer": reducers.ThresholdReducer(low=0.1)},
    lambda: {"embedding_regularizer": regularizers.LpRegularizer(), "embedding_reg_weight": 0.3},
    lambda: {"distance": distances.CosineSimilarity(collect_stats=True)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options())))
def test_what_the_package_is_given(options: Callable[[], dict[str, Any]]) -> None:
    z, labels, *_ = draw()
    for name in LOSSES:
        if name == "SupConLoss" and "PerAnchor" in str(options()):
            continue  # which takes pairs, not rows
        assert_same(lambda m, name=name: getattr(m, name)(0.4, **options())(z, labels), [z])


def test_what_is_computed_here() -> None:
    assert ours.NTXentLoss().is_fused()
    assert ours.NTXentLoss(embedding_regularizer=regularizers.LpRegularizer()).is_fused()
    assert ours.SupConLoss(reducer=reducers.MeanReducer()).is_fused()
    assert not ours.NTXentLoss(reducer=reducers.ThresholdReducer(low=0.1)).is_fused()
    for name in LOSSES:
        assert not getattr(ours, name)(distance=distances.LpDistance()).is_fused()
        assert not getattr(ours, name)(distance=distances.CosineSimilarity(collect_stats=True)).is_fused()
        assert not getattr(ours, name)(distance=distances.DotProductSimilarity(power=2)).is_fused()


def test_the_signatures_are_the_same() -> None:
    for name in (*LOSSES, "CrossBatchMemory"):
        assert_same_signature(getattr(ours, name), getattr(theirs, name))


@linux_only
def test_memory_is_linear() -> None:
    """The batch at which pytorch-metric-learning asks for 120 GB; and a large memory with few labels."""
    z, labels = torch.randn(1200, 32, requires_grad=True), torch.arange(1200) % 10
    for name in LOSSES:
        loss = getattr(ours, name)()
        loss(z, labels).backward()
        assert peak_mb(lambda loss=loss: loss(z, labels).backward(), calls=2) < 20
    memory = ours.CrossBatchMemory(ours.NTXentLoss(), 32, 20_000)
    memory.embedding_memory.normal_()
    memory.label_memory.random_(1000)
    memory.has_been_filled = True
    with use_workspace(4):
        assert peak_mb(lambda: memory(z, labels).backward(), calls=2) < 30  # a matrix has 96 MB


@pytest.mark.parametrize("formula", [pair_tiles.nt_xent, pair_tiles.sup_con])
@pytest.mark.parametrize("workspace_mb", [64, 0.004])
def test_gradients_of_pairs(formula: pair_tiles.Formula, workspace_mb: float) -> None:
    """Of features, scale and log-sum-exps, in tiles of any size; rows of no pair have none."""
    labels, others = torch.tensor([3, 0, 0, 1, 7, 3, 1]), torch.tensor([0, 3, 1, 3, 0, 9])
    query, candidates = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (7, 6))
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    lse = torch.randn(7, dtype=torch.float64, requires_grad=True)
    a, b = torch.tensor([5, 0, 0, 2, 2, 2]), torch.tensor([1, 1, 4, 0, 0, 3])
    with use_workspace(workspace_mb):
        for pairs, right, *given in (
            (SameLabels(labels, others, None), candidates, lse),
            (SameLabels(labels, labels, torch.arange(7)), query, lse),
            (ListedPairs((a, b), (a, (b + 1) % 6), 7, 6), candidates),
        ):
            if formula is pair_tiles.sup_con:
                given = []  # which it does not take
            numbers = functools.partial(pair_tiles.by_row, formula, pairs)
            assert numbers(query, right, scale, *given).shape[0] == 7
            assert torch.autograd.gradcheck(
                lambda *t, numbers=numbers, paired=pairs.paired: numbers(*t)[paired], [query, right, scale, *given]
            )


def test_errors() -> None:
    z, labels, ref, _ = draw()
    loss = ours.NTXentLoss()
    with pytest.raises(
        ValueError, match=r"labels and indices_tuple cannot both be None|labels: expected labels, or an"
    ):
        loss(z)
    with pytest.raises(ValueError, match=r"labels: expected labels, or an indices_tuple, got neither"):
        loss(z, labels, ref_emb=ref)
    with pytest.raises(IndexError, match=r"indices_tuple: expected anchors from 0 to 25, got 0 to 26"):
        loss(z, labels, (torch.tensor([0, 26]), torch.tensor([0, 1]), torch.tensor([0, 1])))
    with pytest.raises(IndexError, match=r"indices_tuple: expected positives and negatives from 0 to 25, got -1 to 1"):
        loss(z, labels, (torch.tensor([0, 2]), torch.tensor([-1, 1]), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match=r"indices_tuple: expected pairs that are positive or negative, got some that"):
        ours.SupConLoss()(z, labels, (torch.tensor([0, 2]), torch.tensor([1, 1]), torch.tensor([1, 3])))
    with pytest.raises(ValueError, match=r"temperature: expected a positive number"):
        ours.SupConLoss(-1.0)(z, labels)
    with pytest.raises(TypeError, match=r"embeddings: "):
        loss(labels[:, None].expand(26, 4), labels)
