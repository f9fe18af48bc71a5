"""Loss modules: ``nn.Module`` faces of :mod:`ssl_kernels.functional`, call-compatible with the peers they replace."""

from ssl_kernels.losses.siglip import SigLipLoss

__all__ = ["SigLipLoss"]
