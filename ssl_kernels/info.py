"""``python -m ssl_kernels.info``: versions, instruction set, and the backend that each op uses by default."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

import ssl_kernels
import ssl_kernels.functional as K
from ssl_kernels import _C, _cuda, settings
from ssl_kernels.ops.matmul import onednn_is_faster


def native_build_info() -> dict[str, Any] | str:
    """What ``ssl_kernels._native`` knows about its build, or why it is absent."""
    try:
        from ssl_kernels import _native
    except ImportError as error:
        version = platform.python_version()
        return f"not built for Python {version} ({error}); a build from source on this Python includes it"
    info: dict[str, Any] = _native.build_info()
    return info


def collect() -> dict[str, str]:
    """The report as label and text."""
    native = native_build_info()
    report = {
        "ssl_kernels": ssl_kernels.__version__,
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "Triton": _triton_version(),
        "CUDA C++ kernels": _cuda.missing or f"built by {_cuda.build}",
        "CUDA device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "instruction set": f"{_C.active_isa()} (SSL_KERNELS_ISA overrides)",
    }
    if isinstance(native, str):
        report["ssl_kernels._native"] = native
    else:
        report["instruction sets here"] = ", ".join(native["available_isas"])
        report["compiled by"] = f"{native['compiler']} for {native['architecture']}"
    report["CPU matrix products"] = "oneDNN" if onednn_is_faster() else "torch.mm"
    report["backend"] = f"{settings.current_backend()} (SSL_KERNELS_BACKEND, use_backend or set_defaults overrides)"
    here, on_cuda = (f"{settings.workspace_bytes(torch.device(d)) / 2**20:g} MB" for d in ("cpu", "cuda"))
    workspace = here if on_cuda == here else f"{here}, on CUDA {on_cuda}"
    kept = f"{settings.tile_budget_bytes() / 2**20:g} MB"
    for label, size, name in (("workspace", workspace, "workspace"), ("kept tiles", kept, "tile_budget")):
        report[label] = f"{size} (SSL_KERNELS_{name.upper()}_MB, use_{name} or set_defaults overrides)"
    for op in K.__all__:
        report[op] = ", ".join(f"{case}: {backend}" for case, backend in _backends(kernels_of(op)).items())
    return report


def _triton_version() -> str:
    try:
        import triton

        return str(triton.__version__)
    except (ImportError, AttributeError):
        return "not installed"


def kernels_of(op: str) -> Sequence[str]:
    """The backends for which an op of :mod:`ssl_kernels.functional` has kernels."""
    kernels: Sequence[str] = sys.modules[getattr(K, op).__module__].KERNELS
    return kernels


def _backends(kernels: Sequence[str]) -> dict[str, str]:
    """What an op with such kernels will use for features of each kind."""
    cases = {
        "CPU fp32/bf16/fp16": ("cpu", torch.float32),
        "CPU fp64": ("cpu", torch.float64),
        "CUDA fp32/bf16/fp16": ("cuda", torch.float32),
        "other devices": ("meta", torch.float32),
    }
    chosen = {}
    for case, (device, dtype) in cases.items():
        try:
            chosen[case] = settings.choose_backend(torch.device(device), dtype, kernels)
        except ValueError as error:
            chosen[case] = str(error)
    return chosen


def main() -> None:
    report = collect()
    width = max(map(len, report))
    for label, text in report.items():
        print(f"{label:<{width}}  {text}")


if __name__ == "__main__":
    main()
