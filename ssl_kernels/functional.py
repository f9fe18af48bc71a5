"""The fused operations as functions. ``import ssl_kernels.functional as K``."""

from ssl_kernels.ops.albef import albef_contrastive_loss
from ssl_kernels.ops.barlow_twins import barlow_twins_loss
from ssl_kernels.ops.clip import clip_loss
from ssl_kernels.ops.dino import dino_loss
from ssl_kernels.ops.ema import ema_update_
from ssl_kernels.ops.ibot import ibot_patch_loss
from ssl_kernels.ops.info_nce import info_nce_loss
from ssl_kernels.ops.key_softmax import key_softmax
from ssl_kernels.ops.koleo import koleo_loss
from ssl_kernels.ops.nt_xent import nt_xent_loss
from ssl_kernels.ops.queue import enqueue_
from ssl_kernels.ops.row_softmax import row_lse, row_softmax_loss
from ssl_kernels.ops.sigmoid import sigmoid_contrastive_loss
from ssl_kernels.ops.sinkhorn import centered_softmax, sinkhorn_center, sinkhorn_knopp
from ssl_kernels.ops.sup_con import sup_con_loss
from ssl_kernels.ops.vicreg import vicreg_loss

__all__ = [
    "albef_contrastive_loss",
    "barlow_twins_loss",
    "centered_softmax",
    "clip_loss",
    "dino_loss",
    "ema_update_",
    "enqueue_",
    "ibot_patch_loss",
    "info_nce_loss",
    "key_softmax",
    "koleo_loss",
    "nt_xent_loss",
    "row_lse",
    "row_softmax_loss",
    "sigmoid_contrastive_loss",
    "sinkhorn_center",
    "sinkhorn_knopp",
    "sup_con_loss",
    "vicreg_loss",
]
