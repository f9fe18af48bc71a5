"""The settings that the command lines of all trainers have in common."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.ranges import NOT_NEGATIVE, SHARE, Range, at_least, require


@dataclass
class LoopConfig:
    """What every trainer's command line has in common."""

    output_dir: Path = Path("runs/demo")
    """Folder for logs, checkpoints and pictures."""
    resume: Path | None = None
    """Continue the run in this folder (or from this checkpoint) exactly where it stopped; its settings are reused. The
    number of processes may be another, except on WebDataset shards, which are dealt among them."""
    overwrite: bool = False
    """Start over in a folder that already holds a run."""
    seed: int = 0
    """Seed of the weights, the data order and the augmentation."""
    seeds: tuple[int, ...] = ()
    """Train once with each of these seeds, in the subfolders seed-0, seed-1 and so on of --output-dir, and print the
    figures of all in one table. --resume continues a series that was stopped."""
    epochs: int = 40
    """Passes over the training pairs."""
    batch_size: int = 256
    """Pairs per forward pass, over all processes. Each is contrasted with the other pairs of its batch."""
    accumulate: int = 1
    """Number of batches whose gradients are averaged per optimizer step. This saves memory in the networks. A loss that
    compares the images of a batch still sees one batch at a time, so 4 x 256 is not 1,024."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly; then it falls along a cosine to zero."""
    weight_decay: float = 0.05
    """AdamW's weight decay; it applies to matrices and filters only."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    clip: float = 5.0
    """Largest norm of the gradient; 0 turns clipping off."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    """Fabric's precision. It is the precision of the arithmetic, and with -true also of the weights."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on."""
    devices: int = 1
    """Number of processes on each machine, each with its own device; batches are split among them. Leave it out if
    torchrun runs the command: `torchrun --nproc-per-node 8 -m ssl_kernels.cli train ...`."""
    num_nodes: int = 1
    """Number of machines. Start the command on each of them, or torchrun with --nnodes. They share --output-dir."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """With `ddp`, each process has all weights, and gradients are averaged; `auto` means this if there are several
    processes. With `fsdp`, each has a share of weights, gradients and optimizer states (FSDP2), for models that are
    large beside their batch."""
    workers: int = 0
    """Number of processes that prepare batches, for each process that trains."""
    log_every: int = 1
    """Steps between two lines of the log."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; one is also written at the end and on SIGINT or SIGTERM."""

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether trained parameters may have no part in some step, for which several processes have to look then."""
        return False

    def check(self) -> None:
        """Refuse values that cannot work."""
        require(self, at_least(1), "epochs", "batch_size", "accumulate", "log_every", "checkpoint_every")
        require(self, at_least(1), "devices", "num_nodes")
        require(self, at_least(0), "workers", "seed")
        require(self, NOT_NEGATIVE, "lr", "weight_decay", "clip")
        require(self, Range("a share of the steps in [0, 1]", SHARE.holds), "warmup")
        require(self, Range("two numbers in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas)), "betas")
        if self.strategy == "fsdp" and self.precision not in ("32-true", "bf16-mixed"):  # Fabric has no others
            raise UserError(f"--precision: expected 32-true or bf16-mixed under --strategy fsdp, got {self.precision}")
        require(self, Range("less than 2**64", lambda seed: seed < 2**64), "seed")  # torch's generators take no more
        unlike = Range(
            "seeds in [0, 2**64), each once",
            lambda seeds: len(set(seeds)) == len(seeds) and all(0 <= seed < 2**64 for seed in seeds),
        )
        require(self, unlike, "seeds")


# Settings that a resumed run may change: they do not touch the arithmetic. (Where the data depends on the workers, its
# fingerprint does too.)
RESUMABLE = {
    "output_dir", "resume", "overwrite", "workers", "log_every", "checkpoint_every", "devices", "num_nodes", "strategy",
    "on_error", "max_bad",
}  # fmt: skip


def plain(config: LoopConfig) -> dict[str, Any]:
    """The configuration in types that JSON and `torch.load(weights_only=True)` know."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values
