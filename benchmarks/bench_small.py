"""Small batches, where a loss costs what its plumbing costs: ours and the peers', both ways, on one thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Loss, step, verify
from torch import Tensor

import ssl_kernels as S

KEYS = 4096  # of the queue that InfoNCE meets


def moco(query: Tensor, positive: Tensor, queue: Tensor) -> Tensor:
    """As MoCo's code computes it."""
    logits = torch.cat([(query * positive).sum(1, keepdim=True), query @ queue.t().clone()], 1) / 0.2
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


def moco_v3(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
    """As MoCo v3's code computes it."""

    def one_direction(query: Tensor, key: Tensor) -> Tensor:
        logits = torch.einsum("nc,mc->nm", F.normalize(query, dim=1), F.normalize(key, dim=1)) / 0.2
        return F.cross_entropy(logits, torch.arange(len(query))) * (2 * 0.2)

    return one_direction(q1, k2) + one_direction(q2, k1)


def peer_of(name: str) -> Callable[[], Loss]:
    package = "open_clip.loss" if name in ("ClipLoss", "SigLipLoss") else "lightly.loss"
    return lambda: getattr(pytest.importorskip(package), name)()


# Name -> what of unit rows x, y [B, D], a scale and a bias it takes, and the peer's.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]], Callable[[], Loss]]] = {
    "ClipLoss": (lambda x, y, t, b: [x, y, t], peer_of("ClipLoss")),
    "SigLipLoss": (lambda x, y, t, b: [x, y, t, b], peer_of("SigLipLoss")),
    "NTXentLoss": (lambda x, y, t, b: [x, y], peer_of("NTXentLoss")),
    "InfoNCELoss": (
        lambda x, y, t, b: [x, y.detach(), F.normalize(torch.randn(KEYS, x.shape[1]), dim=1)],
        lambda: moco,
    ),
    "MoCoV3Loss": (lambda x, y, t, b: [x, y, x.detach().roll(1, 0), y.detach().roll(1, 0)], lambda: moco_v3),
    "KoLeoLoss": (lambda x, y, t, b: [x], peer_of("KoLeoLoss")),
    "VICRegLoss": (lambda x, y, t, b: [x, y], peer_of("VICRegLoss")),
    "BarlowTwinsLoss": (lambda x, y, t, b: [x, y], peer_of("BarlowTwinsLoss")),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("batch", [16] if metafunc.config.getoption("--quick") else [32, 128, 256])


@pytest.mark.parametrize("provider", ["ours", "peer"])
@pytest.mark.parametrize("name", LOSSES)
def bench_small(benchmark: Any, name: str, provider: str, batch: int) -> None:
    choose, peer = LOSSES[name]
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(batch, 128), dim=1).requires_grad_() for _ in range(2))
    leaves = choose(x, y, torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True))
    ours = getattr(S, name)(*([0.2] if name in ("InfoNCELoss", "MoCoV3Loss") else []))
    mode, threads = "forward+backward", torch.get_num_threads()
    verify(ours, peer(), leaves, mode, tolerance=1e-3)
    loss = ours if provider == "ours" else peer()
    benchmark.extra_info.update(op="small", provider=provider, mode=mode, shape=f"{name} B={batch} D=128")
    try:
        torch.set_num_threads(1)
        benchmark.pedantic(step, args=(loss, leaves, mode), rounds=200, warmup_rounds=3)
    finally:
        torch.set_num_threads(threads)
