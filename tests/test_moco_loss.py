"""The modules of momentum contrast: peers' formulas, call compatibility, and training runs on them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ssl_kernels
from ssl_kernels import InfoNCELoss, KeyQueue, MoCoLoss, MoCoV3Loss
from ssl_kernels.integrations.moco import MoCoQueue
from ssl_kernels.integrations.solo import mocov2plus_loss_func, mocov3_loss_func


def views(batch: int = 24, width: int = 16) -> tuple[Tensor, Tensor]:
    query, key = torch.randn(batch, width), torch.randn(batch, width)
    return query.requires_grad_(), F.normalize(key + query.detach(), dim=1)


def assert_same(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (ours, theirs)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def moco_v2(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of the paper, with the queue [D, K]."""
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ queue], 1)
    return F.cross_entropy(logits / temperature, torch.zeros(len(query), dtype=torch.int64))


def moco_v3(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Algorithm 1 of the paper: ctr(q, k) with labels on the diagonal, times 2 tau."""
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).t() / temperature
    return F.cross_entropy(logits, torch.arange(len(query))) * 2 * temperature


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_queue_losses_are_the_paper_s(temperature: float) -> None:
    query, key = views()
    queue = KeyQueue(size=100, dim=16)
    unit = F.normalize(query, dim=1)
    expected = moco_v2(unit, key, queue.keys.t().clone(), temperature)
    assert_same(InfoNCELoss(temperature)(unit, key, queue.keys), expected, query)
    unit = F.normalize(query, dim=1)
    expected = moco_v2(unit, key, queue.keys.t().clone(), temperature)
    assert_same(MoCoLoss(temperature)(query, 3 * key, queue), expected, query)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_moco_v3_is_the_paper_s(temperature: float) -> None:
    (q1, k1), (q2, k2) = views(), views()
    expected = moco_v3(q1, k2, temperature) + moco_v3(q2, k1, temperature)
    assert_same(MoCoV3Loss(temperature)(q1, q2, 5 * k1, k2), expected, q1, q2)


def test_solo_learn_s_functions() -> None:
    """With its defaults, positionally and by keyword; the queue [D, K] may have any strides."""
    query, key = views()
    unit = F.normalize(query, dim=1)
    queue = F.normalize(torch.randn(16, 200), dim=0)
    for stored in (queue, queue.t().contiguous().t()):
        assert_same(mocov2plus_loss_func(unit, key, stored), moco_v2(unit, key, queue, 0.1), unit)
        ours = mocov2plus_loss_func(query=unit, key=key, queue=stored, temperature=0.2)
        assert_same(ours, moco_v2(unit, key, queue, 0.2), unit)
    assert_same(mocov3_loss_func(query, key), moco_v3(query, key, 0.2), query)
    assert_same(mocov3_loss_func(query=query, key=key, temperature=1.0), moco_v3(query, key, 1.0), query)
    with pytest.raises(ValueError, match=r"queue: expected 2 dimensions \[features, keys\], got shape \(16,\)"):
        mocov2plus_loss_func(unit, key, queue[:, 0])


@pytest.mark.parametrize("make_queue", [KeyQueue, lambda size, dim: MoCoQueue(dim, size)])
def test_the_queue_receives_the_keys_after_the_loss(make_queue: Callable[[int, int], KeyQueue]) -> None:
    """A perfect match among orthogonal keys scores next to nothing, and ln 2 only when it comes again."""
    queue, keys = make_queue(8, 16), torch.eye(16)
    queue.keys.copy_(keys[8:])
    criterion = MoCoLoss(temperature=0.02)
    assert criterion(keys[:1], keys[:1], queue) < 1e-6
    assert torch.equal(queue.keys[0], keys[0])
    again = criterion(keys[:1], keys[:1], queue, update=False)
    torch.testing.assert_close(again.item(), math.log(2), rtol=1e-6, atol=0)
    assert torch.equal(queue.keys[1], keys[9])


def test_a_perfect_match_of_moco_v3() -> None:
    """2 tau log(1 + (B - 1) e^(-1 / tau)) in each direction."""
    keys = torch.eye(8)
    expected = 2 * 2 * 0.2 * math.log1p(7 * math.exp(-1 / 0.2))
    torch.testing.assert_close(MoCoV3Loss(0.2)(keys, keys, keys, keys).item(), expected, rtol=1e-5, atol=0)


def test_keys_with_gradient_are_refused() -> None:
    query, _ = views()
    with pytest.raises(ValueError, match=r"key: expected keys without gradient.*detach\(\)"):
        MoCoV3Loss()(query, query, query, query)
    with pytest.raises(ValueError, match=r"key: expected the shape of query, \(24, 16\), got \(23, 16\)"):
        MoCoV3Loss()(query, query, query[1:].detach(), query[1:].detach())


@pytest.mark.parametrize("module", [InfoNCELoss, MoCoLoss, MoCoV3Loss])
@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_a_temperature_is_positive(module: type[nn.Module], temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature: expected a positive number, got"):
        module(temperature=temperature)


def test_modules_hold_no_state_and_say_what_they_are() -> None:
    assert InfoNCELoss().state_dict() == MoCoLoss().state_dict() == MoCoV3Loss().state_dict() == {}
    assert repr(InfoNCELoss(0.2, "sum")) == "InfoNCELoss(temperature=0.2, reduction='sum')"
    assert repr(MoCoLoss(0.2)) == "MoCoLoss(temperature=0.2)"
    assert repr(MoCoV3Loss(0.2)) == "MoCoV3Loss(temperature=0.2, gather=False)"


def losses_of_a_run(encoder: nn.Module, version: int, backend: str, steps: int = 30) -> list[float]:
    """Two noisy views of vectors that hold a signal in a few directions; the key encoder is a moving average."""
    momentum_encoder = copy.deepcopy(encoder).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    signal = torch.randn(4, 24, generator=generator)
    queue = KeyQueue(size=192, dim=16, normalize=True)
    queue.enqueue(momentum_encoder(torch.randn(192, 4, generator=generator) @ signal))  # harder than random keys
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        source = torch.randn(64, 4, generator=generator) @ signal
        x1, x2 = (source + torch.randn(64, 24, generator=generator) for _ in range(2))
        with ssl_kernels.use_backend(backend):
            if version == 2:
                loss = MoCoLoss(temperature=0.2)(encoder(x1), momentum_encoder(x2), queue)
            else:
                loss = MoCoV3Loss(0.2)(encoder(x1), encoder(x2), momentum_encoder(x1), momentum_encoder(x2))
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        for slow, fast in zip(momentum_encoder.parameters(), encoder.parameters(), strict=True):
            slow.lerp_(fast.detach(), 0.1)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("version", [2, 3])
def test_thirty_steps_follow_the_reference(version: int, backend: str) -> None:
    encoder = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 16))
    expected = losses_of_a_run(copy.deepcopy(encoder), version, "reference")
    losses = losses_of_a_run(encoder, version, backend)
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_moco_v3_under_autocast_rounds_a_positive_as_it_does_the_keys(temperature: float) -> None:
    """A cross-entropy is not negative, and of a single key it is 0."""
    for rows in (1, 6):
        features = torch.randn(rows, 32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = MoCoV3Loss(temperature)(features, features, features, features)
        assert loss > -1e-5
        if rows == 1:
            assert abs(loss) < 1e-5


@pytest.mark.parametrize("temperature", [0.0, -0.1])
def test_solo_learn_s_functions_want_a_positive_temperature(temperature: float) -> None:
    features = torch.eye(4)
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        mocov2plus_loss_func(features, features, features, temperature=temperature)
    with pytest.raises(ValueError, match="temperature: expected a positive number"):
        mocov3_loss_func(features, features, temperature=temperature)
