"""Softmax over rows: M queries, and N candidates of which the first M are the positives and the others hard negatives.

The loss alone takes one product of 2 M N D FLOP, loss and gradients three. Ours, which stores no matrix, takes no more
on a CPU whose workspace holds a tile of all candidates; in a small one, it takes a fourth to form the tiles again. The
same with prefixes of the features, and with a guide that takes a product of its own.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ssl_kernels.functional as K
from ssl_kernels import use_tile_budget, use_workspace
from ssl_kernels.bench.problem import Floor, Loss, NotComparableError, Op, Problem, gflop, unit_rows
from ssl_kernels.ops.panel_shape import whole_rows
from ssl_kernels.settings import workspace_bytes

SCALE = 20.0
FARNESS = 2.0  # of noise in a positive
AGREEMENT = 0.1  # of a guide's features of a query and its positive
SMALL = "ours, 4 MB workspace"
SMALL_MB = 4
MOST_EXPANDED = 2**31  # numbers that a peer expands its similarities to, chunk by chunk: seconds
SHARES = (1.0, 2 / 3, 1 / 3, 1 / 6, 1 / 12)  # prefixes, of all features


def eager(query: Tensor, candidates: Tensor, scale: Tensor) -> Tensor:
    return F.cross_entropy(scale * query @ candidates.t(), torch.arange(len(query), device=query.device))


def by_prefix(dims: Sequence[int]) -> Loss:
    def loss(query: Tensor, candidates: Tensor, scale: Tensor) -> Tensor:
        sides = ([F.normalize(t[:, :length], dim=1) for t in (query, candidates)] for length in dims)
        return torch.stack([eager(q, c, scale) for q, c in sides]).sum()

    return loss


def guided(guide_query: Tensor, guide_candidates: Tensor) -> Loss:
    def loss(query: Tensor, candidates: Tensor, scale: Tensor) -> Tensor:
        scores = guide_query @ guide_candidates.t()
        false_negative = scores > scores.diagonal()[:, None] + 2e-6
        logits = (scale * query @ candidates.t()).masked_fill(false_negative, -torch.inf)
        return F.cross_entropy(logits, torch.arange(len(query), device=query.device))

    return loss


def guide_features(rows: int, cols: int, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of +1/16 and -1/16, which any order of a sum adds without rounding: all agree on which scores are above others,
    some 7% of them above that of the target."""
    queries, candidates = (
        torch.randint(2, (n, width), device=device, dtype=dtype).mul_(2).sub_(1) / 16 for n in (rows, cols)
    )
    is_kept = torch.rand(rows, width, device=device) < AGREEMENT
    candidates[:rows] = torch.where(is_kept, queries, candidates[:rows])
    return queries, candidates


class Embedded(torch.nn.Module):
    """A model whose texts are their own embeddings."""

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(features)

    def get_embedding_dimension(self) -> None:
        """Nobody has told."""


def of_sentence_transformers(dims: Sequence[int] | None) -> Loss:
    """Its own loss of embeddings, which are normalised: as cos_sim does so again, it is given the product alone."""
    losses = pkgutil.resolve_name("sentence_transformers.sentence_transformer.losses")
    model, product = Embedded(), pkgutil.resolve_name("sentence_transformers.util:dot_score")
    ranking = losses.MultipleNegativesRankingLoss(model, SCALE, product)
    whole = ranking if dims is None else losses.MatryoshkaLoss(model, ranking, dims)

    def loss(query: Tensor, candidates: Tensor, scale: Tensor) -> Tensor:
        ranking.scale = scale
        return whole([{"sentence_embedding": t} for t in (query, candidates)], None)

    return loss


def guided_of_sentence_transformers(size: int, guide_query: Tensor, guide_candidates: Tensor) -> Loss:
    """What CachedGISTEmbedLoss makes of embeddings, chunk by chunk, without the similarities that it adds by default.

    It divides by norms, so that its gradients have no part along the features.
    """
    kind = pkgutil.resolve_name("sentence_transformers.sentence_transformer.losses:CachedGISTEmbedLoss")
    if size > MOST_EXPANDED:
        raise NotComparableError("expands its similarities to [chunk, N, D], which takes minutes at this size")
    options = SimpleNamespace(
        margin_strategy="absolute", margin=-1e-4, contrast_anchors=False, contrast_positives=False,
        gather_across_devices=False, mini_batch_size=32, show_progress_bar=False,
        similarity_fct=torch.nn.CosineSimilarity(dim=-1), cross_entropy_loss=torch.nn.CrossEntropyLoss(),
    )  # fmt: skip
    options.sim_matrix = functools.partial(kind.sim_matrix, options)

    def loss(query: Tensor, candidates: Tensor, scale: Tensor) -> Tensor:
        options.temperature = 1 / scale.detach()
        grad = torch.is_grad_enabled()
        value: Tensor = kind.calculate_loss(
            options, [[query], [candidates]], [[guide_query], [guide_candidates]], with_backward=grad
        )
        return value.requires_grad_(grad)  # its gradients are there

    return loss


def in_small_workspace(loss: Loss) -> Loss:
    def call(*leaves: Tensor) -> Tensor:
        with use_workspace(SMALL_MB), use_tile_budget(0):
            return loss(*leaves)

    return call


def problem(
    rows: int, cols: int, width: int, dtype: torch.dtype, device: torch.device, *, kind: str = "plain"
) -> Problem:
    query, noise = unit_rows(rows + cols, width, dtype, device).split([rows, cols])
    candidates = noise.clone()  # so near to a query that the loss is of order 1, and no difference of large numbers
    candidates[:rows] = F.normalize(query.float() + FARNESS * noise[:rows].float(), dim=1).to(dtype)
    leaves = [query, candidates, torch.tensor(SCALE, device=device)]
    options: dict[str, Any] = {}
    formula, products, once = eager, 3.0, 0.0
    not_by: dict[str, tuple[int, ...]] = {}
    peer = functools.partial(of_sentence_transformers, None)
    if kind == "prefixes":
        dims = [max(1, round(share * width)) for share in SHARES]
        options, formula = {"dims": dims, "normalize": True}, by_prefix(dims)
        products = 3 * sum(dims) / width
        peer = functools.partial(of_sentence_transformers, dims)
    elif kind == "guide":
        guide = guide_features(rows, cols, width // 2, dtype, device)
        options = {"guide_query": guide[0], "guide_candidates": guide[1]}
        formula, once = guided(*guide), 0.5
        peer = functools.partial(guided_of_sentence_transformers, rows * cols * width, *guide)
        not_by = {"sentence-transformers": (0, 1, 2)}

    def floor(provider: str, backward: bool) -> Floor:
        if not provider.startswith("ours"):
            return Floor((products / (1 if backward else 3) + once) * gflop(rows, cols, width), width)
        workspace = SMALL_MB * 2**20 if provider == SMALL else workspace_bytes(device)
        tiles = len(SHARES) if kind == "prefixes" else 1
        visits_once = device.type == "cpu" and whole_rows(rows, cols, 4 * tiles, workspace) > 0
        again = 0.0 if visits_once or not backward else 1 + once
        return Floor(((3 if backward else 1) + once + again) * gflop(rows, cols, width), width)

    ours = functools.partial(K.row_softmax_loss, **options)
    providers: dict[str, Callable[[], Loss]] = {
        "ours": lambda: ours,
        SMALL: lambda: in_small_workspace(ours),
        "sentence-transformers": peer,
    }
    return Problem([t.clone().requires_grad_() for t in leaves], formula, providers, floor, not_by=not_by)


ROW_SOFTMAX = Op(
    "row_softmax",
    "Softmax over rows",
    problem,
    ("ours", SMALL, "sentence-transformers", "eager", "compile"),
    [(4096, 8192, 768), (1024, 2048, 384)],
    tiny=[(32, 64, 24)],
    gpu_shapes=[(4096, 8192, 768), (16_384, 32_768, 768), (32_768, 65_536, 1024)],
    describe="M={} N={} D={}".format,
    quadratic=True,
)
ROW_PREFIXES = replace(
    ROW_SOFTMAX,
    problem=functools.partial(problem, kind="prefixes"),
    providers=("ours", "sentence-transformers", "eager"),
    shapes=ROW_SOFTMAX.shapes[:1],
    modes=ROW_SOFTMAX.modes[1:],
    suffix=", five prefixes",
    label="prefixes",
)
ROW_GUIDE = replace(
    ROW_PREFIXES,
    problem=functools.partial(problem, kind="guide"),
    shapes=ROW_SOFTMAX.shapes,
    suffix=", guide",
    label="guide",
)
