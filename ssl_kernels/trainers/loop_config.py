"""The settings that the command lines of all trainers have in common."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ssl_kernels.trainers.errors import UserError
from ssl_kernels.trainers.ranges import NOT_NEGATIVE, SHARE, SHARE_BELOW_ONE, Range, at_least, require

EMBEDDED = ("mnist", "openmoji")  # names of data that come as Python packages


@dataclass
class LoopConfig:
    """What every trainer's command line has in common."""

    output_dir: Path = Path("runs/demo")
    """Folder for logs, checkpoints and pictures. One run at a time writes into it."""
    config: Path | None = None
    """File of options in YAML or JSON, such as the `config.json` of another run. Options on the command line override
    it."""
    resume: Path | None = None
    """Continue the run in this folder (or from this checkpoint) exactly where it stopped; its settings are reused. With
    more epochs or steps than it had, it goes on longer, and its data may be named anew if a copy was moved. The number
    of processes may be another, except on WebDataset shards, which are dealt among them."""
    init_from: str = ""
    """Start with weights of a run (its folder or checkpoint), of timm (a model's name) or of a .safetensors file: those
    whose names and shapes match."""
    overwrite: bool = False
    """Start over in a folder that already holds a run."""
    seed: int = 0
    """Seed of the weights, the data order and the augmentation."""
    seeds: tuple[int, ...] = ()
    """Train once with each of these seeds, in the subfolders seed-0, seed-1 and so on of --output-dir, and print the
    figures of all in one table. --resume continues a series that was stopped."""
    epochs: int = 40
    """Passes over the training pairs."""
    max_steps: int = 0
    """Number of optimizer steps, at which the schedules end, instead of --epochs; 0 means those of --epochs."""
    batch_size: int = 256
    """Pairs per forward pass, over all processes. Each is contrasted with the other pairs of its batch."""
    accumulate: int = 1
    """Number of batches whose gradients are averaged per optimizer step. This saves memory in the networks. A loss that
    compares the images of a batch still sees one batch at a time, so 4 x 256 is not 1,024."""
    optimizer: Literal["adamw", "sgd", "lars"] = "adamw"
    """AdamW, SGD with momentum, or LARS for large batches. SGD and LARS need other learning rates, for example
    0.03 and 0.3 for each 256 images of a batch."""
    optimizer_momentum: float = 0.9
    """Momentum of SGD and LARS."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly; then it falls along a cosine to zero."""
    weight_decay: float = 0.05
    """The optimizer's weight decay; it applies to matrices and filters only."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    clip: float = 5.0
    """Largest norm of the gradient; 0 turns clipping off."""
    precision: Literal["auto", "32-true", "bf16-mixed", "16-mixed", "64-true"] = "auto"
    """Fabric's precision. It is the precision of the arithmetic, and with -true also of the weights. `auto` is
    bf16-mixed on a GPU that computes in bfloat16, and 32-true elsewhere."""
    compile: bool = False
    """Compile the blocks of the networks with torch.compile. The first step takes longer, the others less."""
    grad_checkpointing: bool = False
    """Compute activations of the networks again in the backward pass instead of keeping them. This saves memory and
    takes about a third more time."""
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
    tensorboard: bool = True
    """Write the log for TensorBoard too, besides the JSON lines."""
    wandb: str = ""
    """Project of Weights & Biases that the log goes to as well; it needs the package `wandb`."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; one is also written at the end, on SIGINT, SIGTERM or SIGHUP, and after an
    error."""
    keep: int = 2
    """Number of checkpoints that are kept: last.pt, and before it last-1.pt, last-2.pt and so on."""
    eval_every: int = 0
    """Epochs between two evaluations while training: nearest neighbours among held-out images, or retrieval of held-out
    pairs. The best checkpoint is kept as best.pt. 0 evaluates at the end only."""

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether trained parameters may have no part in some step, for which several processes have to look then."""
        return False

    def check(self) -> None:
        """Refuse values that cannot work."""
        require(self, at_least(1), "epochs", "batch_size", "accumulate", "log_every", "checkpoint_every", "keep")
        require(self, at_least(1), "devices", "num_nodes")
        require(self, at_least(0), "workers", "seed", "max_steps", "eval_every")
        require(self, NOT_NEGATIVE, "lr", "weight_decay", "clip")
        require(self, SHARE_BELOW_ONE, "optimizer_momentum")
        require(self, Range("a share of the steps in [0, 1]", SHARE.holds), "warmup")
        require(self, Range("two numbers in [0, 1)", lambda betas: all(0 <= beta < 1 for beta in betas)), "betas")
        allowed = ("auto", "32-true", "bf16-mixed")  # Fabric has no others
        if self.strategy == "fsdp" and self.precision not in allowed:
            raise UserError(f"--precision: expected 32-true or bf16-mixed under --strategy fsdp, got {self.precision}")
        require(self, Range("less than 2**64", lambda seed: seed < 2**64), "seed")  # torch's generators take no more
        try:
            os.fspath(self.output_dir).encode()
        except UnicodeEncodeError:
            if self.tensorboard:
                raise UserError(
                    f"--output-dir: TensorBoard writes into no folder whose name is not UTF-8, {self.output_dir}; add"
                    " --no-tensorboard, or give it another name"
                ) from None
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise UserError("--wandb: the package wandb is not installed; pip install wandb")
        unlike = Range(
            "seeds in [0, 2**64), each once",
            lambda seeds: len(set(seeds)) == len(seeds) and all(0 <= seed < 2**64 for seed in seeds),
        )
        require(self, unlike, "seeds")


# Settings that a resumed run may change: they do not touch the arithmetic of a step. (How long the run is moves its
# schedules, which the run says. The data's fingerprint tells whether the data is the same.)
RESUMABLE = {
    "output_dir", "config", "resume", "overwrite", "epochs", "max_steps", "workers", "log_every", "tensorboard",
    "wandb", "checkpoint_every", "keep", "eval_every", "devices", "num_nodes", "strategy", "data", "held_out_data",
    "on_error", "max_bad", "run",
}  # fmt: skip


def plain(config: LoopConfig) -> dict[str, Any]:
    """The configuration in types that JSON and `torch.load(weights_only=True)` know, as a run of its own.

    Paths are absolute, so that they mean the same in any working directory.
    """
    values = {**dataclasses.asdict(config), "config": None, "resume": None, "overwrite": False}
    values["output_dir"] = os.path.abspath(config.output_dir)
    for name in ("data", "held_out_data", "init_from", "run"):
        if name in values:
            values[name] = absolute(str(values[name]))
    plain_values: dict[str, Any] = json.loads(json.dumps(values, default=str))
    return plain_values


def absolute(name: str) -> str:
    """A file, a folder or a pattern of shards by its absolute path; anything else, such as `mnist`, as it is."""
    if name in EMBEDDED or name.startswith("pipe:") or "://" in name:
        return name
    parts = [os.path.expanduser(part) for part in name.split("::")]
    if all(os.path.exists(part) or set("{*?[") & set(part) for part in parts):
        return "::".join(map(os.path.abspath, parts))
    return name
