"""The queue of keys that momentum contrast draws its negatives from."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group
from ssl_kernels.distributed import gather_rows as gather_rows
from ssl_kernels.ops._checks import FEATURE_DTYPES
from ssl_kernels.ops.unit_rows import unit_rows


class KeyQueue(nn.Module):
    """The last ``size`` keys, as a ring buffer that is written in place.

    The rows of :attr:`keys` start as random unit vectors, as in MoCo, so that the loss has all its negatives from the
    first step on. Rows and pointer are buffers: checkpoints hold them and training resumes exactly.

    Enqueue strictly after the loss. Keys that are in the queue before it are among their own negatives, and even a
    perfect match then scores ln 2. The losses of this library keep no reference to the queue: enqueueing between a
    forward pass and its backward is safe.

    Args:
        size: number of keys.
        dim: features of a key.
        dtype: in which keys are kept: float32, bfloat16, float16 or float64.
        normalize: divide each key by its norm on the way in.
        gather: enqueue the keys of all ``torch.distributed`` processes, in the order of their ranks, on each of them.
            Processes may bring different numbers of keys. For equal queues start from equal keys: wrap the module in
            ``DistributedDataParallel``, which broadcasts buffers, or give each process a generator of the same seed.
            Without ``gather`` each process has a queue of its own only under ``broadcast_buffers=False``; else
            ``DistributedDataParallel`` overwrites it with that of rank 0 in every forward pass.
        group: those whose keys are gathered, a ``ProcessGroup`` or a ``DeviceMesh``; None is all processes.
        generator: of the random keys to start from.

    Source: He et al., Momentum Contrast, 2019, arXiv:1911.05722.

    >>> import torch
    >>> from ssl_kernels import InfoNCELoss, KeyQueue
    >>> queue, criterion = KeyQueue(size=512, dim=16, normalize=True), InfoNCELoss(temperature=0.07)
    >>> query, key = torch.nn.functional.normalize(torch.randn(2, 32, 16), dim=-1)
    >>> loss = criterion(query, key, queue.keys)
    >>> queue.enqueue(key)
    >>> queue.pointer.item()
    32
    """

    keys: Tensor  # [size, dim]
    pointer: Tensor  # 0-dim int64: the row that the next key goes to

    def __init__(
        self,
        size: int = 65536,
        dim: int = 128,
        *,
        dtype: torch.dtype = torch.float32,
        normalize: bool = False,
        gather: bool = False,
        group: Group = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if dtype not in FEATURE_DTYPES:
            raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
        self.normalize = normalize
        self.gather = gather
        self.group = group
        self.register_buffer("keys", random_keys(size, dim, generator).to(dtype))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def enqueue(self, keys: Tensor) -> None:
        """Write ``keys`` [B, dim], any B, over the oldest ones."""
        keys = gather_rows(keys, self.group) if self.gather else keys
        K.enqueue_(self.keys, self.pointer, keys, normalize=self.normalize)

    def extra_repr(self) -> str:
        size, dim = self.keys.shape
        return f"size={size}, dim={dim}, dtype={self.keys.dtype}, normalize={self.normalize}, gather={self.gather}"


def keep_missing_bank(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Before a checkpoint is loaded: lightly's hold no memory bank, and then the one that is there stays."""
    names = ("bank", "bank_ptr", "memory_bank.keys", "memory_bank.pointer")
    bank = {prefix + name: buffer for name, buffer in module.named_buffers() if name in names}
    if not bank.keys() & state.keys():
        state.update(bank)


def random_keys(size: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """[size, dim] random unit vectors."""
    return unit_rows(torch.randn(size, dim, generator=generator))
