"""sentence-transformers' losses with `gather_across_devices`, theirs and ours, in a rank of several."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import sentence_transformers.sentence_transformer.losses as theirs
import torch
import torch.distributed as dist
from peers import assert_same, value_and_gradients
from torch import Tensor

import ssl_kernels
from ssl_kernels.distributed import gather_rows
from ssl_kernels.integrations import sentence_transformers as ours

GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def columns(rank: int, rows: Sequence[int], count: int, width: int = 12) -> list[Tensor]:
    """Embeddings of this rank: queries, their positives, and hard negatives."""
    torch.manual_seed(count)
    whole = [torch.randn(sum(rows), width) for _ in range(count)]
    whole[1] += whole[0]
    first = sum(rows[:rank])
    return [t[first : first + rows[rank]].clone().requires_grad_() for t in whole]


def rankings() -> Iterator[dict[str, Any]]:
    for directions, mode, hardness in itertools.product(
        (("query_to_doc",), ("query_to_doc", "doc_to_query"), GTE),
        ("joint", "per_direction"),
        (None, "in_batch_negatives", "hard_negatives", "all_negatives"),
    ):
        if mode == "joint" or directions != GTE:
            strength = 4.0 if hardness else 0.0
            yield {
                "directions": directions, "partition_mode": mode, "hardness_mode": hardness,
                "hardness_strength": strength,
            }  # fmt: skip


def ranking_losses_gather_as_theirs(rank: int, world: int) -> None:
    """The values of this rank, and the gradients that reach it from all ranks."""
    for options, count in itertools.product(rankings(), (2, 4)):
        found = []
        for module in (ours, theirs):
            leaves = columns(rank, [9] * world, count)
            loss = module.MultipleNegativesRankingLoss(None, 10.0, gather_across_devices=True, **options)
            found.append(value_and_gradients(loss.compute_loss_from_embeddings(leaves, None), leaves))
        assert_same(*found)


def guided_losses_gather_as_theirs(rank: int, world: int) -> None:
    for anchors, positives, margin, count in itertools.product((False, True), (False, True), (0.0, 0.1), (2, 4)):
        found = []
        for module in (ours, theirs):
            leaves = columns(rank, [9] * world, count)
            guides = [t.detach()[:, :7] + 0.3 for t in leaves]
            options = SimpleNamespace(
                temperature=0.1, margin_strategy="relative", margin=margin, contrast_anchors=anchors,
                contrast_positives=positives, gather_across_devices=True, mini_batch_size=4, show_progress_bar=False,
                similarity_fct=torch.nn.CosineSimilarity(dim=-1), cross_entropy_loss=torch.nn.CrossEntropyLoss(),
            )  # fmt: skip
            kind = module.CachedGISTEmbedLoss
            options.sim_matrix = lambda x, y, kind=kind, self=options: kind.sim_matrix(self, x, y)
            loss = kind.calculate_loss(options, [[t] for t in leaves], [[t] for t in guides])
            found.append(value_and_gradients(loss, leaves))
        assert_same(*found)


def ranks_may_have_other_numbers_of_texts(rank: int, world: int) -> None:
    """The mean over the ranks, weighted by their texts, is the loss of one process with all of them; and so are the
    gradients, which data-parallel trainers average."""
    rows = list(range(5, 5 + world))
    for options, count, backend in itertools.product(rankings(), (3,), ("auto", "reference")):
        loss = ours.MultipleNegativesRankingLoss(None, 10.0, gather_across_devices=True, **options)
        leaves = columns(rank, rows, count)
        with ssl_kernels.use_backend(backend):
            gradients = value_and_gradients(loss.compute_loss_from_embeddings(leaves, None), leaves)[1:]
        whole = [gather_rows(t).requires_grad_() for t in leaves]
        loss.gather_across_devices = False
        expected = value_and_gradients(loss.compute_loss_from_embeddings(whole, None), whole)[1:]
        first = sum(rows[:rank])
        parts = [g[first : first + rows[rank]] for g in expected]
        if len(options["directions"]) == 1 or options["partition_mode"] == "per_direction":
            assert_same([g / world for g in gradients], parts)


if __name__ == "__main__":
    raise SystemExit(dist.is_initialized())
