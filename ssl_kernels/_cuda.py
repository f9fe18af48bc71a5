"""The CUDA C++ kernels, a shared object of their own: it loads into CUDA builds of torch only."""

from __future__ import annotations

import importlib
import importlib.util
import warnings

import torch


def _load() -> tuple[str, str]:
    """Loads them. How they were built, or nothing; why they are not there, or nothing."""
    if torch.version.cuda is None:
        return "", f"torch {torch.__version__} is not a CUDA build"
    if importlib.util.find_spec("ssl_kernels._C_cuda") is None:
        major = torch.version.cuda.split(".")[0]
        how = "pip install --no-build-isolation, so that this torch is built for"
        return "", f"not built; a build from source where nvcc of CUDA {major} is installed includes them ({how})"
    try:
        module = importlib.import_module("ssl_kernels._C_cuda")
    except (ImportError, OSError) as error:
        reason = f"ssl_kernels._C_cuda cannot be loaded ({error})"
        advice = "CUDA tensors will be served by Triton and by torch's own kernels. Build it here, or reinstall it."
        warnings.warn(f"ssl_kernels: {reason}. {advice}", RuntimeWarning, stacklevel=2)
        return "", reason
    return module.build(), ""


build, missing = _load()
