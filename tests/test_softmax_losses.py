"""The modules ClipLoss, NTXentLoss and SupConLoss, and a training run on each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contrastive import Towers, losses_of_a_run
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels import ClipLoss, NTXentLoss, SupConLoss


def clip(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    loss = ClipLoss()(x, y, log_scale.exp())
    assert isinstance(loss, Tensor)
    return loss


def nt_xent(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    return NTXentLoss(temperature=0.2)(x, y) + 0 * log_scale


def sup_con(x: Tensor, y: Tensor, log_scale: Tensor) -> Tensor:
    labels = torch.arange(len(x)) // 2
    return SupConLoss(temperature=0.2)(torch.cat([x, y]), labels.repeat(2)) + 0 * log_scale


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("criterion", [clip, nt_xent])
def test_thirty_steps_follow_the_reference(backend: str, criterion: object) -> None:
    model = Towers()
    expected = losses_of_a_run("reference", criterion, copy.deepcopy(model))  # type: ignore[arg-type]
    losses = losses_of_a_run(backend, criterion, model)  # type: ignore[arg-type]
    assert losses[-1] < 0.8 * losses[0]
    assert losses == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_thirty_steps_of_sup_con_follow_the_reference(backend: str) -> None:
    model = Towers()
    expected = losses_of_a_run("reference", sup_con, copy.deepcopy(model))
    losses = losses_of_a_run(backend, sup_con, model)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected, rel=2e-4)


# ---- ClipLoss


def test_clip_names_what_several_processes_need() -> None:
    features = torch.eye(3)
    with pytest.raises(RuntimeError, match=r"ClipLoss: world_size=2: expected torch.distributed to be initialised"):
        ClipLoss(world_size=2)(features, features, 10.0)
    with pytest.raises(NotImplementedError, match="use_horovod: expected False, for features travel"):
        ClipLoss(world_size=2, use_horovod=True)

    class WithLogits(ClipLoss):
        def get_logits(self, *arguments: Any) -> Any:
            return super().get_logits(*arguments)

    assert WithLogits()(features, features, 10.0).isfinite()
    with pytest.raises(NotImplementedError, match="WithLogits: get_logits or get_ground_truth is overridden"):
        WithLogits(world_size=2)(features, features, 10.0)


def test_clip_accepts_every_argument_of_one_process() -> None:
    loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1, use_horovod=False)
    features = torch.eye(3)
    assert torch.equal(loss(features, features, 10.0), ClipLoss()(features, features, 10.0))
    assert loss.state_dict() == {}


def test_clip_ignores_a_logit_bias_and_names_its_output() -> None:
    x, y = torch.eye(3), torch.eye(3).flip(0)
    plain = ClipLoss()(x, y, 10.0)
    assert torch.equal(ClipLoss()(x, y, 10.0, -10.0), plain)
    assert torch.equal(ClipLoss()(x, y, 10.0, output_dict=True)["contrastive_loss"], plain)
    bias = torch.full((1,), -10.0, requires_grad=True)
    ClipLoss()(x, y, 10.0, bias).backward()
    assert bias.grad is not None
    assert bias.grad.tolist() == [0]


def test_clip_wants_as_many_texts_as_images() -> None:
    with pytest.raises(ValueError, match="text_features: expected 3 rows as image_features has, got 2"):
        ClipLoss()(torch.eye(3), torch.eye(3)[:2], 10.0)


# ---- NTXentLoss


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_must_be_positive(temperature: float) -> None:
    for module in (NTXentLoss, SupConLoss):
        with pytest.raises(ValueError, match="temperature: expected a positive number"):
            module(temperature=temperature)


def test_nt_xent_with_a_memory_bank_is_info_nce_over_past_keys() -> None:
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(20, 6))
    assert criterion.memory_bank is not None
    bank = criterion.memory_bank.keys.clone()
    seen = []
    for _ in range(4):  # 4 x 7 rows: past the end of the bank
        out0, out1 = torch.randn(7, 6, requires_grad=True), torch.randn(7, 6, requires_grad=True)
        query, key = F.normalize(out0, dim=-1), F.normalize(out1, dim=-1)
        expected = K.info_nce_loss(query, key, bank, 5.0)
        loss = criterion(out0, out1)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert out1.grad is not None  # the key of the batch is no constant
        seen.append(key.detach())
        rows = torch.cat(seen)
        written = torch.arange(len(rows)) % 20
        for row, key_ in zip(written.tolist(), rows, strict=True):
            bank[row] = key_
        torch.testing.assert_close(criterion.memory_bank.keys, bank)


def test_the_memory_bank_is_part_of_a_checkpoint() -> None:
    first, second = (NTXentLoss(memory_bank_size=(8, 4)) for _ in range(2))
    first(torch.randn(3, 4, requires_grad=True), torch.randn(3, 4))
    second.load_state_dict(first.state_dict())
    out0, out1 = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(first(out0, out1), second(out0, out1))
    assert second.memory_bank is not None
    assert second.memory_bank.pointer == 3


@pytest.mark.parametrize("size", [64, (64,), (1, 2, 3), (-1, 4), (4, -1)])
def test_a_memory_bank_needs_rows_and_features(size: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"memory_bank_size: expected \(rows, features\) or 0, got"):
        NTXentLoss(memory_bank_size=size)


# ---- SupConLoss


def test_sup_con_counts_the_rows_without_a_positive() -> None:
    criterion = SupConLoss(temperature=0.1)
    features = F.normalize(torch.randn(6, 4), dim=-1)
    for labels, unpaired in ((torch.tensor([0, 0, 1, 1, 2, 3]), 2), (torch.arange(6), 6)):
        loss = criterion(features, labels.int())  # any integers
        assert criterion.unpaired.item() == unpaired
        torch.testing.assert_close(loss, K.sup_con_loss(features, labels, 0.1))
    assert loss == 0
    assert criterion.state_dict() == {}


def test_the_modules_compile() -> None:
    x, y = F.normalize(torch.randn(2, 9, 4), dim=-1)
    labels = torch.arange(9) // 2
    cases: list[tuple[nn.Module, tuple[Tensor | float, ...]]] = [
        (ClipLoss(), (x, y, 10.0)),
        (NTXentLoss(), (x, y)),
        (SupConLoss(), (x, labels)),
    ]
    for module, arguments in cases:
        torch._dynamo.reset()
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(*arguments), module(*arguments))


@pytest.mark.parametrize("labels", [torch.tensor([0.1, 0.9, 1.2]), [0, 0, 1]])
def test_sup_con_wants_integer_labels(labels: Any) -> None:
    """As integers 0.1 and 0.9 would be one class."""
    with pytest.raises(TypeError, match=r"labels: expected a tensor of integers, got (torch.float32|list)"):
        SupConLoss()(torch.eye(3), labels)
