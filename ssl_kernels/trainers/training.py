"""A run while it trains: one optimizer step, what is logged of it, and what a finished run reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ssl_kernels.trainers import checkpoints, processes, sharding
from ssl_kernels.trainers.errors import NonFiniteError
from ssl_kernels.trainers.log import peak_memory_mb
from ssl_kernels.trainers.optim import cosine
from ssl_kernels.trainers.run_state import RunState

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
class Training(RunState):
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
