"""InfoNCE over a queue: beside MoCo's code, and the same without the copy of the queue.

Two products of 2 B K D FLOP for loss and gradient of the queries, one for the loss alone; the others take as many, and
several passes over B x K in memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssl_kernels import InfoNCELoss
from ssl_kernels.bench.problem import Floor, Op, Problem, gflop, pairs, unit_rows

TEMPERATURE = 0.07


def eager(query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    """The forward pass of MoCo's model, from features to loss, for a queue [D, K]."""
    positives = torch.einsum("nc,nc->n", [query, positive]).unsqueeze(-1)
    negatives = torch.einsum("nc,ck->nk", [query, queue])
    logits = torch.cat([positives, negatives], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long, device=query.device))


def moco(query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    return eager(query, positive, queue.clone().detach())


def problem(batch: int, size: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    query, positive = pairs(batch, width, dtype, device)
    keys = unit_rows(size, width, dtype, device)
    by_feature = keys.t().contiguous()  # [D, K], as MoCo stores its queue
    loss = InfoNCELoss(TEMPERATURE)

    def floor(provider: str, backward: bool) -> Floor:
        return Floor((2 if backward else 1) * gflop(batch, size, width), width)

    providers = {"ours": lambda: lambda query, positive, _: loss(query, positive, keys), "moco": lambda: moco}
    return Problem([query, positive.detach(), by_feature], eager, providers, floor)


INFO_NCE = Op(
    "info_nce",
    "InfoNCE over a queue",
    problem,
    ("ours", "moco", "eager", "compile"),
    [(256, 65_536, 128), (32, 65_536, 128), (1024, 65_536, 128)],
    tiny=[(16, 256, 16)],
    gpu_shapes=[(4096, 65_536, 128), (4096, 65_536, 256)],
    describe="B={} K={} D={}".format,
)
