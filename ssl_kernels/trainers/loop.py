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

import contextlib
import dataclasses
import inspect
import json
import math
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssl_kernels.trainers import checkpoints, processes, sharding
from ssl_kernels.trainers.checkpoints import CHECKPOINT, write_atomically
from ssl_kernels.trainers.errors import InterruptedRunError, LostRankError, NonFiniteError, UserError
from ssl_kernels.trainers.log import METRICS, json_line, open_log, read_records
from ssl_kernels.trainers.ranges import NOT_NEGATIVE, SHARE, Range, at_least, require

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


# Settings that a resumed run may change: they do not touch the arithmetic. (Where the data depends on the workers, its
# fingerprint does too.)
RESUMABLE = {
    "output_dir", "resume", "overwrite", "workers", "log_every", "checkpoint_every", "devices", "num_nodes", "strategy",
    "on_error", "max_bad",
}  # fmt: skip


@dataclass
class Result:
    """What a finished run reports."""

    records: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    elapsed_s: float = 0.0
    peak_mb: float = 0.0


def make_fabric(config: LoopConfig) -> Fabric:
    """One device, or several processes with one each, with the asked precision, and every seed set.

    All processes have the same seeds, and draw alike.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # written twice
    torch.backends.cudnn.benchmark = False
    if config.precision == "16-mixed" and (config.accelerator == "cpu" or not torch.accelerator.is_available()):
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
            accelerator=config.accelerator, devices=devices, num_nodes=num_nodes, precision=config.precision,
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


def parameter_groups(module: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """The module's trainable parameters, those with fewer than two dimensions without weight decay."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    decayed, plain = [p for p in trainable if p.ndim >= 2], [p for p in trainable if p.ndim < 2]
    groups = [
        {"params": decayed, "lr": lr, "peak_lr": lr, "weight_decay": weight_decay},
        {"params": plain, "lr": lr, "peak_lr": lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def steps_per_epoch(data: EpochBatches, config: LoopConfig) -> int:
    """Optimizer steps in an epoch, at least one; batches that do not fill a step are left out."""
    if len(data) < config.accumulate:
        raise UserError(
            f"--batch-size {config.batch_size} x --accumulate {config.accumulate}: more than one epoch holds"
            f" ({len(data)} batches of {config.batch_size})"
        )
    return len(data) // config.accumulate


def cosine(step: int, total: int, warmup: int) -> float:
    """The factor on the peak learning rate at a step: up in a line, down along half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def peak_memory_mb(device: torch.device) -> float:
    """The most memory used so far: of the GPU if the run is on one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import psutil

    info = psutil.Process().memory_info()
    try:
        import resource
    except ImportError:  # Windows counts the peak itself
        return float(info.peak_wset) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak) / (2**20 if os.uname().sysname == "Darwin" else 2**10)


def plain(config: LoopConfig) -> dict[str, Any]:
    """The configuration in types that JSON and `torch.load(weights_only=True)` know."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


class _Signals:
    """Turns the first SIGINT or SIGTERM into a flag; a second one acts at once, as it would have without us."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: the embedding program handles signals
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.__exit__()

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


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
    with _Signals() as signals:  # torchrun sends one where it finds a lost process, perhaps before it is asked for
        try:
            _fit(run, console or Console(), signals)
        except RuntimeError as error:
            lost = processes.lost_ranks(error)
            if lost is None:
                raise
            raise LostRankError(run.done + 1, lost, run.last_good()) from error
    return Result(run.records, run.done, run.elapsed_s, peak_memory_mb(fabric.device))


def _fit(run: _Training, console: Console, signals: _Signals) -> None:
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
