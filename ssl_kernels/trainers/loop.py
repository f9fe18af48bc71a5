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

import signal
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from rich.console import Console
from torch import nn

from ssl_kernels.trainers import processes
from ssl_kernels.trainers.errors import InterruptedRunError, LostRankError, NonFiniteError, StoppedRunError
from ssl_kernels.trainers.log import RunLog, collapse_told, open_log
from ssl_kernels.trainers.loggers import open_loggers
from ssl_kernels.trainers.loop_config import LoopConfig, plain
from ssl_kernels.trainers.signals import Signals
from ssl_kernels.trainers.steps import EpochBatches
from ssl_kernels.trainers.training import Result, Step, Training

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.wrappers import _FabricModule


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
    run = Training(
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


def _fit(run: Training, log: RunLog, signals: Signals) -> None:
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
