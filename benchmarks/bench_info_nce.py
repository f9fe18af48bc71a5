"""InfoNCE over a queue: ours, MoCo's code, the same without the copy of the queue, and that compiled; fp32, in one run.

Two products of 2 B K D FLOP for loss and gradient of the queries, one for the loss alone; the others take as many, and
several passes over B x K in memory.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import MODES, Loss, measure, verify
from torch import Tensor

from ssl_kernels import InfoNCELoss

TEMPERATURE = 0.07


@functools.cache
def keys(size: int, width: int) -> Tensor:
    return F.normalize(torch.randn(size, width, generator=torch.Generator().manual_seed(1)), dim=-1)


@functools.cache
def keys_by_feature(size: int, width: int) -> Tensor:
    """[D, K], as MoCo stores its queue."""
    return keys(size, width).t().contiguous()


def eager(query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    """The forward pass of MoCo's model, from features to loss, for a queue [D, K]."""
    positives = torch.einsum("nc,nc->n", [query, positive]).unsqueeze(-1)
    negatives = torch.einsum("nc,ck->nk", [query, queue])
    logits = torch.cat([positives, negatives], dim=1) / TEMPERATURE
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


compiled = torch.compile(eager)


def provider(name: str, size: int, width: int) -> Loss:
    by_feature = keys_by_feature(size, width)
    return {
        "ours": lambda query, positive: InfoNCELoss(TEMPERATURE)(query, positive, keys(size, width)),
        "moco": lambda query, positive: eager(query, positive, by_feature.clone().detach()),
        "eager": lambda query, positive: eager(query, positive, by_feature),
        "compile": lambda query, positive: compiled(query, positive, by_feature),
    }[name]


SHAPES = [(256, 65_536, 128), (32, 65_536, 128), (256, 4096, 128), (1024, 65_536, 128), (512, 65_536, 256)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize(("batch", "size", "width"), [(16, 256, 16)] if quick else SHAPES)


def inputs(batch: int, width: int) -> list[Tensor]:
    """Queries, and the keys of their positives without gradient."""
    generator = torch.Generator().manual_seed(0)
    query = F.normalize(torch.randn(batch, width, generator=generator), dim=-1)
    positive = F.normalize(query + 0.1 * torch.randn(batch, width, generator=generator), dim=-1)
    return [query.requires_grad_(), positive.detach()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["ours", "moco", "eager", "compile"])
def bench_info_nce(benchmark: Any, name: str, batch: int, size: int, width: int, mode: str) -> None:
    loss = provider(name, size, width)
    if name != "eager":
        verify(loss, provider("eager", size, width), inputs(batch, width), mode)
    units = 1 if mode == "forward" else 2
    measure(
        benchmark, loss, inputs(batch, width), op="info_nce", provider=name, mode=mode,
        shape=f"B={batch} K={size} D={width}", width=width, gflop=units * 2 * batch * size * width / 1e9,
        rounds=8 if batch < 1024 else 3,
    )  # fmt: skip
