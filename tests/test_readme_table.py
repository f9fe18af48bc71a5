"""Each row of the table in docs/replace.md: its names exist, and on raw rows and with default arguments ours is theirs.

Peers that the tests do not install are written here, from their equations.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers import assert_same, assert_same_through_a_model
from torch import Tensor, nn

import ssl_kernels as S
from ssl_kernels.ema import ema_multi_avg_fn

PAGE = (Path(__file__).parents[1] / "docs" / "replace.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("| op | function | module | replaces |\n")[2].partition("\n\n")[0].splitlines()[1:]
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in TABLE]
CASES: dict[str, Callable[[], None]] = {}


def row(op: str) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def register(case: Callable[[], None]) -> Callable[[], None]:
        CASES[op] = case
        return case

    return register


@pytest.mark.parametrize("cells", ROWS, ids=[cells[0] for cells in ROWS])
def test_a_row(cells: list[str]) -> None:
    op, functions, modules, _ = cells
    for name in re.findall(r"`([\w.]+)`", functions + modules):
        path = re.sub(r"^K\b", "functional", re.sub(r"^I\b", "integrations", name))
        if path.startswith("integrations."):
            importorskip_peer(path.split(".")[1])
        assert callable(pkgutil.resolve_name(f"ssl_kernels.{path}"))
    assert op in CASES, "a row of the table without a test here"
    CASES[op]()


def test_every_case_has_a_row() -> None:
    assert CASES.keys() == {cells[0] for cells in ROWS}


def importorskip_peer(name: str) -> None:
    """Those of an integration that is imported with its peer."""
    try:
        importlib.import_module(f"ssl_kernels.integrations.{name}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("ssl_kernels"):
            raise
        pytest.skip(f"{error.name} is not installed")


def integration(name: str) -> Any:
    return pkgutil.resolve_name(f"ssl_kernels.integrations.{name}")


def peer(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(pytest.importorskip(module, reason=f"{module} is not installed"), attribute)


def raw(*shape: int) -> Tensor:
    """Rows of all lengths, with a gradient."""
    return (torch.randn(shape) * torch.logspace(-1, 1, shape[-2])[:, None] + 0.3).requires_grad_()


def same(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Values and gradients; the latter against the largest, for those of long rows are small."""
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6 * max(1.0, b.abs().max().item()))


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def same_in_transformers(name: str, **options: Any) -> None:
    text, vision = TOWER | {"vocab_size": 32, "max_position_embeddings": 8}, TOWER | {"image_size": 8, "patch_size": 4}
    config = peer(f"transformers.{name}Config")(text_config=text, vision_config=vision, **options)
    model = peer(f"transformers.{name}Model")(config)
    inputs = {"input_ids": torch.randint(32, (6, 8)), "pixel_values": torch.randn(6, 3, 8, 8)}
    theirs = model(**inputs, return_loss=True).loss
    assert_same_through_a_model(integration("transformers.contrastive_loss")(model, **inputs), theirs, model)


@row("SigLIP's pairwise sigmoid loss")
def sigmoid() -> None:
    leaves = raw(24, 8), raw(24, 8), torch.tensor(1.5, requires_grad=True), torch.tensor(-2.0, requires_grad=True)
    same(S.SigLipLoss()(*leaves), peer("open_clip.loss.SigLipLoss")()(*leaves), *leaves)
    same_in_transformers("Siglip")


@row("CLIP's symmetric softmax loss")
def clip() -> None:
    leaves = raw(24, 8), raw(24, 8), torch.tensor(1.5, requires_grad=True)
    same(S.ClipLoss()(*leaves), peer("open_clip.loss.ClipLoss")()(*leaves), *leaves)
    same_in_transformers("CLIP", projection_dim=16)


@row("SimCLR's NT-Xent")
def nt_xent() -> None:
    leaves = raw(24, 8), raw(24, 8)
    for options in ({}, {"memory_bank_size": (24, 8)}):
        ours, theirs = S.NTXentLoss(**options), peer("lightly.loss.NTXentLoss")(**options)
        if options:
            ours.memory_bank.keys.copy_(theirs.memory_bank.bank)
        for _ in range(2):  # the second against the bank that the first has written
            same(ours(*leaves), theirs(*leaves), *leaves)


@row("supervised contrastive loss")
def sup_con() -> None:
    z, labels = raw(40, 8), torch.cat([torch.arange(36) % 7, torch.arange(100, 104)])
    theirs = peer("pytorch_metric_learning.losses.SupConLoss")
    ours = integration("pytorch_metric_learning.SupConLoss")
    same(ours()(z, labels), theirs()(z, labels), z)
    same(S.SupConLoss(0.2)(F.normalize(z), labels), theirs(0.2)(z, labels), z)

    views, other = torch.arange(20).repeat(2), ~torch.eye(40, dtype=torch.bool)
    similarity = (F.normalize(z) @ F.normalize(z).t() / 0.1).exp()
    positive = (similarity * (views[:, None] == views) * other).sum(1)
    solo = -(positive / (similarity * other).sum(1)).log().mean()
    same(integration("solo.simclr_loss_func")(z, views), solo, z)


@row("NT-Xent with labels")
def nt_xent_with_labels() -> None:
    z, labels = raw(40, 8), torch.cat([torch.arange(36) % 7, torch.arange(100, 104)])
    modules = [
        (integration(f"pytorch_metric_learning.{name}"), peer(f"pytorch_metric_learning.losses.{name}"))
        for name in ("NTXentLoss", "SupConLoss", "CrossBatchMemory")
    ]
    same(*(loss()(z, labels) for loss in modules[0]), z)
    for losses in modules[:2]:
        memories = [memory(loss(), 8) for memory, loss in zip(modules[2], losses, strict=True)]
        for _ in range(2):  # the second with what the first has left there
            same(*(memory(z, labels) for memory in memories), z)


@row("in-batch and hard negatives of retrieval")
def retrieval() -> None:
    queries, passages = raw(10, 8), raw(40, 8)
    for name in ("SimpleContrastiveLoss", "DistributedContrastiveLoss", "EmbedderLoss"):
        expected = F.cross_entropy(queries @ passages.t(), 4 * torch.arange(10))
        same(integration(f"retrieval.{name}")()(queries, passages), expected, queries, passages)


@row("sampled softmax of two-tower recommenders")
def two_towers() -> None:
    users, items, ids, log_q = raw(20, 8), raw(20, 8), torch.arange(20) % 8, torch.randn(20)
    logits = F.normalize(users) @ F.normalize(items).t() / 0.05 - log_q
    logits = logits.masked_fill((ids[:, None] == ids) & ~torch.eye(20, dtype=torch.bool), -torch.inf)
    loss = integration("retrieval.TwoTowerLoss")()(users, items, ids, log_q=log_q)
    same(loss, F.cross_entropy(logits, torch.arange(20)), users, items)


def cross_entropy_over_queue(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64))


@row("softmax over rows, with hard negatives")
def _rows() -> None:
    theirs = peer("sentence_transformers.sentence_transformer.losses.MultipleNegativesRankingLoss")
    ours = integration("sentence_transformers.MultipleNegativesRankingLoss")
    columns = [raw(24, 16) for _ in range(3)]
    same(*(kind(None).compute_loss_from_embeddings(columns, None) for kind in (ours, theirs)), *columns)


@row("InfoNCE over a queue (MoCo v1, v2)")
def info_nce() -> None:
    q, k, queue = raw(12, 8), raw(12, 8).detach(), F.normalize(torch.randn(8, 50), dim=0)
    unit = F.normalize(q), F.normalize(k)
    same(S.InfoNCELoss()(*unit, queue.t()), cross_entropy_over_queue(*unit, queue, 0.07), unit[0])
    keys = S.KeyQueue(50, 8)
    keys.keys.copy_(queue.t())
    same(S.MoCoLoss()(q, k, keys), cross_entropy_over_queue(F.normalize(q), F.normalize(k), queue, 0.07), q)
    same(integration("solo.mocov2plus_loss_func")(q, k, queue), cross_entropy_over_queue(q, k, queue, 0.1), q)


@row("InfoNCE within the batch (MoCo v3)")
def moco_v3() -> None:
    def one_direction(q: Tensor, k: Tensor, temperature: float) -> Tensor:
        logits = F.normalize(q) @ F.normalize(k).t() / temperature
        return 2 * temperature * F.cross_entropy(logits, torch.arange(len(q)))

    (q1, q2), (k1, k2) = (raw(12, 8), raw(12, 8)), (raw(12, 8).detach(), raw(12, 8).detach())
    same(S.MoCoV3Loss()(q1, q2, k1, k2), one_direction(q1, k2, 1.0) + one_direction(q2, k1, 1.0), q1, q2)
    same(integration("solo.mocov3_loss_func")(q1, k1), one_direction(q1, k1, 0.2), q1)


@row("ALBEF's contrastive loss")
def albef() -> None:
    """alpha is 0.4 in its configurations; the models normalise."""
    image, text, *momentum = (F.normalize(raw(12, 8)) for _ in range(4))
    image, text = (t.detach().requires_grad_() for t in (image, text))
    momentum = [m.detach() for m in momentum]
    queues = [F.normalize(torch.randn(8, 20), dim=0) for _ in range(2)]

    def direction(x: Tensor, x_m: Tensor, y_m: Tensor, queue: Tensor) -> Tensor:
        keys = torch.cat([y_m.t(), queue], 1)
        targets = 0.4 * (x_m @ keys / 0.07).softmax(1) + 0.6 * torch.eye(12, 32)
        return -((x @ keys / 0.07).log_softmax(1) * targets).sum(1).mean()

    theirs = direction(image, *momentum, queues[1]) + direction(text, *momentum[::-1], queues[0])
    ours = S.ALBEFContrastiveLoss()(image, text, *momentum, queues[0].t(), queues[1].t(), 1 / 0.07)
    same(ours, theirs / 2, image, text)


@row("queue of keys")
def queue() -> None:
    batches = raw(3, 4, 6).detach()
    bank = integration("lightly.MemoryBankModule")((8, 6))
    theirs = peer("lightly.models.modules.memory_bank.MemoryBankModule")((8, 6))
    bank.bank.copy_(theirs.bank)
    moco, plain = integration("moco.MoCoQueue")(6, 8), S.KeyQueue(8, 6)
    expected, at = moco.queue.clone(), 0
    plain.keys.copy_(expected.t())
    for batch in batches:
        for a, b in zip(bank(batch, update=True), theirs(batch, update=True), strict=True):
            assert torch.equal(a, b)
        moco.enqueue(batch)
        plain.enqueue(batch)
        expected[:, at : at + 4] = batch.t()
        at = (at + 4) % 8
    assert torch.equal(bank.bank, theirs.bank)
    assert torch.equal(moco.queue, expected)
    assert torch.equal(plain.keys, expected.t())
    assert bank.bank_ptr == theirs.bank_ptr == moco.queue_ptr == plain.pointer == at


def cross_entropies(student: Tensor, probabilities: Tensor) -> Tensor:
    """[T, V, B] of logits [V, B, K] and probabilities [T, B, K]."""
    return -(probabilities[:, None] * (student / 0.1).log_softmax(-1)).sum(-1)


@row("DINO's cross-entropy between crops")
def dino() -> None:
    student, teacher = raw(4, 6, 16), raw(2, 6, 16).detach()
    ours, theirs = S.DINOLoss(16), peer("lightly.loss.DINOLoss")(16)
    meta, center = integration("dino.DINOLoss")(16, 4, 0.04, 0.07, 0, 10), torch.zeros(16)
    apart = ~torch.eye(2, 4, dtype=torch.bool)
    for _ in range(2):  # the second with the centre that the first has moved
        same(ours(list(teacher), list(student)), theirs(list(teacher), list(student)), student)
        p = ((teacher - center) / 0.07).softmax(-1)
        same(meta(student.flatten(0, 1), teacher.flatten(0, 1), 0), cross_entropies(student, p)[apart].mean(), student)
        center = 0.9 * center + 0.1 * teacher.mean((0, 1))
    p = teacher.softmax(-1)
    terms = cross_entropies(student, p)
    same(integration("dinov2.DINOLoss")(16)(list(student), list(p)), terms.mean(-1).sum(), student)
    same(integration("dinov3.DINOLoss")(16)(student, p), cross_entropies(student, p).mean(), student)


@row("iBOT's cross-entropy of masked patches")
def ibot() -> None:
    mask = torch.rand(3, 4, 4) < 0.5
    patches, images = int(mask.sum()), torch.arange(3)[:, None, None].expand(3, 4, 4)[mask]
    student, teacher = raw(patches, 16), raw(patches, 16).detach()
    ours, theirs = S.IBOTPatchLoss(16), peer("lightly.loss.IBOTPatchLoss")(16)
    for _ in range(2):
        same(ours(teacher, student, mask), theirs(teacher, student, mask), student)
    p, weight = teacher.softmax(-1), 1 / mask.sum((1, 2))[images] / 3
    for module in ("dinov2.iBOTPatchLoss", "dinov3.iBOTPatchLoss"):
        meta = integration(module)(16).forward_masked(student, p, mask.flatten(1))
        same(meta, (cross_entropies(student[None], p[None])[0, 0] * weight).sum(), student)


@row("Sinkhorn-Knopp assignment")
def sinkhorn() -> None:
    logits = torch.randn(12, 16)
    q = (logits.double() / 0.07).exp().t()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / 16
        q = q / q.sum(0) / 12
    for ours in (S.SinkhornKnopp(), integration("dinov3.SinkhornKnoppTeacher")()):
        torch.testing.assert_close(ours(logits, 0.07).double(), 12 * q.t(), rtol=1e-4, atol=1e-7)


@row("KoLeo")
def koleo() -> None:
    for x in (raw(24, 8), raw(1, 8)):
        same(S.KoLeoLoss()(x), peer("lightly.loss.KoLeoLoss")()(x), x)
        same(integration("dinov2.KoLeoLoss")()(x), peer("lightly.loss.KoLeoLoss")()(x), x)


@row("VICReg, Barlow Twins")
def vicreg() -> None:
    a, b = leaves = raw(24, 8), raw(24, 8)
    for name in ("VICRegLoss", "BarlowTwinsLoss"):
        same(getattr(S, name)()(*leaves), peer(f"lightly.loss.{name}")()(*leaves), *leaves)
    expected = 25 * F.mse_loss(a, b)
    for z in leaves:
        covariance = z.t().cov()
        expected = expected + 25 * F.relu(1 - (z.var(0) + 1e-4).sqrt()).mean()
        expected = expected + (covariance - covariance.diag().diag()).square().sum() / 8
    same(integration("solo.vicreg_loss_func")(*leaves), expected, *leaves)
    correlation = F.batch_norm(a, None, None, training=True).t() @ F.batch_norm(b, None, None, training=True) / 24
    weight = torch.full((8, 8), 5e-3).fill_diagonal_(1)
    expected = 0.025 * (weight * (correlation - torch.eye(8)).square()).sum()
    same(integration("solo.barlow_loss_func")(*leaves), expected, *leaves)


@row("momentum update")
def momentum() -> None:
    start, *steps = (nn.Linear(4, 3) for _ in range(4))

    def after(update: Callable[[nn.Module], object], average: nn.Module) -> list[Tensor]:
        for model in steps:
            update(model)
        return [parameter.detach() for parameter in average.parameters()]

    def moved(function: Callable[..., object], *arguments: float) -> list[Tensor]:
        average = copy.deepcopy(start)
        return after(lambda model: function(model, average, *arguments), average)

    emas = [integration("timm.ModelEmaV3")(start), peer("timm.utils.ModelEmaV3")(start), S.ModelEma(start, 0.996)]
    ours, theirs, own = (after(ema.update, ema.module) for ema in emas)
    assert_same(ours, theirs)
    update_momentum = peer("lightly.models.utils.update_momentum")
    assert_same(moved(integration("lightly.update_momentum"), 0.9), moved(update_momentum, 0.9))
    assert_same(own, moved(update_momentum, 0.996))
    assert_same(moved(integration("solo.MomentumUpdater")().update), own)
    multi_avg_fns = ema_multi_avg_fn(0.9), torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    averages = [torch.optim.swa_utils.AveragedModel(start, multi_avg_fn=function) for function in multi_avg_fns]
    assert_same(*(after(average.update_parameters, average) for average in averages))
