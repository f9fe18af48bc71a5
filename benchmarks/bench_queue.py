"""A step of the queue of keys: ours, lightly's memory bank, MoCo's; fp32, in one run.

The floor is to read B rows and to write them. lightly's copies the whole bank first; MoCo's stores features by rows, so
that a key is spread over as many cache lines as it has features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from machine import copy_gbytes_per_s
from memory import peak_mb
from torch import Tensor

from ssl_kernels import KeyQueue

Step = Callable[[Tensor], Any]


class MoCoQueue:
    """The buffers and the update of MoCo's model."""

    def __init__(self, queue: Tensor) -> None:
        self.queue = queue.t().contiguous()  # [D, K]
        self.pointer = torch.zeros(1, dtype=torch.long)

    def __call__(self, keys: Tensor) -> None:
        batch, pointer = keys.shape[0], int(self.pointer)
        self.queue[:, pointer : pointer + batch] = keys.t()
        self.pointer[0] = (pointer + batch) % self.queue.shape[1]


def provider(name: str, start: Tensor) -> tuple[Step, Callable[[], Tensor]]:
    """The step, and what reads its keys as [K, D]."""
    if name == "lightly":
        bank = pytest.importorskip("lightly.models.modules.memory_bank").MemoryBankModule(tuple(start.shape))
        bank.bank.copy_(start)
        return lambda keys: bank(keys, update=True), lambda: bank.bank
    if name == "moco":
        moco = MoCoQueue(start)
        return moco, lambda: moco.queue.t()
    queue = KeyQueue(*start.shape)
    queue.keys.copy_(start)
    return queue.enqueue, lambda: queue.keys


def verify(name: str, size: int, width: int, batch: int) -> None:
    """All agree where the batch divides the queue."""
    start = torch.randn(size, width)
    (step, keys), (our_step, our_keys) = provider(name, start), provider("ours", start)
    for _ in range(size // batch + 1):
        batch_of_keys = torch.randn(batch, width)
        step(batch_of_keys)
        our_step(batch_of_keys)
    assert torch.equal(keys(), our_keys())


SHAPES = [(256, 65_536, 128), (32, 65_536, 128), (4096, 65_536, 256)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    quick = metafunc.config.getoption("--quick")
    metafunc.parametrize(("batch", "size", "width"), [(16, 64, 16)] if quick else SHAPES)


@pytest.mark.parametrize("name", ["ours", "lightly", "moco"])
def bench_queue(benchmark: Any, name: str, batch: int, size: int, width: int) -> None:
    verify(name, size, width, batch)
    step, _ = provider(name, torch.randn(size, width))
    keys = torch.randn(batch, width)
    benchmark.extra_info.update(
        op="queue", provider=name, mode="enqueue", shape=f"B={batch} K={size} D={width}", width=width,
        gbytes=2 * batch * width * 4 / 1e9, copy_gbytes_per_s=copy_gbytes_per_s(),
    )  # fmt: skip
    benchmark.pedantic(step, args=(keys,), rounds=50, warmup_rounds=5)
    benchmark.extra_info["peak_mb"] = peak_mb(lambda: step(keys))
