"""The training loop every trainer shares: Lightning Fabric, a cosine schedule, checkpoints that resume bit-exactly.

A trainer hands over its module, an optimizer, batches and four functions:

* `step(batch) -> (loss, metrics)` runs forward; `metrics` are scalars to log;
* `before_step(number)`, `after_backward(number)` and `after_step(number)`, optional, run once per optimizer step, never
  per micro-batch: before its first forward pass, what a schedule needs; between the last backward pass and clipping,
  what cancels gradients; after it, what a momentum teacher needs. Steps count from 1.

Everything a run consists of is either a function of (seed, epoch, batch number) or in the checkpoint.

In several processes, each with a device of its own, every batch is split among them and is what it is in one process:
`--batch-size` counts what all of them hold. What is logged is of the whole batch. The first process alone logs and
writes, and any number of processes resumes what any other number has written, except on shards.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from ssl_kernels.trainers import checkpoints, processes, sharding
from ssl_kernels.trainers.checkpoints import CHECKPOINT, write_atomically
from ssl_kernels.trainers.errors import InterruptedRunError, LostRankError, NonFiniteError, UserError
from ssl_kernels.trainers.log import METRICS, json_line, open_log, peak_memory_mb, read_records
from ssl_kernels.trainers.loop_config import LoopConfig, plain
from ssl_kernels.trainers.optim import cosine
from ssl_kernels.trainers.signals import Signals

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule

Step = Callable[[Any], tuple[Tensor, dict[str, Any]]]


class EpochBatches(Protocol):
    """What the loop asks of the data."""

    batch_size: int

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def batches(self, epoch: int, start: int = 0) -> Iterator[Any]: ...


@dataclass
class Result:
    """What a finished run reports."""

    records: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    elapsed_s: float = 0.0
    peak_mb: float = 0.0


def steps_per_epoch(data: EpochBatches, config: LoopConfig) -> int:
    """Optimizer steps in an epoch, at least one; batches that do not fill a step are left out."""
    if len(data) < config.accumulate:
        raise UserError(
            f"--batch-size {config.batch_size} x --accumulate {config.accumulate}: more than one epoch holds"
            f" ({len(data)} batches of {config.batch_size})"
        )
    return len(data) // config.accumulate


@dataclass
class _Training:
    """What `fit` was given, and how far it has come."""

    fabric: Fabric
    model: _FabricModule
    optimizer: torch.optim.Optimizer
    data: EpochBatches
    config: LoopConfig
    step: Step
    before_step: Callable[[int], None] | None
    after_backward: Callable[[int], None] | None
    after_step: Callable[[int], None] | None
    done: int = 0  # steps
    elapsed_s: float = 0.0
    records: list[dict[str, float]] = field(default_factory=list)
    has_saved: bool = False

    def __post_init__(self) -> None:
        self.epoch_steps = steps_per_epoch(self.data, self.config)
        self.total = self.epoch_steps * self.config.epochs
        self.warmup = round(self.config.warmup * self.total)
        self.checkpoint = self.config.output_dir / CHECKPOINT
        self.scaler = getattr(self.fabric.strategy.precision, "scaler", None)  # of 16-mixed
        self.inner = self.model.module  # whose names are not those of wrappers

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
            self._prepare(folder)

    def _prepare(self, folder: Path) -> None:
        config = self.config
        if config.overwrite and config.resume is None and folder.is_dir():
            for name in (CHECKPOINT, "summary.json", "curves.png", "retrieval.png", "features.png"):
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--output-dir: cannot create {folder}: {error.strerror}") from None
        lines = "".join(map(json_line, self.records))
        write_atomically(folder / METRICS, lambda path: path.write_text(lines))
        write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(plain(config), indent=2)))

    def _restore(self, path: Path) -> None:
        state = checkpoints.load_checkpoint(path)
        if self.checkpoint.exists() and self.checkpoint.resolve() != path.resolve():
            raise UserError(
                f"--output-dir: {self.config.output_dir} already holds another run than the one in {self.config.resume}"
            )
        if (state["total"], state["data"]) != (self.total, self.data.fingerprint):
            raise UserError(
                "--resume: the data is not what the run was trained on (other pairs, files, workers or processes)"
            )
        try:
            self.model.load_state_dict(sharding.weights_as(self.inner, state["model"]))
            self.optimizer.load_state_dict(sharding.optimizer_state_as(self.optimizer, state["optimizer"]))
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--resume: the checkpoint does not fit this model ({reason})") from None
        checkpoints.set_rng_state(state["rng"])
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.done, self.elapsed_s = state["step"], state["elapsed_s"]
        self.records = read_records(path.with_name(METRICS), up_to=self.done)

    def optimizer_step(self, batches: Iterator[Any]) -> dict[str, float]:
        """Take the next step, over `accumulate` of the batches; its metrics."""
        rate = cosine(self.done, self.total, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        if self.before_step is not None:
            self.before_step(self.done + 1)
        metrics: dict[str, float] = {}
        for left in reversed(range(self.config.accumulate)):
            with self.fabric.no_backward_sync(self.model, enabled=left > 0):
                loss, extra = self.step(self.fabric.to_device(next(batches)))
                values = processes.mean_of_ranks({"loss": loss.detach(), **extra}, self.fabric.device)
                self._check_finite(values)
                self.fabric.backward(loss / self.config.accumulate)
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0.0) + value / self.config.accumulate
        if self.after_backward is not None:
            self.after_backward(self.done + 1)
        norm = self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if self.after_step is not None:
            self.after_step(self.done)
        return {**metrics, "lr": self.config.lr * rate, "grad_norm": norm}

    def _check_finite(self, values: dict[str, float]) -> None:
        if not math.isfinite(values["loss"]):
            others = [name for name, value in values.items() if name != "loss" and not math.isfinite(value)]
            terms = f"the loss (with {', '.join(others)})" if others else "the loss"
            raise NonFiniteError(self.done + 1, terms, self.last_good())

    def _clip_gradients(self) -> float:
        """The norm of the gradients before they are clipped."""
        limit = self.config.clip or math.inf
        try:  # a scaler meets infinite gradients on purpose and skips those steps
            norm = self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=limit, error_if_nonfinite=self.scaler is None
            )
        except RuntimeError:  # raised before the gradients are scaled, so the culprit can still be named
            gradients = ((name, p.grad) for name, p in self.inner.named_parameters() if p.grad is not None)
            bad = (name for name, gradient in gradients if not sharding.whole(gradient.isfinite().all()))
            term = f"the gradient of {next(bad, 'all parameters together')}"
            raise NonFiniteError(self.done + 1, term, self.last_good()) from None
        assert norm is not None
        return float(sharding.whole(norm))

    def record(self, epoch: int, metrics: dict[str, float], step_s: float) -> dict[str, float]:
        """Keep and return what is logged of the step that is done, which took `step_s` seconds."""
        images = self.config.accumulate * self.config.batch_size
        record = {
            "step": self.done, "epoch": epoch, **metrics, "images_per_s": images / step_s,
            "peak_mb": peak_memory_mb(self.fabric.device), "elapsed_s": self.elapsed_s,
        }  # fmt: skip
        self.records.append(record)
        return record

    def save(self) -> None:
        """Write a checkpoint: one on disk is a good one."""
        for name, parameter in self.inner.named_parameters():
            if not bool(sharding.whole(parameter.isfinite().all())):
                raise NonFiniteError(self.done, f"the updated parameter {name}", self.last_good())
        for name, buffer in self.inner.named_buffers():
            if bool(buffer.isnan().any()):  # an infinity may be meant, as in a mask
                raise NonFiniteError(self.done, f"the buffer {name}", self.last_good())
        trained = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state = {
            **sharding.whole(trained, keep=self.fabric.is_global_zero), "step": self.done,
            "elapsed_s": self.elapsed_s, "total": self.total, "data": self.data.fingerprint,
            "rng": checkpoints.rng_state(), "scaler": {} if self.scaler is None else self.scaler.state_dict(),
            "config": plain(self.config),
        }  # fmt: skip
        if self.fabric.is_global_zero:
            write_atomically(self.checkpoint, lambda path: torch.save(state, path))
        self.fabric.barrier()  # before a process ends, and with it perhaps the others
        self.has_saved = True

    def last_good(self) -> str | None:
        """The checkpoint that is left when something goes wrong; what lies there before the first may be another's."""
        is_own = self.has_saved or (self.config.resume is not None and self.checkpoint.exists())
        return str(self.checkpoint) if is_own else None


def fit(
    fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, data: EpochBatches, config: LoopConfig, *,
    step: Step | None = None, before_step: Callable[[int], None] | None = None,
    after_backward: Callable[[int], None] | None = None, after_step: Callable[[int], None] | None = None,
    console: Console | None = None,
) -> Result:  # fmt: skip
    """Train `model`, set up by Fabric as `optimizer` is, for `config.epochs` epochs.

    `step` defaults to calling the model. Raises `NonFiniteError` where the loss or a gradient is not finite,
    `LostRankError` where another process does not answer, and `InterruptedRunError` after SIGINT or SIGTERM, all with
    the path of the checkpoint to continue from.
    """
    run = _Training(
        fabric, cast("_FabricModule", model), optimizer, data, config, step or model,
        before_step, after_backward, after_step,
    )  # fmt: skip
    run.begin()
    with Signals() as signals:  # torchrun sends one where it finds a lost process, perhaps before it is asked for
        try:
            _fit(run, console or Console(), signals)
        except RuntimeError as error:
            lost = processes.lost_ranks(error)
            if lost is None:
                raise
            raise LostRankError(run.done + 1, lost, run.last_good()) from error
    return Result(run.records, run.done, run.elapsed_s, peak_memory_mb(fabric.device))


def _fit(run: _Training, console: Console, signals: Signals) -> None:
    config, data = run.config, run.data
    started = time.perf_counter() - run.elapsed_s
    run.model.train()
    with open_log(
        config.output_dir if run.fabric.is_global_zero else None, console,
        done=run.done, total=run.total, epochs=config.epochs,
    ) as log:  # fmt: skip
        for epoch in range(run.done // run.epoch_steps, config.epochs):
            batches = data.batches(epoch, start=(run.done % run.epoch_steps) * config.accumulate)
            while run.done < (epoch + 1) * run.epoch_steps:
                begun = time.perf_counter()
                metrics = run.optimizer_step(batches)
                now = time.perf_counter()
                run.elapsed_s = now - started
                is_last = run.done == run.total
                if run.done % config.log_every == 0 or run.done == 1 or is_last:
                    log.write(run.record(epoch, metrics, now - begun))
                log.show(run.done, run.elapsed_s)
                # Read once: a signal between here and the raise waits for the next step. All stop in the same one.
                stop = processes.highest_of_ranks(signals.received or 0, run.fabric.device)
                if run.done % config.checkpoint_every == 0 or is_last or stop:
                    run.save()
                if stop and not is_last:
                    raise InterruptedRunError(signal.Signals(stop).name, 128 + stop, str(run.checkpoint))
