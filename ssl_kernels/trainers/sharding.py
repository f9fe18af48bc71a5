"""FSDP2: weights, gradients and optimizer states lie in shards, one to a process, and weights are gathered for use.

Checkpoints hold whole tensors, so that a run continues under any strategy and in any number of processes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ssl_kernels.ema import laid_out_as
from ssl_kernels.ops.ema import is_sharded


def shard(module: nn.Module, mesh: Any) -> nn.Module:
    """A module whose weights are gathered a block at a time in its `forward`, and with it those outside of blocks."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for part in (*blocks(module), module):
        fully_shard(part, mesh=mesh["data_parallel"])
    if hasattr(module, "before_training"):  # which calls nets as well
        register_fsdp_forward_method(module, "before_training")
    return module


def blocks(module: nn.Module) -> list[nn.Module]:
    """Of transformers and convolutional nets: what is called in a sequence and has parts. The inner ones are first."""
    sequences = [part for part in module.modules() if isinstance(part, nn.Sequential | nn.ModuleList)]
    members = dict.fromkeys(member for sequence in sequences for member in sequence)
    return [
        member for member in reversed(members)
        if list(member.children()) and type(member).forward is not nn.Module.forward
    ]  # fmt: skip


def whole(tree: Any, keep: bool = True) -> Any:
    """Tensors, with what lies in shards put together on the CPU, or dropped at once; all processes take part."""

    def gathered(tensor: Any) -> Any:
        if not is_sharded(tensor):
            return tensor
        full = tensor.full_tensor()
        return full.cpu() if keep else None

    return tree_map_only(Tensor, gathered, tree)


def weights_as(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A `state_dict` of whole tensors, in the shards of a module."""
    ours = module.state_dict()
    return {name: laid_out_as(ours[name], value) if name in ours else value for name, value in state.items()}


def optimizer_state_as(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The same of an optimizer, whose averages of gradients lie as the parameters do."""
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    laid_out = {
        index: {
            name: laid_out_as(parameters[index], value) if value.shape == parameters[index].shape else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": laid_out}
