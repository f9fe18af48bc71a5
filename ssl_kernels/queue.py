"""The queue of keys from which momentum contrast takes its negatives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ssl_kernels.functional as K
from ssl_kernels.distributed import Group
from ssl_kernels.distributed import gather_rows as gather_rows
from ssl_kernels.ops._checks import FEATURE_DTYPES
from ssl_kernels.ops.unit_rows import unit_rows


class KeyQueue(nn.Module):
    """The last ``size`` keys, in a ring buffer that is written in place.

    The rows of :attr:`keys` start as random unit vectors, as in MoCo, so the loss has all its negatives from the first
    step on. Rows and pointer are buffers: checkpoints contain them, and training resumes exactly.

    Enqueue after the loss. Keys that are in the queue before it are among their own negatives, and even a perfect match
    then has the loss ln 2. The losses of this library keep no reference to the queue, so you may enqueue between a
    forward pass and its backward pass.

    Args:
        size: number of keys.
        dim: features of a key.
        dtype: the dtype of the stored keys: float32, bfloat16, float16 or float64.
        normalize: divide each key by its norm when it is enqueued.
        gather: enqueue the keys of all ``torch.distributed`` processes on each of them, in the order of their ranks.
            Processes may have different numbers of keys. The queues stay equal if they start equal: wrap the module in
            ``DistributedDataParallel``, which broadcasts buffers, or give each process a generator with the same seed.
            Without ``gather``, each process has its own queue only if ``DistributedDataParallel`` has
            ``broadcast_buffers=False``; otherwise every forward pass overwrites it with the queue of rank 0.
        group: the processes whose keys are gathered, a ``ProcessGroup`` or a ``DeviceMesh``; None means all.
        generator: the random generator of the first keys.

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
