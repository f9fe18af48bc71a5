"""Loss modules around :mod:`ssl_kernels.functional`. Each has the arguments of the peer's class that it replaces."""

from ssl_kernels.losses.albef import ALBEFContrastiveLoss
from ssl_kernels.losses.barlow_twins import BarlowTwinsLoss
from ssl_kernels.losses.clip import ClipLoss
from ssl_kernels.losses.dino import DINOLoss
from ssl_kernels.losses.ibot import IBOTPatchLoss
from ssl_kernels.losses.info_nce import InfoNCELoss
from ssl_kernels.losses.koleo import KoLeoLoss
from ssl_kernels.losses.moco import MoCoLoss, MoCoV3Loss
from ssl_kernels.losses.nt_xent import NTXentLoss
from ssl_kernels.losses.siglip import SigLipLoss
from ssl_kernels.losses.sinkhorn import SinkhornKnopp
from ssl_kernels.losses.sup_con import SupConLoss
from ssl_kernels.losses.vicreg import VICRegLoss

__all__ = [
    "ALBEFContrastiveLoss",
    "BarlowTwinsLoss",
    "ClipLoss",
    "DINOLoss",
    "IBOTPatchLoss",
    "InfoNCELoss",
    "KoLeoLoss",
    "MoCoLoss",
    "MoCoV3Loss",
    "NTXentLoss",
    "SigLipLoss",
    "SinkhornKnopp",
    "SupConLoss",
    "VICRegLoss",
]
