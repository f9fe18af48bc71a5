"""open_clip's own trainer on a CPU, alone or as one of the ranks of torchrun: the losses of each step, and the weights.

`python open_clip_runs.py FILE BATCH [NAME ...]` writes what came of the runs named, such as "clip ours", to a file. The
batch is that of all ranks.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import open_clip
import torch
import torch.distributed as dist
from open_clip_train import main as trainer
from torch.nn.parallel import DistributedDataParallel

from ssl_kernels.integrations.open_clip import replaced_losses
from ssl_kernels.trainers.log import peak_memory_mb

STEPS = 20
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 8, "vocab_size": 512, "width": 64, "heads": 2, "layers": 1},
}


class Batches:
    """Each rank has its part of the same batches."""

    def __init__(self, batch: int, rank: int, world: int) -> None:
        self.batch, self.rows = batch, slice(rank * batch // world, (rank + 1) * batch // world)
        self.num_batches, self.num_samples = STEPS, STEPS * batch

    def __iter__(self) -> Any:
        for step in range(STEPS):
            generator = torch.Generator().manual_seed(step)
            images = torch.randn(self.batch, 3, 32, 32, generator=generator)
            texts = torch.randint(512, (self.batch, 8), generator=generator)
            yield images[self.rows].clone(), texts[self.rows].clone()


def run(name: str, batch: int, folder: Path) -> dict[str, Any]:
    """Everything is open_clip's, but for the batches, which its samplers would deal out otherwise to other ranks."""
    kind, whose = name.split()
    losses: list[float] = []
    weights: dict[str, Any] = {}

    def data(args: Any, *_: Any, **__: Any) -> dict[str, Any]:
        batches = Batches(batch, args.rank, args.world_size)
        return {"train": SimpleNamespace(dataloader=batches, set_epoch=lambda epoch: None)}

    def loss(args: Any) -> torch.nn.Module:
        module = open_clip.create_loss(args)
        module.register_forward_hook(lambda _, __, found: losses.append(_mean(found["contrastive_loss"])))
        return module

    epoch = trainer.train_one_epoch

    def keep(model: torch.nn.Module, *arguments: Any, **options: Any) -> None:
        epoch(model, *arguments, **options)
        state = getattr(model, "module", model).state_dict()
        # But for the bias of keys, which an attention does not see: its gradient is rounding, and Adam scales that up.
        weights.update({n: t.double().norm().item() for n, t in state.items() if not n.endswith("in_proj_bias")})

    with (
        patch.object(trainer, "get_data", data),
        patch.object(trainer, "create_loss", loss),
        patch.object(trainer, "train_one_epoch", keep),
        patch("torch.nn.parallel.DistributedDataParallel", _without_device_ids),  # a CPU takes none
        replaced_losses() if whose == "ours" else nullcontext(),
    ):
        trainer.main([
            "--model", "tiny", "--device", "cpu", "--dataset-type", "synthetic", "--epochs", "1", "--lr", "1e-3",
            "--warmup", "2", "--precision", "fp32", "--workers", "0", "--batch-size", "1", "--logs", str(folder),
            "--name", name.replace(" ", "-"), "--save-frequency", "0", "--gather-with-grad",
            *(["--siglip"] if kind == "siglip" else []),
        ])  # fmt: skip
    return {"losses": losses, "weights": weights, "peak_mb": peak_memory_mb(torch.device("cpu"))}


def _without_device_ids(module: torch.nn.Module, device_ids: Any = None, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(module, **options)


def _mean(loss: torch.Tensor) -> float:
    """Over the ranks, of which each of open_clip's SigLIP has its share."""
    mean = loss.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def main(file: str, batch: str, *names: str) -> None:
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    (folder / "tiny.json").write_text(json.dumps(MODEL))
    open_clip.add_model_config(folder / "tiny.json")
    found = {}
    for name in names:
        found[name] = run(name, int(batch), folder)
        if dist.is_initialized():
            dist.barrier()
            rank = dist.get_rank()
            dist.destroy_process_group()
        else:
            rank = 0
    if rank == 0:
        Path(file).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
