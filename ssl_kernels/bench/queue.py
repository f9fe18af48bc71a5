"""A step of the queue of keys: beside lightly's memory bank and MoCo's.

The floor is to read B rows and to write them. lightly's copies the whole bank first; MoCo's stores features by rows, so
that a key is spread over as many cache lines as it has features.
"""

from __future__ import annotations

import pkgutil

import torch
from torch import Tensor

from ssl_kernels import KeyQueue
from ssl_kernels.bench.problem import Floor, Loss, Op, Problem, unit_rows


def ours(start: Tensor) -> Loss:
    queue = KeyQueue(*start.shape, dtype=start.dtype).to(start.device)
    queue.keys.copy_(start)

    def step(keys: Tensor) -> Tensor:
        queue.enqueue(keys)
        return queue.keys

    return step


def moco(start: Tensor) -> Loss:
    """The buffers and the update of MoCo's model: features by rows, the pointer read by the host."""
    queue, pointer = start.t().contiguous(), torch.zeros(1, dtype=torch.long, device=start.device)

    def step(keys: Tensor) -> Tensor:
        batch, at = len(keys), int(pointer)
        queue[:, at : at + batch] = keys.t()
        pointer[0] = (at + batch) % queue.shape[1]
        return queue.t()

    return step


def lightly(start: Tensor) -> Loss:
    bank = pkgutil.resolve_name("lightly.models.modules.memory_bank:MemoryBankModule")(tuple(start.shape))
    bank = bank.to(start.device, start.dtype)
    bank.bank.copy_(start)

    def step(keys: Tensor) -> Tensor:
        bank(keys, update=True)
        return bank.bank

    return step


def problem(batch: int, size: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    start, keys = unit_rows(size, width, dtype, device), unit_rows(batch, width, dtype, device)

    def formula(keys: Tensor) -> Tensor:
        return torch.cat([keys, keys, start[2 * batch :].to(keys.dtype)])

    floor = Floor(gbytes=2 * keys.nbytes / 1e9)
    providers = {"ours": lambda: ours(start), "lightly": lambda: lightly(start), "moco": lambda: moco(start)}
    return Problem([keys], formula, providers, lambda provider, backward: floor)


QUEUE = Op(
    "queue",
    "Queue of keys",
    problem,
    ("ours", "lightly", "moco"),
    [(256, 65_536, 128), (32, 65_536, 128), (4096, 65_536, 256)],
    tiny=[(16, 64, 16)],
    gpu_shapes=[(256, 65_536, 128), (4096, 65_536, 256)],
    describe="B={} K={} D={}".format,
    modes=("update",),
    tolerance=0.0,
)
