"""One device, or several processes with one each: what Lightning Fabric is told, and every seed."""

from __future__ import annotations

import inspect
import os
import random
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from ssl_kernels.trainers import processes, sharding
from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.loop_config import LoopConfig
from ssl_kernels.trainers.ranges import Range, require

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def import_fabric() -> None:
    """Import Lightning Fabric without torchmetrics, which it would import for its version: seconds of each start.

    Of Fabric, only the detection of spikes needs it; whoever wants that imports torchmetrics first.
    """
    if "lightning_fabric" in sys.modules or "torchmetrics" in sys.modules:
        return
    sys.modules["torchmetrics"] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        import lightning_fabric  # noqa: F401
    finally:
        del sys.modules["torchmetrics"]


def make_fabric(config: LoopConfig) -> Fabric:
    """One device, or several processes with one each, with the asked precision, and every seed set.

    All processes have the same seeds, and draw alike. The precision `auto` is replaced by what it means here, so that
    the run keeps it wherever it goes on.
    """
    import_fabric()
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # written twice
    torch.backends.cudnn.benchmark = False
    # DDP's, about 1x1 convolutions of images in channels_last: in a few small weights it does not matter.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    config.precision = precision = resolved_precision(config)
    if precision == "16-mixed" and (config.accelerator == "cpu" or not torch.accelerator.is_available()):
        raise UserError("--precision: 16-mixed needs a GPU; use bf16-mixed or 32-true on a CPU")
    devices, num_nodes = processes.counts(config.devices, config.num_nodes)
    world = devices * num_nodes
    require(config, Range(f"a multiple of the {world} processes", lambda size: size % world == 0), "batch_size")
    # Buffers are alike without. The name is that since torch 2.14.
    named = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"
    ddp: dict[str, Any] = {sync: False, "find_unused_parameters": config.leaves_parameters_unused}
    strategy: Any = DDPStrategy(**ddp) if world > 1 or config.strategy == "ddp" else "auto"
    if config.strategy == "fsdp":
        strategy = ModelParallelStrategy(sharding.shard, data_parallel_size=world, tensor_parallel_size=1)
    try:
        fabric = Fabric(
            accelerator=config.accelerator, devices=devices, num_nodes=num_nodes, precision=precision,
            strategy=strategy,
        )  # fmt: skip
        fabric.launch()
    except Exception as error:  # Fabric raises its own kinds for a missing device
        several = f" --devices {devices} --num-nodes {num_nodes}" if world > 1 else ""
        raise UserError(
            f"--accelerator {config.accelerator} --precision {config.precision}{several}: {error}"
        ) from None
    random.seed(config.seed)
    np.random.seed(config.seed % 2**32)  # noqa: NPY002 (for whoever uses the global generator)
    torch.manual_seed(config.seed)
    return fabric


def resolved_precision(config: LoopConfig) -> Any:
    """What --precision auto means on this machine: bf16-mixed on a GPU that computes in bfloat16, else 32-true."""
    if config.precision != "auto":
        return config.precision
    on_gpu = config.accelerator in ("auto", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
