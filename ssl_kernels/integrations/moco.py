"""The queue of a MoCo checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssl_kernels.functional import enqueue_
from ssl_kernels.queue import gather_rows, random_keys


class MoCoQueue(nn.Module):
    """:class:`ssl_kernels.KeyQueue` under the names that MoCo gives its buffers: ``queue`` [dim, K] and ``queue_ptr``
    [1].

    A model that inherits from it, or contains it, loads MoCo's checkpoints, and MoCo loads the model's. Each key is
    contiguous in memory; ``queue`` is the transposed view of :attr:`keys`.

    Args:
        dim: features of a key.
        K: number of keys.
        normalize, gather: as in :class:`ssl_kernels.KeyQueue`; MoCo gathers the keys of all processes.

    >>> import torch
    >>> from ssl_kernels.integrations.moco import MoCoQueue
    >>> checkpoint = {"module.queue": torch.randn(8, 32), "module.queue_ptr": torch.tensor([16])}
    >>> queue = MoCoQueue(dim=8, K=32)
    >>> queue.load_state_dict({name.removeprefix("module."): value for name, value in checkpoint.items()})
    <All keys matched successfully>
    >>> queue.enqueue(torch.randn(20, 8))
    >>> queue.queue_ptr
    tensor([4])
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int = 128, K: int = 65536, *, normalize: bool = False, gather: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.gather = gather
        self.register_buffer("queue", random_keys(K, dim).t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    @property
    def keys(self) -> Tensor:
        """[K, dim], for the losses of this library."""
        return self.queue.t()

    def enqueue(self, keys: Tensor) -> None:
        """Write ``keys`` [B, dim], with any B, over the oldest ones. Call it after the loss."""
        if self.queue.stride(0) != 1:  # the memory of a checkpoint, after load_state_dict(assign=True)
            self.queue = self.queue.t().contiguous().t()
        enqueue_(self.keys, self.queue_ptr, gather_rows(keys) if self.gather else keys, normalize=self.normalize)
