"""All that a run consists of: what a checkpoint holds, is written from and restored to."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from ssl_kernels.distributed import several_processes
from ssl_kernels.trainers import checkpoints, run_folder, sharding
from ssl_kernels.trainers.checkpoints import BEST, CHECKPOINT
from ssl_kernels.trainers.errors import NonFiniteError, UserError
from ssl_kernels.trainers.last_step import LastStep
from ssl_kernels.trainers.loggers import METRICS, read_records
from ssl_kernels.trainers.loop_config import LoopConfig, plain
from ssl_kernels.trainers.optim import cosine
from ssl_kernels.trainers.steps import EpochBatches, steps_per_epoch, total_steps

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule


@dataclass(kw_only=True)
class RunState:
    """A model, its optimizer and data, and how far they have come."""

    fabric: Fabric
    model: _FabricModule
    optimizer: torch.optim.Optimizer
    data: EpochBatches
    config: LoopConfig
    inputs: dict[str, Any]
    held_out: str  # fingerprint
    console: Console
    done: int = 0  # steps
    saved: int = 0  # steps that were done when the last checkpoint was written
    elapsed_s: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)  # score and step of what --eval-every found

    def __post_init__(self) -> None:
        self.fingerprint = self.data.fingerprint
        self.epoch_steps = steps_per_epoch(self.data, self.config)
        self.total = total_steps(self.data, self.config)
        self.warmup = round(self.config.warmup * self.total)
        self.checkpoint = self.config.output_dir / CHECKPOINT
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)  # of 16-mixed
        self.inner = self.model.module  # whose names are not those of wrappers
        self.last_step = LastStep(self.inner)
        self.number = 0  # of the last step that was begun
        self.is_at = "rest"  # or in its "gradients", or in its "update"

    def begin(self) -> None:
        """Come to where the resumed run stood, or see that the folder is free, and write what is known of the run."""
        config, folder = self.config, self.config.output_dir
        if config.resume is not None:
            self._restore(checkpoints.checkpoint_path(config.resume))
        elif self.checkpoint.exists() and not config.overwrite:
            raise UserError(
                f"--output-dir: {folder} already holds a run; --resume {folder} continues it, --overwrite starts over"
            )
        if self.fabric.is_global_zero:
            if config.overwrite and config.resume is None:
                run_folder.erase(folder)
            run_folder.start(folder, plain(config), self.records)

    def _restore(self, path: Path) -> None:
        state = checkpoints.load_checkpoint(path)
        in_place = path.parent.resolve() == self.config.output_dir.resolve()
        if self.checkpoint.exists() and not in_place:
            raise UserError(
                f"--output-dir: {self.config.output_dir} already holds another run than the one in {self.config.resume}"
            )
        if (state.get("epoch_steps"), state["data"]) != (self.epoch_steps, self.fingerprint):
            raise UserError(
                "--resume: the data is not what the run was trained on (other pairs, files, workers or processes)"
            )
        if state.get("held_out") != self.held_out:
            raise UserError("--held-out-data: the held-out pairs are not those that the run was started with")
        if self.total != state["total"]:
            self._extend(state)
        try:
            self.model.load_state_dict(sharding.weights_as(self.inner, state["model"]))
            self.optimizer.load_state_dict(sharding.optimizer_state_as(self.optimizer, state["optimizer"]))
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--resume: the checkpoint does not fit this model ({reason})") from None
        checkpoints.set_rng_state(state["rng"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.done, self.elapsed_s, self.best = state["step"], state["elapsed_s"], state.get("best", {})
        self.saved = self.done
        self.records = read_records(path.with_name(METRICS), up_to=self.done)
        if in_place and path.name != CHECKPOINT and self.fabric.is_global_zero:
            checkpoints.link(path, self.checkpoint)  # what was newer is given up

    def _extend(self, state: dict[str, Any]) -> None:
        """Say what another number of steps than was planned means, or refuse it."""
        done, before = state["step"], state["total"]
        if self.total < done:
            flag = "--max-steps" if self.config.max_steps else "--epochs"
            raise UserError(
                f"{flag}: the run has done {done} steps of {self.epoch_steps} to an epoch; expected as many at least,"
                f" got {self.total}"
            )
        rate = self.config.lr * cosine(done, self.total, self.warmup)
        self.console.print(
            f"{'extended' if self.total > before else 'shortened'} from {before} to {self.total} steps: from step"
            f" {done + 1} on, the learning rate (next {rate:.3g}) and all other schedules are those of a run of"
            f" {self.total} steps",
            highlight=False, soft_wrap=True,
        )  # fmt: skip

    def save(self, together: bool = True) -> None:
        """Write a checkpoint: one on disk is a good one. All processes do so `together`, or the first alone."""
        for name, parameter in self.inner.named_parameters():
            if not bool(sharding.whole(parameter.isfinite().all())):
                raise NonFiniteError(self.done, f"the updated parameter {name}", self.last_good())
        for name, buffer in self.inner.named_buffers():
            if bool(buffer.isnan().any()):  # an infinity may be meant, as in a mask
                raise NonFiniteError(self.done, f"the buffer {name}", self.last_good())
        trained = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state = {
            **sharding.whole(trained, keep=self.fabric.is_global_zero), "step": self.done,
            "elapsed_s": self.elapsed_s, "total": self.total, "epoch_steps": self.epoch_steps,
            "data": self.fingerprint, "rng": checkpoints.rng_state(),
            "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "config": plain(self.config), "inputs": self.inputs, "held_out": self.held_out,
            "best": self.best,
        }  # fmt: skip
        if self.fabric.is_global_zero:
            checkpoints.save_checkpoint(self.checkpoint, state, self.config.keep)
        if together:
            self.fabric.barrier()  # before a process ends, and with it perhaps the others
        self.saved = self.done

    def save_if_best(self, score: float) -> None:
        """Write a checkpoint, which is `best.pt` too if none before it scored as high."""
        is_best = not self.best or score > self.best["score"]
        if is_best:
            self.best = {"score": score, "step": self.done}
        self.save()
        if is_best and self.fabric.is_global_zero:
            checkpoints.link(self.checkpoint, self.checkpoint.with_name(BEST))

    def rescue(self) -> str | None:
        """After an error, save the last finished step if this process can; the checkpoint that is left."""
        alone = not several_processes() or (self.fabric.is_global_zero and self.config.strategy != "fsdp")
        if alone and self.is_at != "update" and self.done > self.saved:
            with contextlib.suppress(Exception):  # a full disk, or a device that answers nothing any more
                if self.is_at == "gradients":
                    self.last_step.restore()
                self.save(together=False)
        return self.last_good()

    def last_good(self) -> str | None:
        """The checkpoint that is left when something goes wrong; what lies there before the first may be another's."""
        return str(self.checkpoint) if self.saved and self.checkpoint.exists() else None
