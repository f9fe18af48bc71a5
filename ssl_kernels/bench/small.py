"""Small batches, where a loss costs what its plumbing costs: ours and the peers', both ways, on one thread."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_kernels as S
from ssl_kernels.bench import info_nce
from ssl_kernels.bench.problem import MODES, Floor, Loss, Op, Problem, normal, pairs, peer, unit_rows

WIDTH, KEYS, TEMPERATURE = 128, 4096, 0.2  # the keys are those of the queue that InfoNCE meets
OURS = {"InfoNCELoss": info_nce.TEMPERATURE, "MoCoV3Loss": TEMPERATURE}  # what a module takes, if anything


def moco_v3(q1: Tensor, q2: Tensor, k1: Tensor, k2: Tensor) -> Tensor:
    """As MoCo v3's code computes it."""

    def one_direction(query: Tensor, key: Tensor) -> Tensor:
        logits = torch.einsum("nc,mc->nm", F.normalize(query, dim=1), F.normalize(key, dim=1)) / TEMPERATURE
        return F.cross_entropy(logits, torch.arange(len(query))) * (2 * TEMPERATURE)

    return one_direction(q1, k2) + one_direction(q2, k1)


# Name -> what of unit rows x, y [B, D], a scale and a bias it takes, and the peer's.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]], Callable[[], Loss]]] = {
    "ClipLoss": (lambda x, y, t, b: [x, y, t], peer("open_clip.loss:ClipLoss")),
    "SigLipLoss": (lambda x, y, t, b: [x, y, t, b], peer("open_clip.loss:SigLipLoss")),
    "NTXentLoss": (lambda x, y, t, b: [x, y], peer("lightly.loss:NTXentLoss")),
    "InfoNCELoss": (
        lambda x, y, t, b: [x, y.detach(), unit_rows(KEYS, WIDTH, x.dtype, x.device)],
        lambda: lambda query, positive, queue: info_nce.moco(query, positive, queue.t()),
    ),
    "MoCoV3Loss": (lambda x, y, t, b: [x, y, x.detach().roll(1, 0), y.detach().roll(1, 0)], lambda: moco_v3),
    "KoLeoLoss": (lambda x, y, t, b: [x], peer("lightly.loss:KoLeoLoss")),
    "VICRegLoss": (lambda x, y, t, b: [x, y], peer("lightly.loss:VICRegLoss")),
    "BarlowTwinsLoss": (lambda x, y, t, b: [x, y], peer("lightly.loss:BarlowTwinsLoss")),
}


def problem(name: str, batch: int, dtype: torch.dtype, device: torch.device) -> Problem:
    choose, make_peer = LOSSES[name]
    rows = (F.normalize(normal(batch, WIDTH, dtype=dtype, device=device, seed=k), dim=1) for k in range(2))
    x, y = (row.requires_grad_() for row in rows)
    scale, bias = pairs(1, 1, dtype, device, 10.0, -10.0)[2:]

    def ours() -> Loss:
        module: type = getattr(S, name)
        loss: Loss = module(OURS[name]) if name in OURS else module()
        return loss

    def formula(*leaves: Tensor) -> Tensor:
        with S.use_backend("reference"):
            value: Tensor = ours()(*leaves)
            return value

    return Problem(choose(x, y, scale, bias), formula, {"ours": ours, "peer": make_peer}, lambda *_: Floor())


SMALL = Op(
    "small",
    "Small batches",
    problem,
    ("ours", "peer"),
    [(name, batch) for batch in (32, 128, 256) for name in LOSSES],
    tiny=[(name, 16) for name in LOSSES],
    quick=[(name, 32) for name in LOSSES],
    describe=("{} B={} D=" + str(WIDTH)).format,
    modes=MODES[1:],
    tolerance=1e-3,
    threads=1,
)
