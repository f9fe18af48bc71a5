"""What losses ask about the processes of ``torch.distributed``."""

from __future__ import annotations

import torch.distributed as dist


def several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refuse_several_processes(what: str) -> None:
    """Where a peer gathers rows and a loss does not yet: another value must not pass for the peer's."""
    if several_processes():
        raise NotImplementedError(f"{what} in several processes is not implemented in this version")


def check_gather_distributed(gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise ValueError("gather_distributed: expected False, for this build of torch has no torch.distributed")
