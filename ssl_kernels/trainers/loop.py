"""The training loop every trainer shares: Lightning Fabric, a cosine schedule, checkpoints that resume bit-exactly.

A trainer hands over its module, an optimizer, batches and functions, all but the first optional:

* `step(batch) -> (loss, metrics)` runs forward; `metrics` are scalars to log;
* `before_step(number)`, `after_backward(number)` and `after_step(number)` run once per optimizer step, never per
  micro-batch: before its first forward pass, what a schedule needs; between the last backward pass and clipping, what
  cancels gradients; after it, what a momentum teacher needs. Steps count from 1;
* `evaluate() -> figures` runs in all processes between two steps, every `--eval-every` epochs. The first figure is the
  score, by which the best checkpoint is chosen; the first process alone has to give any.

Everything a run consists of is either a function of (seed, epoch, batch number) or in the checkpoint.

In several processes, each with a device of its own, every batch is split among them and is what it is in one process:
`--batch-size` counts what all of them hold. What is logged is of the whole batch. The first process alone logs and
writes, and any number of processes resumes what any other number has written, except on shards.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from torch import Tensor, nn

from ssl_kernels.trainers import checkpoints, processes, sharding
from ssl_kernels.trainers.errors import InterruptedRunError, LostRankError, NonFiniteError, StoppedRunError
from ssl_kernels.trainers.log import RunLog, collapse_told, open_log, peak_memory_mb
from ssl_kernels.trainers.loggers import open_loggers
from ssl_kernels.trainers.loop_config import LoopConfig, plain
from ssl_kernels.trainers.optim import cosine
from ssl_kernels.trainers.run_state import RunState
from ssl_kernels.trainers.signals import Signals
from ssl_kernels.trainers.steps import EpochBatches, steps_per_epoch, total_steps

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule

__all__ = ["EpochBatches", "LoopConfig", "Result", "Step", "fit", "steps_per_epoch", "total_steps"]

Step = Callable[[Any], tuple[Tensor, dict[str, Any]]]


@dataclass
class Result:
    """What a finished run reports."""

    records: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    elapsed_s: float = 0.0
    peak_mb: float = 0.0
    images_per_s: float | None = None  # without the first step, which prepares much; None after a step or none
    notes: list[str] = field(default_factory=list)  # what the run has warned of


@dataclass(kw_only=True)
class _Training(RunState):
    """What `fit` was given, and how far it has come."""

    step: Step
    before_step: Callable[[int], None] | None
    after_backward: Callable[[int], None] | None
    after_step: Callable[[int], None] | None
    evaluate: Callable[[], dict[str, float]] | None
    steps_s: list[float] = field(default_factory=list)  # what each step of this process took
    notes: list[str] = field(default_factory=list)

    def optimizer_step(self, batches: Iterator[Any]) -> dict[str, float]:
        """Take the next step, over `accumulate` of the batches; its metrics."""
        self.last_step.keep()
        self.number, self.is_at = self.done + 1, "gradients"
        rate = cosine(self.done, self.total, self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * rate
        if self.before_step is not None:
            self.before_step(self.number)
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
            self.after_backward(self.number)
        norm = self._clip_gradients()
        self.is_at = "update"
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done = self.number
        if self.after_step is not None:
            self.after_step(self.done)
        self.is_at = "rest"
        return {**metrics, "lr": self.config.lr * rate, "grad_norm": norm}

    def _check_finite(self, values: dict[str, float]) -> None:
        if not math.isfinite(values["loss"]):
            others = [name for name, value in values.items() if name != "loss" and not math.isfinite(value)]
            terms = f"the loss (with {', '.join(others)})" if others else "the loss"
            raise NonFiniteError(self.number, terms, self.last_good())

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
            raise NonFiniteError(self.number, term, self.last_good()) from None
        assert norm is not None
        return float(sharding.whole(norm))

    @property
    def epoch(self) -> int:
        """Of the step that is done."""
        return (self.done - 1) // self.epoch_steps

    def is_due(self, every: int) -> bool:
        """Whether something is to be done every so many epochs, and at the end; 0 is never."""
        return every > 0 and (self.done % (every * self.epoch_steps) == 0 or self.done == self.total)

    def figures(self) -> dict[str, float]:
        """What an evaluation now says of the model, which trains on as if there had been none."""
        assert self.evaluate is not None
        drawn = checkpoints.rng_state()
        try:
            return self.evaluate()
        finally:
            checkpoints.set_rng_state(drawn)
            self.model.train()

    def record(self, metrics: dict[str, float], step_s: float) -> dict[str, Any]:
        """Keep and return what is logged of the step that is done, which took `step_s` seconds."""
        record = {
            "step": self.done, "epoch": self.epoch, **metrics, "images_per_s": self._images / step_s,
            "peak_mb": peak_memory_mb(self.fabric.device), "elapsed_s": self.elapsed_s,
        }  # fmt: skip
        self.records.append(record)
        return record

    @property
    def _images(self) -> int:
        return self.config.accumulate * self.config.batch_size

    def warn(self, message: str) -> None:
        """Say in a line what is odd about the run, and again at its end."""
        self.notes.append(f"warning: step {self.number}: {message}")
        self.console.print(self.notes[-1], highlight=False, soft_wrap=True)

    def result(self) -> Result:
        later = self.steps_s[1:]
        images_per_s = self._images * len(later) / sum(later) if later else None
        peak_mb = peak_memory_mb(self.fabric.device)
        return Result(self.records, self.done, self.elapsed_s, peak_mb, images_per_s, self.notes)


def fit(
    fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, data: EpochBatches, config: LoopConfig, *,
    step: Step | None = None, before_step: Callable[[int], None] | None = None,
    after_backward: Callable[[int], None] | None = None, after_step: Callable[[int], None] | None = None,
    evaluate: Callable[[], dict[str, float]] | None = None, inputs: dict[str, Any] | None = None,
    held_out: str = "", console: Console | None = None,
) -> Result:  # fmt: skip
    """Train `model`, set up by Fabric as `optimizer` is, for `config.epochs` epochs or `config.max_steps` steps.

    `step` defaults to calling the model; `inputs`, kept in checkpoints, says how its towers are built and fed, and
    `held_out` which held-out data a resumed run must find again. Raises
    `NonFiniteError` where the loss or a gradient is not finite, `LostRankError` where another process does not answer,
    `InterruptedRunError` after SIGINT, SIGTERM or SIGHUP, and `StoppedRunError` from any other error, all with the path
    of the checkpoint to continue from.
    """
    console = console or Console()
    run = _Training(
        fabric=fabric, model=cast("_FabricModule", model), optimizer=optimizer, data=data, config=config,
        inputs=inputs or {}, held_out=held_out, console=console, step=step or model, before_step=before_step,
        after_backward=after_backward, after_step=after_step, evaluate=evaluate,
    )  # fmt: skip
    run.begin()
    with Signals() as signals:  # torchrun sends one where it finds a lost process, perhaps before it is asked for
        try:
            loggers = open_loggers(config, plain(config), run.done) if fabric.is_global_zero else []
            with (
                open_log(console, loggers, done=run.done, total=run.total, epoch_steps=run.epoch_steps) as log,
                collapse_told(run.warn),
            ):
                _fit(run, log, signals)
        except (NonFiniteError, InterruptedRunError):
            raise
        except Exception as error:
            lost = processes.lost_ranks(error) if isinstance(error, RuntimeError) else None
            if lost is not None:
                raise LostRankError(run.number, lost, run.last_good()) from error
            raise StoppedRunError(run.number, error, run.rescue()) from error
    return run.result()


def _fit(run: _Training, log: RunLog, signals: Signals) -> None:
    config = run.config
    started = time.perf_counter() - run.elapsed_s
    run.model.train()
    while run.done < run.total:
        epoch, first = divmod(run.done, run.epoch_steps)
        batches = run.data.batches(epoch, start=first * config.accumulate)
        for _ in range(run.done, min((epoch + 1) * run.epoch_steps, run.total)):
            begun = time.perf_counter()
            metrics = run.optimizer_step(batches)
            now = time.perf_counter()
            run.steps_s.append(now - begun)
            run.elapsed_s = now - started
            is_last = run.done == run.total
            is_evaluated = run.evaluate is not None and run.is_due(config.eval_every)
            figures = run.figures() if is_evaluated else {}
            if run.done % config.log_every == 0 or run.done == 1 or is_last or figures:
                log.write(run.record({**metrics, **figures}, now - begun))
            log.show(run.done, run.elapsed_s)
            # Read once: a signal between here and the raise waits for the next step. All stop in the same one.
            stop = processes.highest_of_ranks(signals.received or 0, run.fabric.device)
            if is_evaluated:
                run.save_if_best(next(iter(figures.values()), 0.0))
            elif run.done % config.checkpoint_every == 0 or is_last or stop:
                run.save()
            if stop and not is_last:
                raise InterruptedRunError(signal.Signals(stop).name, 128 + stop, str(run.checkpoint))
