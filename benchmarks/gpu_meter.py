"""Times, memory and limits of one device, and what it is."""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

Step = Callable[[], Any]
MOST_ROUNDS, LEAST_ROUNDS, ROUNDS_MS = 10, 3, 1500
MOST_AHEAD_MS = 50.0  # what takes the host longer waits for the device in between


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
        # Times of a CPU, at sizes that say nothing, are for tests alone.
        rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(ROUNDS_MS / first))) if self.on_gpu else 1
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


def machine(device: torch.device, packages: Sequence[str] = ("triton", "ssl_kernels")) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": "CPU",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
    }
    for name in packages:
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
