"""What gpu_check.py measures: groups of providers of one op, timed side by side in one process.

A provider is ours, PyTorch, or a peer's own package. Each is compared with the plain formula in float32 before it is
timed; one that is not installed, raises or gives other numbers is reported as such, and the rest go on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_meter import Meter

from ssl_kernels.bench.clip import CLIP
from ssl_kernels.bench.dino import DINO
from ssl_kernels.bench.ema import EMA
from ssl_kernels.bench.info_nce import INFO_NCE
from ssl_kernels.bench.metric_learning import METRIC_NT_XENT, METRIC_SUP_CON
from ssl_kernels.bench.nt_xent import NT_XENT
from ssl_kernels.bench.problem import Loss, NotComparableError, Op, Problem, step
from ssl_kernels.bench.queue import QUEUE
from ssl_kernels.bench.row_softmax import ROW_SOFTMAX
from ssl_kernels.bench.sigmoid import SIGMOID

Row = dict[str, Any]

# By provider: what is imported, and what pip calls it.
PACKAGES = {
    "open_clip": ("open_clip", "open_clip_torch"),
    "siglip-kernel": ("siglip_kernel", "siglip-kernel"),
    "memeff": ("memeff", "memeff"),
    "Inf-CL": ("inf_cl", "inf-cl"),
    "cut-cross-entropy": ("cut_cross_entropy", "cut-cross-entropy"),
    "Liger": ("liger_kernel", "liger-kernel"),
    "quack": ("quack", "quack-kernels"),
    "pytorch-metric-learning": ("pytorch_metric_learning", "pytorch-metric-learning"),
    "lightly": ("lightly", "lightly"),
    "timm": ("timm", "timm"),
}
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2**-5, torch.float16: 2**-5}
MOST_COMPARED = 2048  # of the rows of a formula that keeps several matrices of them


@dataclass(frozen=True)
class Group:
    """Providers of one op at its shapes."""

    op: Op
    providers: tuple[str, ...]
    shapes: Sequence[tuple[Any, ...]]

    @property
    def name(self) -> str:
        foreign = [p for p in self.providers if p in KERNELS_OF_OTHERS]
        return ", ".join([self.op.name + self.op.suffix, *foreign])


# Compiled for GPUs by others: where one breaks the context of the device, a group of its own loses nothing else.
KERNELS_OF_OTHERS = ("siglip-kernel", "memeff", "Inf-CL", "cut-cross-entropy", "Liger", "quack")
PYTORCH = ("ours", "eager", "compile")
# The most important first: time is cut from the end.
GROUPS = [
    Group(SIGMOID, (*PYTORCH, "open_clip"), SIGMOID.gpu_shapes),
    Group(CLIP, (*PYTORCH, "open_clip", "torch, in chunks"), CLIP.gpu_shapes),
    Group(DINO, (*PYTORCH, "lightly"), DINO.gpu_shapes),
    Group(SIGMOID, ("ours", "siglip-kernel"), SIGMOID.gpu_shapes),
    Group(CLIP, ("ours", "memeff"), CLIP.gpu_shapes),
    Group(CLIP, ("ours", "Inf-CL"), CLIP.gpu_shapes[:4]),
    Group(CLIP, ("ours", "cut-cross-entropy"), CLIP.gpu_shapes[:4]),
    Group(CLIP, ("ours", "Liger"), CLIP.gpu_shapes[:4]),
    Group(CLIP, ("ours", "quack"), CLIP.gpu_shapes[:4]),
    Group(EMA, ("ours", "foreach_lerp", "loop", "timm", "lightly"), EMA.gpu_shapes),
    Group(QUEUE, ("ours", "moco", "lightly"), QUEUE.gpu_shapes),
    Group(INFO_NCE, ("ours", "eager"), INFO_NCE.gpu_shapes),
    Group(NT_XENT, ("ours", "eager", "lightly"), NT_XENT.gpu_shapes),
    Group(ROW_SOFTMAX, ("ours", "eager"), ROW_SOFTMAX.gpu_shapes),
    Group(METRIC_SUP_CON, ("ours", "eager", "pytorch-metric-learning"), METRIC_SUP_CON.gpu_shapes),
    Group(METRIC_NT_XENT, ("ours", "eager", "pytorch-metric-learning"), METRIC_NT_XENT.gpu_shapes),
]


def installed(provider: str) -> str:
    """The version of a provider's package."""
    try:
        return importlib.metadata.version(PACKAGES[provider][1])
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def absence(provider: str) -> Row | None:
    """Why a provider's package cannot be used, if it cannot."""
    if provider not in PACKAGES:
        return None
    if installed(provider) == "not installed":
        return {"status": "not installed", "detail": ""}
    try:
        importlib.import_module(PACKAGES[provider][0])
    except Exception as error:  # a peer may fail in any way where its own needs are not met
        return {"status": "import failed", "detail": _one_line(error)}
    return None


def _one_line(error: BaseException) -> str:
    """Of an assertion without a message, what it asserts."""
    frames = traceback.extract_tb(error.__traceback__)
    said = str(error) or (frames[-1].line if frames else "") or ""
    return f"{type(error).__name__}: {' '.join(said.split())}"[:300]


STARTED = "started"


def measure(group: Group, device: torch.device, *, tiny: bool, deadline: float) -> Iterator[Row]:
    """A row to each provider, shape and mode, and one before each attempt. What the deadline (of time.monotonic) cuts
    is a row, too."""
    meter = Meter(device)
    dtype = torch.float32 if tiny else torch.bfloat16
    out_of_memory: set[str] = set()  # at one shape: larger ones would be, too
    errors: dict[tuple[Any, ...], float] = {}
    op = group.op
    for shape in op.tiny if tiny else group.shapes:
        problem: Problem | None = None
        for provider in group.providers:
            row: Row = {
                "op": op.name,
                "provider": provider,
                "shape": op.describe(*shape) + op.suffix,
                "dtype": _name(dtype),
            }
            row |= {"group": group.name, "status": "measured"}
            if time.monotonic() >= deadline:
                yield row | {"status": "cut", "detail": "no time was left"}
                continue
            yield row | {"status": STARTED}  # whoever ends the process is known by it
            if (absent := absence(provider)) is not None:
                yield row | absent
                continue
            if provider in out_of_memory:
                yield row | {"status": "out of memory", "detail": "as at a smaller shape"}
                continue
            try:
                problem = problem or op.problem(*shape, dtype, device)
                comparable = op.comparable(shape, MOST_COMPARED)
                key = (provider, *comparable)
                if key not in errors:
                    errors[key] = _error(op, comparable, provider, dtype, device)
                row["error"] = errors[key]
                if not row["error"] <= TOLERANCE[dtype]:
                    detail = f"relative error {row['error']:.2g}, allowed {TOLERANCE[dtype]:.2g}"
                    yield row | {"status": "outputs differ", "detail": detail}
                    continue
                yield from _timed(row, op, problem, provider, meter, dtype, tiny)
            except NotComparableError as error:
                yield row | {"status": "not comparable", "detail": str(error)}
            except ModuleNotFoundError as error:
                missing = (error.name or "").partition(".")[0]
                foreign = missing in [module for module, _ in PACKAGES.values()]  # for which ours is written, too
                yield row | {"status": "not installed" if foreign else "failed", "detail": _one_line(error)}
            except torch.OutOfMemoryError as error:
                out_of_memory.add(provider)
                yield row | {"status": "out of memory", "detail": _one_line(error)}
            except Exception as error:  # of any provider, in any way
                yield row | {"status": "failed", "detail": _one_line(error)}
                if device.type == "cuda" and _context_is_lost():
                    raise
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del problem


def _loss(problem: Problem, provider: str, device: torch.device) -> Loss:
    return problem.loss(provider, "inductor" if device.type == "cuda" else "aot_eager")


def _error(op: Op, shape: tuple[Any, ...], provider: str, dtype: torch.dtype, device: torch.device) -> float:
    problem = op.problem(*shape, dtype, device)
    return problem.error(provider, _loss(problem, provider, device), op.modes[-1])


def _timed(
    row: Row, op: Op, problem: Problem, provider: str, meter: Meter, dtype: torch.dtype, tiny: bool
) -> Iterator[Row]:
    loss = _loss(problem, provider, meter.device)
    for mode in op.modes:
        once = functools.partial(step, loss, problem.leaves, mode)
        found = row | {"mode": mode, "ms": meter.median_ms(once), "peak_mb": meter.peak_mb(once)}
        found["launch_ms"] = meter.launch_ms(once)
        for leaf in problem.leaves:
            leaf.grad = None
        floor = problem.floor(provider, mode == "forward+backward")
        if floor.gflop:
            rate = meter.matrix_tflops(floor.width, dtype, tiny)
            found |= {"gflop": floor.gflop, "matrix_tflops": rate, "of_matrix_rate": floor.gflop / found["ms"] / rate}
        if floor.gbytes:
            rate = meter.copy_gbytes_per_s(tiny)
            found |= {"gbytes": floor.gbytes, "copy_gbytes_per_s": rate}
            found["of_bandwidth"] = 1e3 * floor.gbytes / found["ms"] / rate
        yield found


def _context_is_lost() -> bool:
    """After an illegal access every further call fails, and only a new process helps."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
