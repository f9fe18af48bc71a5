"""Loss modules: ``nn.Module`` faces of :mod:`ssl_kernels.functional`, call-compatible with the peers they replace."""

from ssl_kernels.losses.albef import ALBEFContrastiveLoss
from ssl_kernels.losses.clip import ClipLoss
from ssl_kernels.losses.infonce import InfoNCELoss
from ssl_kernels.losses.moco import MoCoLoss, MoCoV3Loss
from ssl_kernels.losses.ntxent import NTXentLoss
from ssl_kernels.losses.siglip import SigLipLoss
from ssl_kernels.losses.supcon import SupConLoss

__all__ = [
    "ALBEFContrastiveLoss",
    "ClipLoss",
    "InfoNCELoss",
    "MoCoLoss",
    "MoCoV3Loss",
    "NTXentLoss",
    "SigLipLoss",
    "SupConLoss",
]
