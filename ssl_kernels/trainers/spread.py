"""How far embeddings are from having collapsed."""

from __future__ import annotations

import torch
from torch import Tensor

from ssl_kernels.ops.unit_rows import unit_rows


@torch.no_grad()
def spread(z: Tensor) -> dict[str, Tensor]:
    """How far embeddings [B, D] are from having collapsed, as metrics to log.

    `embedding_std`: the standard deviation of the normalised embeddings times sqrt(D); 1 where they fill the sphere
    evenly, 0 where all are equal. `embedding_rank`: their effective rank, the exponential of the entropy of the centred
    singular values (Roy & Vetterli 2007; as RankMe, Garrido 2022, arXiv 2210.02885); at most min(B - 1, D).
    """
    z = unit_rows(z.float())
    centred = z - z.mean(0)
    std = centred.square().mean().sqrt() * z.shape[1] ** 0.5
    if not bool(torch.isfinite(std)):  # the loop reports it; an SVD would only raise
        return {"embedding_std": std, "embedding_rank": std}
    # A collapsed batch has rounding errors for singular values: they are no directions.
    values = torch.linalg.svdvals(centred) if len(z) > 1 else z.new_zeros(1)
    values = values * (values > 1e-5)
    shares = values / values.sum().clamp(min=1e-12)
    return {"embedding_std": std, "embedding_rank": torch.special.entr(shares).sum().exp() * (values.sum() > 0)}
