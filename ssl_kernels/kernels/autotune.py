"""Configurations measured on the card at hand, where ``SSL_KERNELS_AUTOTUNE=1`` asks for it.

The first call of a kernel with a class of shapes runs every configuration that fits and keeps the fastest: for this
process, and in ``$XDG_CACHE_HOME/ssl_kernels/`` (``~/.cache`` if unset) for those that follow, by device and version of
Triton and of this package. What a sum rounds to depends on the configuration, so that runs repeat bit for bit once the
file is there. Nothing is measured while a CUDA graph is captured: what was measured before holds there as well, so that
calls before the capture have compiled what it launches; where there were none, the model chooses.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.runtime.errors import OutOfResources

import ssl_kernels

Config = TypeVar("Config")

_ROUNDS = 5
_LAUNCHES = 10  # of one configuration in a round

_remembered: dict[str, dict[str, str]] = {}  # by device: kernel and class of shapes -> configuration, as text


def is_wanted(device: torch.device) -> bool:
    """Whether measurements are to choose on this device."""
    value = os.environ.get("SSL_KERNELS_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"SSL_KERNELS_AUTOTUNE: expected 0 or 1, got {value!r}")
    return value == "1" and device.type == "cuda"


def fastest(
    kernel: str, shapes: str, device: torch.device, configs: Sequence[Config], launch: Callable[[Config], Any]
) -> Config | None:
    """The fastest of ``configs``, as measured before or now; None where a CUDA graph is captured, which is no time to
    measure.

    Args:
        kernel: its name.
        shapes: the class of shapes for which one measurement stands.
        device: where ``launch`` runs.
        configs: those that suit the arguments, at least one.
        launch: runs the kernel with one of them; again and again, so it must not add to anything.
    """
    name = torch.cuda.get_device_name(device)
    known = _remembered.setdefault(name, {})
    key = f"{kernel} {shapes}"
    if key not in known:
        known.update({**_read(name), **known})  # what this process has used, it goes on using
    for config in configs:
        if known.get(key) == str(config):
            return config
    if torch.cuda.is_current_stream_capturing():
        return None
    times = _measure(configs, launch, device)
    if not times:
        raise RuntimeError(f"{key}: none of {len(configs)} configurations runs on {name}")
    best = min(times, key=lambda config: times[config])
    known[key] = str(best)
    _write(name, known)
    return best


def _measure(configs: Sequence[Config], launch: Callable[[Config], Any], device: torch.device) -> dict[Config, float]:
    """Median time of each that runs. They take turns, so that a chip that heats up or is shared slows all alike."""
    rounds: dict[Config, list[float]] = {}
    for config in configs:
        try:
            launch(config)  # compiles
        except OutOfResources:  # of a chip smaller than its family's
            continue
        rounds[config] = []
    for _ in range(_ROUNDS):
        for config, times in rounds.items():
            times.append(_milliseconds(lambda config=config: launch(config), device))  # type: ignore[misc]
    return {config: statistics.median(times) for config, times in rounds.items()}


def _milliseconds(launch: Callable[[], Any], device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_LAUNCHES):
            launch()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))


def _path(device_name: str) -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ssl_kernels"
    versions = f"ssl_kernels {ssl_kernels.__version__} triton {triton.__version__}"
    return folder / (re.sub(r"[^\w.]+", "-", f"{device_name} {versions}") + ".json")


def _read(device_name: str) -> dict[str, str]:
    path = _path(device_name)
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"SSL_KERNELS_AUTOTUNE: measuring anew, since {path} cannot be read: {error}", stacklevel=2)
        return {}
    return found if isinstance(found, dict) else {}


def _write(device_name: str, known: dict[str, str]) -> None:
    """What other processes have found in the meantime stays; a reader meets a whole file, old or new."""
    path = _path(device_name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({**_read(device_name), **known}, file, indent=2)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"SSL_KERNELS_AUTOTUNE: this process alone remembers, since {path}: {error}", stacklevel=2)
