"""Fused, exact, memory-linear kernels for contrastive and self-supervised losses."""

from ssl_kernels import _interrupt  # noqa: F401 (first, for what follows takes seconds)

# isort: split
import importlib
from types import ModuleType

import torch

__version__ = "0.1.0"

try:
    from ssl_kernels import _C
except ImportError as error:
    raise ImportError(
        f"ssl_kernels: the compiled module ssl_kernels._C cannot be loaded ({error}).\n"
        "From a checkout, build it:   pip install --no-build-isolation -e .\n"
        "Otherwise reinstall it:      pip install --force-reinstall --no-deps ssl_kernels\n"
        f"It needs torch >= 2.10; this is torch {torch.__version__}."
    ) from error

from ssl_kernels import functional
from ssl_kernels.collapse import CollapseMonitor
from ssl_kernels.ema import ModelEma
from ssl_kernels.grad_cache import grad_cache
from ssl_kernels.heads import DINOHead
from ssl_kernels.losses import (
    ALBEFContrastiveLoss,
    BarlowTwinsLoss,
    ClipLoss,
    DINOLoss,
    IBOTPatchLoss,
    InfoNCELoss,
    KoLeoLoss,
    MoCoLoss,
    MoCoV3Loss,
    NTXentLoss,
    SigLipLoss,
    SinkhornKnopp,
    SupConLoss,
    VICRegLoss,
)
from ssl_kernels.queue import KeyQueue
from ssl_kernels.settings import set_defaults, use_backend, use_tile_budget, use_workspace

_C.active_isa()  # an unknown SSL_KERNELS_ISA is reported here, not in the first loss


def __getattr__(name: str) -> ModuleType:
    """`ssl_kernels.trainers` needs no import of its own; it is imported when it is asked for."""
    if name == "trainers":
        return importlib.import_module("ssl_kernels.trainers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "ALBEFContrastiveLoss",
    "BarlowTwinsLoss",
    "ClipLoss",
    "CollapseMonitor",
    "DINOHead",
    "DINOLoss",
    "IBOTPatchLoss",
    "InfoNCELoss",
    "KeyQueue",
    "KoLeoLoss",
    "MoCoLoss",
    "MoCoV3Loss",
    "ModelEma",
    "NTXentLoss",
    "SigLipLoss",
    "SinkhornKnopp",
    "SupConLoss",
    "VICRegLoss",
    "__version__",
    "functional",
    "grad_cache",
    "set_defaults",
    "use_backend",
    "use_tile_budget",
    "use_workspace",
]
