"""What gpu_check.py measures: groups of providers of one op, timed side by side in one process.

A provider is ours, PyTorch, or a peer's own package. Each is compared with the plain formula in float32 before it is
timed; one that is not installed, raises or gives other numbers is reported as such, and the rest go on.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import math
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Row = dict[str, Any]
Step = Callable[[], Any]

# By provider: what is imported, and what pip calls it.
PACKAGES = {
    "open_clip": ("open_clip", "open_clip_torch"),
    "siglip-kernel": ("siglip_kernel", "siglip-kernel"),
    "memeff": ("memeff", "memeff"),
    "Inf-CL": ("inf_cl", "inf-cl"),
    "cut-cross-entropy": ("cut_cross_entropy", "cut-cross-entropy"),
    "lightly": ("lightly", "lightly"),
    "timm": ("timm", "timm"),
}
SCALE, BIAS = 10.0, -10.0
STUDENT_TEMP, TEACHER_TEMP, MOMENTUM = 0.1, 0.04, 0.996
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2**-5, torch.float16: 2**-5}
MOST_ROUNDS, LEAST_ROUNDS, ROUNDS_MS = 10, 3, 1500
MOST_AHEAD_MS = 50.0  # what takes the host longer waits for the device in between


class NotComparableError(Exception):
    """A provider cannot do this shape, for a reason that is its own."""


# ---- the machine


class Meter:
    """Times and memory of steps on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        # Written before each step, so that none finds its inputs in the last-level cache.
        self.flush = torch.empty(2**28 if self.on_gpu else 2**16, dtype=torch.uint8, device=device)

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def once_ms(self, step: Step, ahead_ms: float = 0.0) -> float:
        self.flush.zero_()
        if not self.on_gpu:
            start = time.perf_counter()
            step()
            return 1e3 * (time.perf_counter() - start)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device sleeps until the host has launched all of the step, as it would behind the rest of a training step:
        # what is measured is the device's time, not the gaps between launches.
        torch.cuda._sleep(int(self.clocks_per_ms * 1.5 * ahead_ms))
        before.record()
        step()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def launch_ms(self, step: Step) -> float:
        """The host's time to launch a step; on a CPU that is none beside the step's."""
        if not self.on_gpu:
            return 0.0
        self.synchronize()
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)

    @functools.cached_property
    def clocks_per_ms(self) -> float:
        """Of the clock that a sleep counts."""
        clocks = 10_000_000
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(clocks)  # wakes the device up
        before.record()
        torch.cuda._sleep(clocks)
        after.record()
        after.synchronize()
        return clocks / before.elapsed_time(after)

    def median_ms(self, step: Step) -> float:
        step()  # compiles and allocates
        ahead = min(self.launch_ms(step), MOST_AHEAD_MS)
        first = max(self.once_ms(step, ahead) + ahead, 1e-3)
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(ROUNDS_MS / first)))
        return statistics.median(self.once_ms(step, ahead) for _ in range(rounds))

    def peak_mb(self, step: Step) -> float | None:
        """Above what is allocated before the step; unknown on a CPU."""
        if not self.on_gpu:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        step()
        self.synchronize()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20

    @functools.cache  # noqa: B019 (there is one meter to a process)
    def matrix_tflops(self, width: int, dtype: torch.dtype, tiny: bool) -> float:
        """torch.mm of two panels as the losses multiply them."""
        side = 64 if tiny else 8192
        a, b = (torch.randn(side, width, device=self.device).to(dtype) for _ in range(2))
        return 2 * side * side * width / self.median_ms(lambda: a @ b.t()) / 1e9

    @functools.cache  # noqa: B019
    def copy_gbytes_per_s(self, tiny: bool) -> float:
        """Bytes read plus written."""
        source = torch.zeros(2**16 if tiny else 2**30, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.median_ms(lambda: target.copy_(source)) / 1e6


def machine(device: torch.device) -> Row:
    found: Row = {"device": "CPU", "torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip}
    for name in ("triton", "ssl_kernels"):
        try:
            found[name] = importlib.import_module(name).__version__
        except (ImportError, AttributeError) as error:
            found[name] = f"absent: {error}"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "capability": properties.gcnArchName if torch.version.hip else f"{properties.major}.{properties.minor}",
            "memory_gb": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    return found


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


# ---- losses of two sets of features


@dataclass(frozen=True)
class Group:
    """Providers of one op at its shapes. Each makes a function from the inputs to a loss or, in place, to nothing."""

    op: str
    providers: tuple[str, ...]
    shapes: Sequence[tuple[int, ...]]
    tiny: Sequence[tuple[int, ...]]
    describe: str  # of a shape
    make: Callable[..., Any] = field(repr=False)

    @property
    def name(self) -> str:
        foreign = [p for p in self.providers if p in KERNELS_OF_OTHERS]
        return f"{self.op}, {foreign[0]}" if foreign else self.op


# Compiled for GPUs by others: where one breaks the context of the device, a group of its own loses nothing else.
KERNELS_OF_OTHERS = ("siglip-kernel", "memeff", "Inf-CL", "cut-cross-entropy")


@dataclass
class Problem:
    """One shape of one op: leaves, the formula, a call per provider, and what nobody can do without."""

    leaves: list[Tensor]
    formula: Callable[..., Tensor]
    providers: dict[str, Callable[[], Callable[..., Any]]]
    units: dict[str, tuple[float, float]] = field(default_factory=dict)  # 10^9 FLOP of loss, and with gradients
    gbytes: tuple[float, float] | None = None
    width: int | None = None
    not_by: dict[str, tuple[int, ...]] = field(default_factory=dict)  # leaves that a provider gives no gradient


def _eager_sigmoid(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    logits = scale * (x @ y.t()) + bias
    return -F.logsigmoid(
        torch.where(torch.eye(len(x), dtype=torch.bool, device=x.device), logits, -logits)
    ).sum() / len(x)


def _eager_clip(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    logits, labels = scale * (x @ y.t()), torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2


def _compiled(loss: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    return torch.compile(loss, backend="inductor" if device.type == "cuda" else "aot_eager")


def _unit(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(rows + width)
    return F.normalize(torch.randn(rows, width, generator=generator, device=device), dim=-1).to(dtype)


def _pairs(batch: int, width: int, dtype: torch.dtype, device: torch.device, *scalars: float) -> list[Tensor]:
    x, noise = _unit(2 * batch, width, dtype, device).chunk(2)
    y = F.normalize(x.float() + noise.float(), dim=-1).to(dtype)
    return [t.clone().requires_grad_() for t in (x, y, *(torch.tensor(s, device=device) for s in scalars))]


def _sigmoid(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    def siglip_kernel() -> Callable[..., Tensor]:
        fused = importlib.import_module("siglip_kernel").fused_siglip_loss
        return lambda x, y, scale, bias: fused(x, y, scale.log(), bias)  # takes the logarithm of the scale

    u = 2 * batch**2 * width / 1e9
    return Problem(
        _pairs(batch, width, dtype, device, SCALE, BIAS),
        _eager_sigmoid,
        {
            "ours": lambda: importlib.import_module("ssl_kernels").SigLipLoss(),
            "eager": lambda: _eager_sigmoid,
            "compile": lambda: _compiled(_eager_sigmoid, device),
            "open_clip": lambda: importlib.import_module("open_clip.loss").SigLipLoss(),
            "siglip-kernel": siglip_kernel,
        },
        units={"": (u, 3 * u)},
        width=width,
    )


def _clip(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    def memeff() -> Callable[..., Tensor]:
        # "stable" would rescale the gradients; the temperature is a number and gets none.
        loss = importlib.import_module("memeff").MemoryEfficientCLIPLoss(
            1 / SCALE, normalized_inputs=True, stable=False
        )
        return lambda x, y, scale: loss(x, y)

    def inf_cl() -> Callable[..., Tensor]:
        fused = importlib.import_module("inf_cl").cal_flash_loss
        head = next((h for h in (256, 128, 64) if width % h == 0), None)
        if head is None:
            raise NotComparableError(f"cuts features into heads of a power of two, which {width} is no multiple of")
        return lambda x, y, scale: sum(fused(a, b, scale=scale, head_dim=head).mean() for a, b in ((x, y), (y, x))) / 2

    def cut_cross_entropy() -> Callable[..., Tensor]:
        fused = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        labels = torch.arange(batch, device=device)

        def loss(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
            # Without its filter, which leaves small probabilities out of the gradient.
            sides = ((x, y), (y, x))
            return sum(fused((scale * a).to(dtype), b, labels, filter_eps=None) for a, b in sides) / 2

        return loss

    u = 2 * batch**2 * width / 1e9
    return Problem(
        _pairs(batch, width, dtype, device, SCALE),
        _eager_clip,
        {
            "ours": lambda: importlib.import_module("ssl_kernels").ClipLoss(),
            "eager": lambda: _eager_clip,
            "compile": lambda: _compiled(_eager_clip, device),
            "open_clip": lambda: importlib.import_module("open_clip.loss").ClipLoss(),
            "memeff": memeff,
            "Inf-CL": inf_cl,
            "cut-cross-entropy": cut_cross_entropy,
        },
        units={"": (u, 3 * u), "ours": (u, 4 * u)},
        width=width,
        not_by={"memeff": (2,)},
    )


def _nt_xent(batch: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    def eager(x: Tensor, y: Tensor) -> Tensor:
        z = F.normalize(torch.cat([x, y]).float(), dim=-1).to(x.dtype)
        logits = (z @ z.t() / 0.1).fill_diagonal_(-math.inf)
        return F.cross_entropy(logits, torch.arange(2 * batch, device=device).roll(batch))

    import ssl_kernels

    u = 2 * (2 * batch) ** 2 * width / 1e9
    return Problem(
        _pairs(batch, width, dtype, device),
        eager,
        {
            "ours": lambda: ssl_kernels.NTXentLoss(0.1),
            "eager": lambda: eager,
            "lightly": lambda: importlib.import_module("lightly.loss").NTXentLoss(0.1),
        },
        units={"": (u / 2, 2 * u)},
        width=width,
    )


def _info_nce(batch: int, keys: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    queue = _unit(keys, width, dtype, device)

    def eager(x: Tensor, y: Tensor) -> Tensor:
        logits = torch.cat([(x * y).sum(1, keepdim=True), x @ queue.t().to(x.dtype)], 1) / 0.2
        return F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64, device=device))

    import ssl_kernels

    u = 2 * batch * keys * width / 1e9
    return Problem(
        _pairs(batch, width, dtype, device),
        eager,
        {
            "ours": lambda: lambda x, y: ssl_kernels.InfoNCELoss(0.2)(x, y, queue),
            "eager": lambda: eager,
        },
        units={"": (u, 2 * u)},
        width=width,
    )


# ---- sweeps over memory


def _dino(samples: int, crops: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    student, teacher = (0.1 * draw(n, samples, width) for n in (crops, 2))
    student, teacher = student.to(dtype).requires_grad_(), teacher.to(dtype)
    pairs = 2 * crops - 2

    def eager(student: Tensor) -> Tensor:
        """Every crop of the student once, against the sum of its teachers."""
        p = torch.softmax(teacher.float() / TEACHER_TEMP, -1)
        log_s = torch.log_softmax(student.float() / STUDENT_TEMP, -1)
        return ((p * log_s[:2]).sum() - (p.sum(0) * log_s).sum()) / (pairs * samples)

    def lightly() -> Callable[..., Tensor]:
        if dtype != torch.float32:
            raise NotComparableError("multiplies 16-bit and float32 tensors, which raises")
        loss = importlib.import_module("lightly.loss").DINOLoss(width, center_momentum=1.0).to(device)
        return lambda student: loss(list(teacher), list(student))

    import ssl_kernels.functional as K

    ours = functools.partial(K.dino_loss, student_temp=STUDENT_TEMP, teacher_temp=TEACHER_TEMP)
    read = (crops + 2) * samples * width * dtype.itemsize / 1e9
    return Problem(
        [student],
        eager,
        {
            "ours": lambda: lambda student: ours(student, teacher),
            "eager": lambda: eager,
            "compile": lambda: _compiled(eager, device),
            "lightly": lightly,
        },
        gbytes=(read, read + crops * samples * width * dtype.itemsize / 1e9),
    )


class _Parameters(torch.nn.Module):
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.all = torch.nn.ParameterList(torch.nn.Parameter(t.clone(), requires_grad=False) for t in tensors)


def _layers(depth: int, width: int) -> list[tuple[int, ...]]:
    """Parameters of a vision transformer."""
    block: list[tuple[int, ...]] = [(width,)] * 2 + [(3 * width, width), (3 * width,), (width, width), (width,)]
    block += [(width,)] * 2 + [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(1, 197, width), (width, 3, 16, 16), *block * depth]


def _ema(depth: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Teachers in float32, students in ``dtype``."""
    generator = torch.Generator(device).manual_seed(0)
    start = [torch.randn(shape, generator=generator, device=device) for shape in _layers(depth, width)]
    student = _Parameters([torch.randn_like(t).to(dtype) for t in start])
    sources = list(student.parameters())

    def teacher() -> tuple[_Parameters, list[Tensor]]:
        model = _Parameters(start)
        return model, list(model.parameters())

    def result(step: Step, targets: list[Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad():
                step()
            return targets[4]  # the first matrix

        return run

    def ours() -> Callable[[], Tensor]:
        import ssl_kernels.functional as K

        _, targets = teacher()
        return result(lambda: K.ema_update_(targets, sources, MOMENTUM), targets)

    def loop() -> Callable[[], Tensor]:
        _, targets = teacher()

        def step() -> None:
            for target, source in zip(targets, sources, strict=True):
                target.mul_(MOMENTUM).add_(source, alpha=1 - MOMENTUM)

        return result(step, targets)

    def foreach() -> Callable[[], Tensor]:
        _, targets = teacher()

        def step() -> None:
            cast = [source.to(target.dtype) for source, target in zip(sources, targets, strict=True)]
            torch._foreach_lerp_(targets, cast, 1 - MOMENTUM)

        return result(step, targets)

    def timm() -> Callable[[], Tensor]:
        model, targets = teacher()
        average = importlib.import_module("timm.utils").ModelEmaV3(model, decay=MOMENTUM)
        average.module = model
        return result(lambda: average.update(student), targets)

    def lightly() -> Callable[[], Tensor]:
        model, targets = teacher()
        update = importlib.import_module("lightly.models.utils").update_momentum
        return result(lambda: update(student, model, MOMENTUM), targets)

    def formula() -> Tensor:
        return (MOMENTUM * start[4].double() + (1 - MOMENTUM) * sources[4].double()).float()

    moved = sum(t.numel() for t in start) * (8 + dtype.itemsize) / 1e9
    providers = {"ours": ours, "foreach_lerp": foreach, "loop": loop, "timm": timm, "lightly": lightly}
    return Problem([], formula, providers, gbytes=(moved, moved))


def _queue(batch: int, size: int, width: int, dtype: torch.dtype, device: torch.device) -> Problem:
    start, keys = _unit(size, width, dtype, device), _unit(batch, width, dtype, device)

    def ours() -> Callable[[], Tensor]:
        import ssl_kernels

        queue = ssl_kernels.KeyQueue(size, width, dtype=dtype).to(device)
        queue.keys.copy_(start)

        def step() -> Tensor:
            queue.enqueue(keys)
            return queue.keys

        return step

    def moco() -> Callable[[], Tensor]:
        """The buffers and the update of MoCo's model: features by rows, the pointer read by the host."""
        queue, pointer = start.t().contiguous(), torch.zeros(1, dtype=torch.int64, device=device)

        def step() -> Tensor:
            at = int(pointer)
            queue[:, at : at + batch] = keys.t()
            pointer[0] = (at + batch) % size
            return queue.t()

        return step

    def lightly() -> Callable[[], Tensor]:
        bank = importlib.import_module("lightly.models.modules.memory_bank").MemoryBankModule((size, width))
        bank = bank.to(device, dtype)
        bank.bank.copy_(start)

        def step() -> Tensor:
            bank(keys, update=True)
            return bank.bank

        return step

    def formula() -> Tensor:
        return torch.cat([keys, start[batch:]])

    moved = 2 * batch * width * dtype.itemsize / 1e9
    return Problem([], formula, {"ours": ours, "moco": moco, "lightly": lightly}, gbytes=(moved, moved))


_BATCHES = [(8192, 512), (8192, 1152), (32_768, 768), (65_536, 512), (131_072, 512), (131_072, 1152)]
_PYTORCH = ("ours", "eager", "compile")
_TINY = [(32, 128)]
_WIDE = "B={} D={}"
_LONG = "B={} K={} D={}"
_QUEUES = [(256, 65_536, 128), (4096, 65_536, 256)]
_CROPS = [(64, 10, 65_536), (64, 10, 131_072)]
# The most important first: time is cut from the end.
GROUPS = [
    Group("sigmoid", (*_PYTORCH, "open_clip"), _BATCHES, _TINY, _WIDE, _sigmoid),
    Group("clip", (*_PYTORCH, "open_clip"), _BATCHES, _TINY, _WIDE, _clip),
    Group("dino", (*_PYTORCH, "lightly"), _CROPS, [(4, 6, 64)], "B={} crops={} K={}", _dino),
    Group("sigmoid", ("ours", "siglip-kernel"), _BATCHES, _TINY, _WIDE, _sigmoid),
    Group("clip", ("ours", "memeff"), _BATCHES, _TINY, _WIDE, _clip),
    Group("clip", ("ours", "Inf-CL"), _BATCHES[:4], _TINY, _WIDE, _clip),
    Group("clip", ("ours", "cut-cross-entropy"), _BATCHES[:4], _TINY, _WIDE, _clip),
    Group("ema", ("ours", "foreach_lerp", "loop", "timm", "lightly"), [(24, 1024)], [(1, 16)], "ViT {} x {}", _ema),
    Group("queue", ("ours", "moco", "lightly"), _QUEUES, [(16, 64, 16)], _LONG, _queue),
    Group("info_nce", ("ours", "eager"), [(4096, 65_536, 128), (4096, 65_536, 256)], [(16, 64, 16)], _LONG, _info_nce),
    Group("nt_xent", ("ours", "eager", "lightly"), [(4096, 128), (32_768, 512)], [(32, 16)], _WIDE, _nt_xent),
]


# ---- measuring


STARTED = "started"


def measure(group: Group, device: torch.device, *, tiny: bool, deadline: float) -> Iterator[Row]:
    """A row to each provider, shape and mode, and one before each attempt. What the deadline (of time.monotonic) cuts
    is a row, too."""
    meter = Meter(device)
    dtype = torch.float32 if tiny else torch.bfloat16
    out_of_memory: set[str] = set()  # at one shape: larger ones would be, too
    errors: dict[tuple[Any, ...], float] = {}
    for shape in group.tiny if tiny else group.shapes:
        described = group.describe.format(*shape)
        problem: Problem | None = None
        for provider in group.providers:
            row: Row = {"op": group.op, "provider": provider, "shape": described, "dtype": _name(dtype)}
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
                problem = problem or group.make(*shape, dtype, device)
                # What cannot be compared whole is compared in the small: the formula keeps several whole matrices.
                small = [min(n, 2048) for n in shape] if group.op in ("sigmoid", "clip", "nt_xent") else shape
                key = (provider, *small)
                if key not in errors:
                    errors[key] = _error(group.make(*small, dtype, device), provider)
                row["error"] = errors[key]
                if not row["error"] <= TOLERANCE[dtype]:
                    detail = f"relative error {row['error']:.2g}, allowed {TOLERANCE[dtype]:.2g}"
                    yield row | {"status": "outputs differ", "detail": detail}
                    continue
                yield from _timed(row, problem, provider, meter, dtype, tiny)
            except NotComparableError as error:
                yield row | {"status": "not comparable", "detail": str(error)}
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


def _timed(row: Row, problem: Problem, provider: str, meter: Meter, dtype: torch.dtype, tiny: bool) -> Iterator[Row]:
    loss = problem.providers[provider]()
    modes: dict[str, Step] = {"update": loss}
    if problem.leaves:
        modes = {"forward": lambda: _forward(loss, problem), "forward+backward": lambda: _backward(loss, problem)}
    for k, (mode, step) in enumerate(modes.items()):
        found = row | {"mode": mode, "ms": meter.median_ms(step), "peak_mb": meter.peak_mb(step)}
        found["launch_ms"] = meter.launch_ms(step)
        for leaf in problem.leaves:
            leaf.grad = None
        if problem.units:
            gflop = problem.units.get(provider, problem.units[""])[k]
            rate = meter.matrix_tflops(problem.width, dtype, tiny)
            found |= {"gflop": gflop, "matrix_tflops": rate, "of_matrix_rate": gflop / found["ms"] / rate}
        if problem.gbytes is not None:
            rate = meter.copy_gbytes_per_s(tiny)
            found |= {"gbytes": problem.gbytes[k], "copy_gbytes_per_s": rate}
            found["of_bandwidth"] = 1e3 * problem.gbytes[k] / found["ms"] / rate
        yield found


def _forward(loss: Callable[..., Tensor], problem: Problem) -> Tensor:
    with torch.no_grad():
        return loss(*problem.leaves)


def _backward(loss: Callable[..., Tensor], problem: Problem) -> Tensor:
    for leaf in problem.leaves:
        leaf.grad = None
    value = loss(*problem.leaves)
    value.backward()
    return value.detach()


def _error(problem: Problem, provider: str) -> float:
    """The largest relative error of the value and of the gradients by features, against the formula in float32."""
    loss = problem.providers[provider]()
    if not problem.leaves:
        return _distance(loss().clone(), problem.formula())
    value = _backward(loss, problem)
    ours = [value, *(leaf.grad for k, leaf in enumerate(problem.leaves) if k not in problem.not_by.get(provider, ()))]
    exact_leaves = [leaf.detach().float().requires_grad_() for leaf in problem.leaves]
    exact_value = problem.formula(*exact_leaves)
    exact_value.backward()
    wanted = [k for k in range(len(exact_leaves)) if k not in problem.not_by.get(provider, ())]
    exact = [exact_value.detach(), *(exact_leaves[k].grad for k in wanted)]
    # A gradient by a scalar is a sum that cancels: what it is held against is what it is made of.
    spread = max((g.norm().item() * len(g) ** 0.5 for g in exact if g is not None and g.dim()), default=0.0)
    errors = []
    for k, (a, e) in enumerate(zip(ours, exact, strict=True)):
        if a is None or e is None:
            raise NotComparableError(f"gives no gradient to argument {k - 1}")
        errors.append(_distance(a, e, spread if k and not e.dim() else 0.0))
    return max(errors)


def _distance(a: Tensor, exact: Tensor, least: float = 0.0) -> float:
    return ((a.float() - exact).norm() / exact.norm().clamp(min=max(least, 1e-30))).item()


def _context_is_lost() -> bool:
    """After an illegal access every further call fails, and only a new process helps."""
    try:
        torch.cuda.synchronize()
    except Exception:
        return True
    return False


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
