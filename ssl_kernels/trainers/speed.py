"""What makes training faster or smaller without another result: compiled blocks, activations computed twice."""

from __future__ import annotations

from torch import nn

from ssl_kernels.trainers import sharding
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.loop_config import LoopConfig


def apply(config: LoopConfig, module: nn.Module, *trained: nn.Module) -> None:
    """What a configuration asks for: blocks of the whole `module` are compiled, and activations of the networks that
    are `trained` are computed twice."""
    if config.grad_checkpointing:
        for net in trained:
            checkpoint_gradients(net)
    if config.compile:
        compile_blocks(module)


def compile_blocks(module: nn.Module) -> None:
    """Compile the blocks of networks, which are alike, and so are compiled once and not for each layer."""
    blocks = sharding.blocks(module)
    inner = {part for block in blocks for part in block.modules() if part is not block}
    for block in blocks:
        if block not in inner:
            block.compile()


def checkpoint_gradients(net: nn.Module) -> None:
    """Let a network keep no activations, but compute them again when gradients need them."""
    switch = getattr(net, "set_grad_checkpointing", None)
    if switch is None:
        raise UserError(
            f"--grad-checkpointing: {type(net).__name__} cannot compute activations again; name a model of timm in"
            " --image-model"
        )
    switch(True)
