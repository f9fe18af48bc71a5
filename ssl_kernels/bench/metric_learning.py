"""NT-Xent and SupCon with labels, as pytorch-metric-learning has them. A unit is 2 M^2 D FLOP for M rows.

Similarities are symmetric, so that the loss alone takes half a unit and gradients one more; what stores no matrix forms
it once more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels.bench.problem import Floor, Loss, NotComparableError, Op, Problem, gflop, is_ours, peer, unit_rows

TEMPERATURE = 0.1
MOST_TRIPLES = 2**25  # pytorch-metric-learning's NT-Xent compares every positive with every negative pair, 4 bytes each


def formula(kind: str, labels: Tensor) -> Loss:
    def loss(z: Tensor) -> Tensor:
        z = F.normalize(z, dim=1)
        logits, same = z @ z.t() / TEMPERATURE, labels[:, None] == labels
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        positive = same & ~itself
        if kind == "NTXentLoss":
            lse = logits.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
            return (F.softplus(lse - logits) * positive).sum() / positive.sum()
        log_p = logits.masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0)
        return -((log_p * positive).sum(1) / positive.sum(1)).mean()

    return loss


def theirs(kind: str, labels: Tensor) -> Loss:
    counts = labels.bincount()
    positives = int((counts * (counts - 1)).sum())
    triples = positives * (len(labels) ** 2 - int((counts**2).sum())) if kind == "NTXentLoss" else 0
    if labels.device.type == "cpu" and triples > MOST_TRIPLES:  # a GPU says itself what it has no memory for
        raise NotComparableError("too large")
    loss = peer(f"pytorch_metric_learning.losses:{kind}", TEMPERATURE)()
    return lambda z: loss(z, labels)


def ours(kind: str, labels: Tensor) -> Loss:
    loss = peer(f"ssl_kernels.integrations.pytorch_metric_learning:{kind}", TEMPERATURE)()
    return lambda z: loss(z, labels)


def problem(
    rows: int, width: int, classes: int, dtype: torch.dtype, device: torch.device, *, kind: str = "NTXentLoss"
) -> Problem:
    labels = torch.arange(rows, device=device) % max(1, min(classes, rows // 2))

    def floor(provider: str, backward: bool) -> Floor:
        units = (2 if is_ours(provider) else 1.5) if backward else 0.5
        return Floor(units * gflop(rows, rows, width), width)

    providers: dict[str, Callable[[], Loss]] = {
        "ours": functools.partial(ours, kind, labels),
        "pytorch-metric-learning": functools.partial(theirs, kind, labels),
    }
    return Problem([unit_rows(rows, width, dtype, device).requires_grad_()], formula(kind, labels), providers, floor)


METRIC_NT_XENT = Op(
    "metric_learning",
    "NT-Xent and SupCon with labels",
    problem,
    ("ours", "pytorch-metric-learning", "eager", "compile"),
    [(256, 128, 128), (1200, 32, 10), (4096, 128, 1024)],
    tiny=[(24, 16, 6)],
    gpu_shapes=[(1024, 128, 512), (2048, 128, 1024)],
    describe="M={} D={}, {} labels".format,
    suffix=", NT-Xent",
    label="nt_xent",
    quadratic=True,
)
METRIC_SUP_CON = replace(
    METRIC_NT_XENT,
    problem=functools.partial(problem, kind="SupConLoss"),
    shapes=METRIC_NT_XENT.shapes[1:],
    gpu_shapes=[(4096, 128, 1024), (16_384, 512, 4096)],
    modes=METRIC_NT_XENT.modes[1:],
    suffix=", SupCon",
    label="sup_con",
)
