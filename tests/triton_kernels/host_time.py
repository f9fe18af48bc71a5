"""Measure what a step costs the host, on this machine's processor, and write host_time.json.

Nothing is launched: of Triton's launcher the last call, into the driver, is left out, and operations of torch run on
matrices so small that calling them is all they cost. What C++ does on a CPU is counted as the operations that it is on
a GPU. Times are those of the thread, whatever else the machine does.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import fake_device
import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import settings
from ssl_kernels.kernels import configs, key_softmax, sigmoid, softmax_grad, softmax_stats
from ssl_kernels.kernels.scratch import Scratch
from ssl_kernels.kernels.tiles import gradient_tile
from ssl_kernels.ops import matmul, panels

RECORD = pathlib.Path(__file__).with_name("host_time.json")
WIDTH, ROWS, CALLS, ROUNDS = 64, 16, 200, 40


class _Driver:
    """What Triton asks of a driver, for an H100 that is not there."""

    launcher_cls = nvidia.CudaLauncher

    def __init__(self) -> None:
        self.utils = SimpleNamespace(
            launch=lambda *args: None,
            build_signature_metadata=lambda signature: signature,
            fill_tma_descriptor_tiled=lambda *args: 0,
            load_binary=lambda *args: (0, 0, 0, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232_448},
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def allocate_default_profile_scratch(self, *args: object) -> None:
        return None


def _returns(value: object) -> Callable[..., object]:
    """A function, which costs less than a mock."""
    return lambda *args, **options: value


@contextlib.contextmanager
def stubbed() -> Iterator[None]:
    """Tensors of the CPU pass for those of an H100, and launches reach no driver."""
    with contextlib.ExitStack() as stack:
        for name in ("PyKernelArg", "ARG_CONSTEXPR", "ARG_KERNEL", "ARG_TUPLE"):
            stack.enter_context(mock.patch.object(nvidia, name, lambda **given: given))
        for module in (configs, key_softmax, sigmoid, softmax_grad, softmax_stats):
            if hasattr(module, "device_traits"):
                stack.enter_context(mock.patch.object(module, "device_traits", _returns(("sm_90", True, 132))))
        large = configs.CONFIGS["sm_90", "half"][0]  # as for every large panel
        stack.enter_context(mock.patch.object(configs, "modelled", _returns(large)))
        stack.enter_context(mock.patch.object(settings, "_interpreting", _returns(True)))
        driver.set_active(_Driver())
        yield


def microseconds(calls: dict[str, tuple[Callable[[], object], int]]) -> dict[str, float]:
    """Of one call of each, with how often to repeat it: the least of several averages, since what else the processor
    does only adds to it. They take turns, so that it does so to all alike."""
    least = dict.fromkeys(calls, float("inf"))
    for round_ in range(ROUNDS):
        for name, (call, repeats) in calls.items():
            if round_ == 0:
                call()  # compiles
            start = time.thread_time_ns()
            for _ in range(repeats):
                call()
            least[name] = min(least[name], (time.thread_time_ns() - start) / repeats / 1000)
    return least


def features(rows: int = ROWS) -> Tensor:
    return F.normalize(torch.randn(rows, WIDTH), dim=1).bfloat16()


def launches() -> dict[str, tuple[Callable[[], object], int]]:
    """Of Triton's kernels, each with what is done for it alone: through a Scratch, and without one."""
    x, y, scale = features(), features(), torch.tensor(10.0)
    none = None, None, False
    stats, one = torch.zeros(ROWS, 3, dtype=torch.float64), torch.zeros(ROWS, 1, dtype=torch.float64)
    running, partials = torch.zeros(ROWS, 4, dtype=torch.float64), torch.zeros(1, 4, ROWS)
    vectors = [torch.ones(ROWS)] * 6

    def sigmoid_panel(scratch: Scratch | None) -> None:
        grad = gradient_tile(x, ROWS) if scratch is None else scratch.gradient(x, ROWS)
        sigmoid.sigmoid_panel(x, y, grad, stats, scale, scale, *none, 0, scratch=scratch)

    def grad_panel(scratch: Scratch | None) -> None:
        grad = gradient_tile(x, ROWS) if scratch is None else scratch.gradient(x, ROWS)
        softmax_grad.softmax_grad(x, y, grad, one, scale, *none, 0, 2**62, *vectors, None, None, scratch=scratch)

    def stats_panel(scratch: Scratch | None) -> None:
        softmax_stats.softmax_stats(x, y, running, None, scale, *none, 0, 2**62, scratch=scratch)

    def through(call: Callable[[Scratch | None], None], scratch: Scratch) -> Callable[[], None]:
        def once() -> None:
            scratch._used = 0  # nothing is added up
            call(scratch)

        return once

    return {
        "merge": (lambda: softmax_stats.merge_statistics(partials, running, scale), CALLS),
        "sigmoid": (through(sigmoid_panel, Scratch(ROWS, 2**30)), CALLS),
        "sigmoid and sums, alone": (lambda: sigmoid_panel(None), CALLS),
        "grad": (through(grad_panel, Scratch(ROWS, 2**30)), CALLS),
        "grad and sums, alone": (lambda: grad_panel(None), CALLS),
        "stats": (through(stats_panel, softmax_stats.merging(ROWS, 2**30, scale)), CALLS),
        "stats and sums, alone": (lambda: stats_panel(None), CALLS),
        "keys and merge": (lambda: key_softmax.key_softmax(x, y, scale, True), CALLS),
    }


def operations() -> dict[str, tuple[Callable[[], object], int]]:
    """Of torch, and of the driver of panels around them."""
    a, sums, total = torch.zeros(16, 16), torch.zeros(2, 1, 16), torch.zeros(16, 1, dtype=torch.float64)
    x, made = torch.zeros(512, 16), torch.zeros(64, 64)

    def others() -> None:
        torch.mul(a, a, out=a)
        sums.sum(dim=0, dtype=torch.float64)
        total.add_(total)
        torch.exp(a)

    def views() -> None:
        a[:4]
        a.t()
        a.new_empty(4, 4)

    def drive() -> None:
        with (
            mock.patch.object(panels, "add_matmul", _returns(None)),
            mock.patch.object(panels, "panel_shape", _returns((64, 64))),
        ):
            panels.run_panels(
                lambda *args: made, x, x, compute_dtype=torch.float32, workspace=2**20, tiles=1, stats_width=1,
                want_dx=True, want_dy=True,
            )  # fmt: skip

    return {
        "product": (lambda: matmul.add_matmul(a, a, a, first=False), 1000),
        "other operation": (others, 300),
        "view or allocation": (views, 300),
        "panel": (drive, 10),
    }


def steps() -> dict[str, tuple[Callable[[], object], int]]:
    """Of one panel, forward and backward, from the public function on."""
    x, y, scale, bias = (t.requires_grad_() for t in (features(), features(), torch.tensor(10.0), torch.tensor(-10.0)))
    queue = features()
    losses: dict[str, Callable[[], Tensor]] = {
        "SigLIP": lambda: K.sigmoid_contrastive_loss(x, y, scale, bias),
        "CLIP": lambda: K.clip_loss(x, y, scale),
        "NT-Xent": lambda: K.nt_xent_loss(x, y, 0.1),
        "InfoNCE": lambda: K.info_nce_loss(x, y, queue, 10.0),
    }

    def step(name: str) -> None:
        with ssl_kernels.use_backend("triton"):
            losses[name]().backward()

    return {name: (lambda name=name: step(name), 20) for name in losses}  # type: ignore[misc]


def operations_left_out() -> dict[str, int]:
    """How many operations of torch more a step of one panel has on a GPU than here, where C++ does some of them."""
    found = {}
    for name, step in fake_device.STEPS.items():
        here = fake_device.Counts()
        with mock.patch.object(fake_device, "DEVICE", "cpu"), fake_device.Counting(here):
            step(ROWS, WIDTH)
        there = fake_device.counted("sm_90", functools.partial(step, ROWS, WIDTH))
        found[name] = there.others.total() - here.others.total()
    return found


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure() -> None:
    torch.set_num_threads(1)
    with stubbed():
        whole = steps()
        found = microseconds(launches() | operations() | whole)
        more = operations_left_out()
    several = {"other operation": 4, "view or allocation": 3, "panel": 64}  # in one call
    other = found["other operation"] / several["other operation"]
    record = {
        "processor": processor(),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__.partition('+')[0]}, "
        f"Triton {triton.__version__}",
        "microseconds": {
            name: round(value / several.get(name, 1), 2) for name, value in found.items() if name not in whole
        },
        "step of one panel": {name: round(found[name] + more[name] * other) for name in whole},
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    measure()
