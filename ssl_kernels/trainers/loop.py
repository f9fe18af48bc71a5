"""The training loop every trainer shares: Lightning Fabric, a cosine schedule, checkpoints that resume bit-exactly.

A trainer hands over its module, an optimizer, batches and three functions:

* `step(batch) -> (loss, metrics)` runs forward; `metrics` are scalars to log;
* `before_step(number)` and `after_step(number)`, optional, run once per optimizer step, never per micro-batch: before
  its first forward pass, what a schedule needs; after it, what a momentum teacher needs. Steps count from 1.

Everything a run consists of is either a function of (seed, epoch, batch number) or in the checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from typing import Any, Literal, Protocol

import numpy as np
import torch
from lightning.fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from ssl_kernels.trainers.errors import InterruptedRunError, NonFiniteError, UserError

CHECKPOINT = "last.pt"
METRICS = "metrics.jsonl"
TIMED = ("images_per_s", "peak_mb", "elapsed_s")  # the metrics that two runs of one seed need not share

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
    """Continue the run in this folder (or from this checkpoint) exactly where it stopped; its settings are reused."""
    overwrite: bool = False
    """Start over in a folder that already holds a run."""
    seed: int = 0
    """Seed of the weights, the data order and the augmentation."""
    epochs: int = 40
    """Passes over the training pairs."""
    batch_size: int = 256
    """Pairs per forward pass; each is contrasted with the others of its own batch."""
    accumulate: int = 1
    """Batches whose gradients are averaged per optimizer step. This saves memory in the nets; but where a loss compares
    the images of a batch it still sees one batch at a time, so 4 x 256 is not 1,024."""
    lr: float = 3e-3
    """Peak learning rate."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises linearly; then it falls along a cosine to zero."""
    weight_decay: float = 0.05
    """AdamW's weight decay, for matrices and filters only."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""
    clip: float = 5.0
    """Largest norm of the gradient; 0 turns clipping off."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "64-true"] = "32-true"
    """Fabric's precision: of the arithmetic, and with -true of the weights too."""
    accelerator: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on."""
    workers: int = 0
    """Processes that prepare batches."""
    log_every: int = 1
    """Steps between two lines of the log."""
    checkpoint_every: int = 100
    """Steps between two checkpoints; one is also written at the end and on SIGINT or SIGTERM."""

    def check(self) -> None:
        """Refuse values that cannot work."""
        for name, low in (("epochs", 1), ("batch_size", 1), ("accumulate", 1), ("log_every", 1),
                          ("checkpoint_every", 1), ("workers", 0), ("seed", 0)):  # fmt: skip
            if getattr(self, name) < low:
                raise UserError(f"--{name.replace('_', '-')}: expected at least {low}, got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name.replace('_', '-')}: expected a finite number >= 0, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise UserError(f"--warmup: expected a share of the steps in [0, 1], got {self.warmup}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas: expected two numbers in [0, 1), got {self.betas}")
        if self.seed >= 2**64:  # torch's generators take no more
            raise UserError(f"--seed: expected less than 2**64, got {self.seed}")


# Settings that a resumed run may change: they do not touch the arithmetic. (Where the data depends on the workers, its
# fingerprint does too.)
RESUMABLE = {"output_dir", "resume", "overwrite", "workers", "log_every", "checkpoint_every"}


@dataclass
class Result:
    """What a finished run reports."""

    records: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    elapsed_s: float = 0.0
    peak_mb: float = 0.0


def make_fabric(config: LoopConfig) -> Fabric:
    """One device with the asked precision, and every seed set."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # written twice
    torch.backends.cudnn.benchmark = False
    if config.precision == "16-mixed" and (config.accelerator == "cpu" or not torch.accelerator.is_available()):
        raise UserError("--precision: 16-mixed needs a GPU; use bf16-mixed or 32-true on a CPU")
    try:
        fabric = Fabric(accelerator=config.accelerator, devices=1, precision=config.precision)
    except Exception as error:  # Fabric raises its own kinds for a missing device
        raise UserError(f"--accelerator {config.accelerator} --precision {config.precision}: {error}") from None
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


# -- Checkpoints -----------------------------------------------------------------------------------------------------


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name, flush it to the disk, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checkpoint_path(resume: Path) -> Path:
    """The checkpoint that `--resume` means: the file itself, or the one in the folder."""
    path = resume / CHECKPOINT if resume.is_dir() else resume
    if not path.is_file():
        raise UserError(f"--resume: no checkpoint at {path}; expected a run's folder or its {CHECKPOINT}")
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        missing = {"model", "optimizer", "step", "total", "data", "rng", "config", "elapsed_s"} - state.keys()
    except Exception as error:  # torch, zipfile and pickle each have their own
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--resume: {path} is not a readable checkpoint ({reason[:120]})") from None
    if missing:
        raise UserError(f"--resume: {path} is not a checkpoint of this trainer (it lacks {', '.join(sorted(missing))})")
    return dict(state)


def plain(config: LoopConfig) -> dict[str, Any]:
    """The configuration in types that JSON and `torch.load(weights_only=True)` know."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    return values


def _rng_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    return {
        "python": (version, list(internal), gauss),
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


# -- Logs and signals ------------------------------------------------------------------------------------------------


def read_records(path: Path, up_to: int | None = None) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if up_to is None or record["step"] <= up_to:
                records.append(record)
    return records


def _json_line(record: dict[str, Any]) -> str:
    """JSON knows no infinity, which the norm of a step that a scaler skips may be: null stands for it."""
    values = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
    return json.dumps(values) + "\n"


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


def _own_name(parameter: str) -> str:
    """A parameter's name as its author knows it, without Fabric's wrapper."""
    return parameter.removeprefix("_forward_module.")


# -- The loop --------------------------------------------------------------------------------------------------------


def fit(
    fabric: Fabric, model: nn.Module, optimizer: torch.optim.Optimizer, data: EpochBatches, config: LoopConfig, *,
    step: Step | None = None, before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int], None] | None = None, console: Console | None = None,
) -> Result:  # fmt: skip
    """Train `model`, set up by `fabric.setup` together with `optimizer`, for `config.epochs` epochs.

    `step` defaults to calling the model. Raises `NonFiniteError` where the loss or a gradient is not finite and
    `InterruptedRunError` after SIGINT or SIGTERM, both with the path of the checkpoint to continue from.
    """
    step = step or model
    console = console or Console()
    per_epoch = steps_per_epoch(data, config)
    total = per_epoch * config.epochs
    warmup = round(config.warmup * total)
    folder = config.output_dir
    checkpoint = folder / CHECKPOINT
    done, elapsed, result = 0, 0.0, Result()
    scaler = getattr(fabric.strategy.precision, "scaler", None)  # of 16-mixed

    if config.resume is not None:
        state = load_checkpoint(checkpoint_path(config.resume))
        if checkpoint.exists() and checkpoint.resolve() != checkpoint_path(config.resume).resolve():
            raise UserError(f"--output-dir: {folder} already holds another run than the one in {config.resume}")
        if (state["total"], state["data"]) != (total, data.fingerprint):
            raise UserError("--resume: the data is not what the run was trained on (other pairs, files or workers)")
        try:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--resume: the checkpoint does not fit this model ({reason})") from None
        _set_rng_state(state["rng"])
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        done, elapsed = state["step"], state["elapsed_s"]
        result.records = read_records(checkpoint_path(config.resume).with_name(METRICS), up_to=done)
    elif config.overwrite and folder.is_dir():
        for name in (CHECKPOINT, "summary.json", "curves.png", "retrieval.png", "features.png"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    elif checkpoint.exists():
        raise UserError(
            f"--output-dir: {folder} already holds a run; --resume {folder} continues it, --overwrite starts over"
        )

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output-dir: cannot create {folder}: {error.strerror}") from None
    lines = "".join(map(_json_line, result.records))
    write_atomically(folder / METRICS, lambda path: path.write_text(lines))
    write_atomically(folder / "config.json", lambda path: path.write_text(json.dumps(plain(config), indent=2)))

    def last_good() -> str | None:
        return str(checkpoint) if saved or (config.resume and checkpoint.exists()) else None

    def save() -> None:
        for name, parameter in model.named_parameters():
            if not bool(parameter.isfinite().all()):  # a checkpoint on disk is a good one
                raise NonFiniteError(done, f"the updated parameter {_own_name(name)}", last_good())
        for name, buffer in model.named_buffers():
            if bool(buffer.isnan().any()):  # an infinity may be meant, as in a mask
                raise NonFiniteError(done, f"the buffer {_own_name(name)}", last_good())
        state = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done, "elapsed_s": elapsed,
            "total": total, "data": data.fingerprint,
            "rng": _rng_state(), "scaler": scaler.state_dict() if scaler is not None else {}, "config": plain(config),
        }  # fmt: skip
        write_atomically(checkpoint, lambda path: fabric.save(path, state))
        saved.append(checkpoint)

    def check_finite(loss: Tensor, extra: dict[str, Any]) -> None:
        if not bool(torch.isfinite(loss)):
            others = [name for name, value in extra.items() if not math.isfinite(value)]
            terms = f"the loss (with {', '.join(others)})" if others else "the loss"
            raise NonFiniteError(done + 1, terms, last_good())

    saved: list[Path] = []
    shown = ""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, disable=not console.is_terminal)
    started = time.perf_counter() - elapsed
    model.train()
    with _Signals() as signals, progress, SummaryWriter(folder / "tensorboard", purge_step=done + 1) as board, \
            open(folder / METRICS, "a") as log:  # fmt: skip
        bar = progress.add_task("", total=total, completed=done)
        for epoch in range(done // per_epoch, config.epochs):
            batches = data.batches(epoch, start=(done % per_epoch) * config.accumulate)
            while done < (epoch + 1) * per_epoch:
                begun = time.perf_counter()
                factor = cosine(done, total, warmup)
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
                if before_step is not None:
                    before_step(done + 1)

                metrics: dict[str, float] = {}
                for _ in range(config.accumulate):
                    batch = fabric.to_device(next(batches))
                    loss, extra = step(batch)
                    check_finite(loss.detach(), extra)
                    fabric.backward(loss / config.accumulate)
                    for name, value in {"loss": loss.detach(), **extra}.items():
                        metrics[name] = metrics.get(name, 0.0) + float(value) / config.accumulate
                limit = config.clip or math.inf
                try:  # a scaler meets infinite gradients on purpose and skips those steps
                    norm = fabric.clip_gradients(model, optimizer, max_norm=limit, error_if_nonfinite=scaler is None)
                except RuntimeError:  # raised before the gradients are scaled, so the culprit can still be named
                    bad = (n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all())
                    term = f"the gradient of {_own_name(next(bad, 'all parameters together'))}"
                    raise NonFiniteError(done + 1, term, last_good()) from None
                assert norm is not None
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                done += 1
                if after_step is not None:
                    after_step(done)

                now = time.perf_counter()
                elapsed = now - started
                if done % config.log_every == 0 or done in (1, total):
                    record = {
                        "step": done, "epoch": epoch, **metrics, "lr": config.lr * factor,
                        "grad_norm": float(norm),
                        "images_per_s": config.accumulate * config.batch_size / (now - begun),
                        "peak_mb": peak_memory_mb(fabric.device), "elapsed_s": elapsed,
                    }  # fmt: skip
                    result.records.append(record)
                    log.write(_json_line(record))
                    log.flush()
                    for name, value in record.items():
                        if name not in ("step", "epoch"):
                            board.add_scalar(name, value, done)
                    shown = (
                        f"epoch {epoch + 1}/{config.epochs}  loss {record['loss']:.4f}"
                        f"  {record['images_per_s']:.0f} images/s  {record['peak_mb']:.0f} MB"
                    )
                progress.update(bar, description=shown, completed=done)
                if not console.is_terminal and done % per_epoch == 0:
                    left = elapsed / done * (total - done)
                    console.print(f"step {done}/{total}  {shown}  {left:.0f} s left", highlight=False)
                stop = signals.received  # read once: a signal between here and the raise waits for the next step
                if done % config.checkpoint_every == 0 or done == total or stop:
                    save()
                if stop and done < total:
                    raise InterruptedRunError(stop.name, 128 + stop, str(checkpoint))
    result.steps, result.elapsed_s, result.peak_mb = done, elapsed, peak_memory_mb(fabric.device)
    return result
